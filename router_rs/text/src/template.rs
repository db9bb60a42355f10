//! The model's chat template, run as `transformers` runs it.

use crate::chat::Chat;
use crate::error::{LoadError, TemplateError, cut};
use crate::json::{Style, from_json, from_map, mapping, to_json};
use crate::messages::Form;
use crate::time::UnixSeconds;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, State};
use std::borrow::Cow;
use std::error::Error as _;

/// Name of the variable that carries the time; templates do not name it so.
const NOW: &str = "__kvmesh_now";
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Compiled templates of a model: "default", and perhaps "tool_use".
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    has_tool_use: bool,
    sources: Vec<String>,
    /// `bos_token`, `eos_token` and so on, as the template's variables.
    special_tokens: Vec<(String, Value)>,
    rendered_limit: usize,
    form: Form,
}

/// What a template raised on purpose.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// Compiles sources by name; `fuel` is minijinja's, about an instruction
    /// or 64 bytes of text each.
    pub(crate) fn new(
        sources: &[(String, String)],
        special_tokens: Vec<(String, Value)>,
        fuel: u64,
        rendered_limit: usize,
    ) -> Result<Self, LoadError> {
        let malformed = |error: &Error| LoadError::Malformed {
            name: "chat template".to_owned(),
            message: cut(describe(error)),
        };
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|error| malformed(&error))?);
        environment.set_fuel(Some(fuel));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        for (name, source) in sources {
            let source = without_generation_tags(source).into_owned();
            environment
                .add_template_owned(name.clone(), source)
                .map_err(|error| malformed(&error))?;
        }
        let has_tool_use = sources.iter().any(|(name, _)| name == TOOL_USE);
        let mut template = Self {
            environment,
            has_tool_use,
            sources: sources.iter().map(|(_, source)| source.clone()).collect(),
            special_tokens,
            rendered_limit,
            form: Form::default(),
        };
        // A form that a template fails with is none that it takes.
        template.form =
            Form::found(|chat, form| template.render_as(chat, UnixSeconds(0), form).ok());
        Ok(template)
    }

    pub(crate) fn sources(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().map(String::as_str)
    }

    pub(crate) fn render(&self, chat: &Chat, now: UnixSeconds) -> Result<String, TemplateError> {
        self.render_as(chat, now, self.form)
    }

    fn render_as(
        &self,
        chat: &Chat,
        now: UnixSeconds,
        form: Form,
    ) -> Result<String, TemplateError> {
        let name = if self.has_tool_use && !chat.tools.is_empty() {
            TOOL_USE
        } else {
            DEFAULT
        };
        let template = self
            .environment
            .get_template(name)
            .map_err(|error| typed(&error))?;
        let mut variables: Vec<(String, Value)> = self.special_tokens.clone();
        variables.extend(
            chat.arguments
                .iter()
                .map(|(key, value)| (key.clone(), from_json(value))),
        );
        let tools = if chat.tools.is_empty() {
            Value::from(())
        } else {
            chat.tools.iter().map(from_map).collect()
        };
        let messages = chat.messages.iter().map(|message| form.message(message));
        let messages = messages.collect::<Result<Value, Error>>();
        variables.extend([
            (
                "messages".to_owned(),
                messages.map_err(|error| typed(&error))?,
            ),
            ("tools".to_owned(), tools),
            ("documents".to_owned(), Value::from(())),
            (
                "add_generation_prompt".to_owned(),
                Value::from(chat.add_generation_prompt),
            ),
            (NOW.to_owned(), Value::from(now.0)),
        ]);
        let context = mapping(
            variables
                .iter()
                .map(|(key, value)| (key.as_str(), value.clone())),
        );
        let text = template.render(context).map_err(|error| typed(&error))?;
        if text.len() > self.rendered_limit {
            return Err(TemplateError::TooLong {
                limit: self.rendered_limit,
            });
        }
        Ok(text)
    }
}

fn raise_exception(message: Value) -> Result<String, Error> {
    let text = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(text)))
}

fn strftime_now(state: &State, format: &str) -> Result<String, Error> {
    let now = state
        .lookup(NOW)
        .and_then(|value| i64::try_from(value).ok())
        .unwrap_or(0);
    Ok(UnixSeconds(now).format(format))
}

/// `tojson` of chat templates: `json.dumps` with its keyword arguments.
fn tojson(value: Value, arguments: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let mut style = Style::new(indent);
    if let Some(ascii) = arguments.get("ensure_ascii")? {
        style.ensure_ascii = ascii;
    }
    if let Some(sort) = arguments.get("sort_keys")? {
        style.sort_keys = sort;
    }
    if let Some(separators) = arguments.get::<Option<Vec<String>>>("separators")?
        && let [item, key] = separators.as_slice()
    {
        style.item_separator.clone_from(item);
        style.key_separator.clone_from(key);
    }
    arguments.assert_all_used()?;
    to_json(&value, &style)
}

fn typed(error: &Error) -> TemplateError {
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(Raised(text)) = inner.downcast_ref::<Raised>() {
            return TemplateError::Raised(cut(text.clone()));
        }
        source = inner.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => TemplateError::OutOfFuel,
        ErrorKind::SyntaxError => TemplateError::Syntax(cut(describe(error))),
        _ => TemplateError::Failed(cut(describe(error))),
    }
}

/// The error with its line, without the template's text.
fn describe(error: &Error) -> String {
    let mut text = error.kind().to_string();
    if let Some(detail) = error.detail() {
        text.push_str(": ");
        text.push_str(detail);
    }
    if let Some(line) = error.line() {
        text.push_str(&format!(" (line {line})"));
    }
    text
}

/// `{% generation %}` marks the assistant's text for training and renders as
/// its body. minijinja has no custom tags, so it becomes `{% if true %}`,
/// which keeps the dashes and so the white space.
fn without_generation_tags(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(begin) = rest.find("{%") {
        // Behind its beginning: `{%}` has one percent sign for both.
        let (before, behind) = rest.split_at(begin + 2);
        let Some(length) = behind.find("%}") else {
            break;
        };
        let body = &behind[..length];
        let word = body
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+'])
            .trim();
        out.push_str(before);
        match word {
            "generation" => out.push_str(&body.replace(word, "if true")),
            "endgeneration" => out.push_str(&body.replace(word, "endif")),
            _ => out.push_str(body),
        }
        out.push_str("%}");
        rest = &behind[length + 2..];
    }
    out.push_str(rest);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::without_generation_tags;

    #[test]
    fn a_tag_of_one_percent_sign_is_left_as_it_is() {
        for (source, wanted) in [
            ("generation {%}", "generation {%}"),
            (
                "{%}x{% generation %}y{% endgeneration %}",
                "{%}x{% generation %}y{% endif %}",
            ),
            (
                "{%- generation -%}é{% endgeneration %}",
                "{%- if true -%}é{% endif %}",
            ),
            ("{% generation", "{% generation"),
        ] {
            assert_eq!(without_generation_tags(source), wanted);
        }
    }
}
