//! Which parsers read the outputs of which model.

use std::{collections::BTreeMap, fmt::Display, str::FromStr};

use kvmesh_output_parser::{ReasoningFormat, ToolFormat};

use super::{Layers, SettingsError};

/// Which format is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which<F> {
    /// The one that the model's template speaks of.
    Auto,
    /// None.
    None,
    /// This one.
    Format(F),
}

/// A format a model.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Chosen<F> {
    /// For models that are not named.
    others: Which<F>,
    models: BTreeMap<String, Which<F>>,
}

/// What is looked for in the outputs of models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParserSettings {
    tools: Chosen<ToolFormat>,
    reasoning: Chosen<ReasoningFormat>,
}

impl ParserSettings {
    pub(super) fn of(layers: &Layers) -> Result<Self, SettingsError> {
        Ok(Self {
            tools: Chosen::of("tool_parser", &layers.list("tool_parser"))?,
            reasoning: Chosen::of("reasoning_parser", &layers.list("reasoning_parser"))?,
        })
    }

    /// How a model writes tool calls, where its templates speak of `auto`.
    pub(crate) fn tools(&self, model: &str, auto: Option<ToolFormat>) -> Option<ToolFormat> {
        self.tools.for_model(model, auto)
    }

    /// How a model marks reasoning, where its templates speak of `auto`.
    pub(crate) fn reasoning(
        &self,
        model: &str,
        auto: Option<ReasoningFormat>,
    ) -> Option<ReasoningFormat> {
        self.reasoning.for_model(model, auto)
    }
}

impl<F: FromStr<Err: Display> + Copy> Chosen<F> {
    /// `FORMAT` for all models, `MODEL=FORMAT` for one.
    fn of(key: &'static str, items: &[String]) -> Result<Self, SettingsError> {
        let mut chosen = Self {
            others: Which::Auto,
            models: BTreeMap::new(),
        };
        for item in items {
            let (model, name) = match item.rsplit_once('=') {
                Some((model, name)) => (Some(model.trim()), name.trim()),
                None => (None, item.trim()),
            };
            let which = match name {
                "auto" => Which::Auto,
                "none" => Which::None,
                name => {
                    Which::Format(name.parse().map_err(|error: F::Err| SettingsError::Value {
                        from: key.to_owned(),
                        key,
                        value: item.clone(),
                        allowed: format!(
                            "auto, none or a format, for one model as MODEL=FORMAT: {error}"
                        ),
                    })?)
                }
            };
            match model {
                Some(model) => {
                    chosen.models.insert(model.to_owned(), which);
                }
                None => chosen.others = which,
            }
        }
        Ok(chosen)
    }

    fn for_model(&self, model: &str, auto: Option<F>) -> Option<F> {
        match self.models.get(model).copied().unwrap_or(self.others) {
            Which::Auto => auto,
            Which::None => None,
            Which::Format(format) => Some(format),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parsers(file: &str) -> Result<ParserSettings, String> {
        let mut layers = Layers::default();
        layers
            .add_toml("test.toml", file)
            .map_err(|error| error.to_string())?;
        ParserSettings::of(&layers).map_err(|error| error.to_string())
    }

    #[test]
    fn a_model_has_its_own_or_that_of_all() {
        let auto = Some(ToolFormat::Hermes);
        let shipped = parsers("").unwrap();
        assert_eq!(shipped.tools("m", auto), auto);
        assert_eq!(shipped.tools("m", None), None);
        let set = parsers("tool_parser = 'none, org/m=llama3, n=auto'").unwrap();
        assert_eq!(set.tools("other", auto), None);
        assert_eq!(set.tools("org/m", auto), Some(ToolFormat::Llama3));
        assert_eq!(set.tools("n", auto), auto);
        let set = parsers("reasoning_parser = ['think']").unwrap();
        assert_eq!(set.reasoning("m", None), Some(ReasoningFormat::Think));
    }

    #[test]
    fn a_name_that_is_none_is_refused_with_those_that_there_are() {
        let refused = parsers("tool_parser = 'm=hermse'").unwrap_err();
        for part in ["tool_parser", "m=hermse", "auto", "hermes, llama3"] {
            assert!(refused.contains(part), "{part}: {refused}");
        }
    }
}
