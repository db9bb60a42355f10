//! The formats, by name and by the template of a model.

use std::{fmt, str::FromStr};

use crate::{deepseek, harmony, hermes, llama, mistral};

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// An object between `<tool_call>` and `</tool_call>`: Hermes, Qwen 2.5 and 3.
    Hermes,
    /// The answer is an object with `name` and `parameters`: Llama 3.1 and later.
    Llama3,
    /// `[TOOL_CALLS]` before a list, or before each name.
    Mistral,
    /// `<｜tool▁call▁begin｜>` and its like: DeepSeek V3, R1, V3.1.
    DeepSeek,
    /// Messages with a recipient: gpt-oss.
    Harmony,
}

/// How a model marks its reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// Between `<think>` and `</think>`: DeepSeek, Qwen 3 and most others.
    Think,
    /// Between `[THINK]` and `[/THINK]`.
    Mistral,
    /// Messages on the channel `analysis`: gpt-oss.
    Harmony,
}

/// A name that no format has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?}; there are {known}")]
pub struct UnknownFormat {
    given: String,
    known: String,
}

impl ToolFormat {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Hermes,
        Self::Llama3,
        Self::Mistral,
        Self::DeepSeek,
        Self::Harmony,
    ];

    /// Its name in settings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::Llama3 => "llama3",
            Self::Mistral => "mistral",
            Self::DeepSeek => "deepseek",
            Self::Harmony => "harmony",
        }
    }

    /// The format that a chat template speaks of; `None` where it is none of these.
    #[must_use]
    pub fn of_template(template: &str) -> Option<Self> {
        let has = |part: &str| template.contains(part);
        if harmony::is_in(template) {
            Some(Self::Harmony)
        } else if has("<｜tool▁call▁begin｜>") {
            Some(Self::DeepSeek)
        } else if has(mistral::OPEN) {
            Some(Self::Mistral)
        } else if has(hermes::OPEN) {
            // Others put XML between the same marks: Qwen3-Coder, GLM.
            let xml = has("<function=") || has("<arg_key>");
            (!xml).then_some(Self::Hermes)
        } else if has(llama::OPEN) || has("<|start_header_id|>") && has("\"parameters\"") {
            Some(Self::Llama3)
        } else {
            None
        }
    }

    /// Marks that a model may have special tokens for.
    pub(crate) fn marks(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &[hermes::OPEN, hermes::CLOSE],
            Self::Llama3 => &[llama::OPEN],
            Self::Mistral => mistral::MARKS,
            Self::DeepSeek => deepseek::MARKS,
            Self::Harmony => harmony::MARKS,
        }
    }
}

impl ReasoningFormat {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Think, Self::Mistral, Self::Harmony];

    /// Its name in settings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Think => "think",
            Self::Mistral => "mistral",
            Self::Harmony => "harmony",
        }
    }

    /// The format that a chat template speaks of; `None` where it is none of these.
    #[must_use]
    pub fn of_template(template: &str) -> Option<Self> {
        let has = |part: &str| template.contains(part);
        if harmony::is_in(template) {
            Some(Self::Harmony)
        } else if has("[THINK]") {
            Some(Self::Mistral)
        } else if has("<think>") || has("</think>") {
            Some(Self::Think)
        } else {
            None
        }
    }

    /// Marks that a model may have special tokens for.
    pub(crate) fn marks(self) -> &'static [&'static str] {
        match self {
            Self::Think => &["<think>", "</think>"],
            Self::Mistral => &["[THINK]", "[/THINK]"],
            Self::Harmony => harmony::MARKS,
        }
    }

    /// The marks before reasoning and behind it; `None`: it lies otherwise.
    pub(crate) fn around(self) -> Option<(&'static str, &'static str)> {
        match *self.marks() {
            [open, close] => Some((open, close)),
            _ => None,
        }
    }
}

impl fmt::Display for ToolFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for ReasoningFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ToolFormat {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| unknown(name, &Self::ALL.map(Self::name)))
    }
}

impl FromStr for ReasoningFormat {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| unknown(name, &Self::ALL.map(Self::name)))
    }
}

fn unknown(given: &str, known: &[&str]) -> UnknownFormat {
    UnknownFormat {
        given: given.to_owned(),
        known: known.join(", "),
    }
}
