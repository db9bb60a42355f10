//! The formats, by name and by the template of a model.

use std::{fmt, str::FromStr};

use crate::{deepseek, harmony, hermes, llama, mistral, pythonic, xml};

/// The example in templates that have calls written as Python has them.
const PYTHONIC_EXAMPLE: &str = "func_name1(params_name1=";

/// How a model writes tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// An object between `<tool_call>` and `</tool_call>`: Hermes, Qwen 2.5 and 3.
    Hermes,
    /// The answer is an object with `name` and `parameters`: Llama 3.1 and later, as their own
    /// templates have it.
    Llama3,
    /// `[TOOL_CALLS]` before a list, or before each name.
    Mistral,
    /// `<｜tool▁call▁begin｜>` and its like: DeepSeek V3, R1, V3.1.
    DeepSeek,
    /// `<function=…>` and `<parameter=…>`: Qwen3-Coder.
    Qwen3Coder,
    /// A name, `<arg_key>` and `<arg_value>` between `<tool_call>` and `</tool_call>`: GLM 4.5
    /// and later.
    Glm45,
    /// The answer is a list of calls as Python has them: Llama 3.2 and 4.
    Pythonic,
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
    pub const ALL: [Self; 8] = [
        Self::Hermes,
        Self::Llama3,
        Self::Mistral,
        Self::DeepSeek,
        Self::Qwen3Coder,
        Self::Glm45,
        Self::Pythonic,
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
            Self::Qwen3Coder => "qwen3_coder",
            Self::Glm45 => "glm45",
            Self::Pythonic => "pythonic",
            Self::Harmony => "harmony",
        }
    }

    /// The format that a chat template speaks of; `None` where it is none of these.
    #[must_use]
    pub fn of_template(template: &str) -> Option<Self> {
        let has = |part: &str| template.contains(part);
        let is_llama = has("<|start_header_id|>") || has("<|header_start|>");
        if harmony::is_in(template) {
            Some(Self::Harmony)
        } else if has("<｜tool▁call▁begin｜>") {
            Some(Self::DeepSeek)
        } else if has(mistral::OPEN) {
            Some(Self::Mistral)
        } else if has(hermes::OPEN) && has("<parameter=") {
            Some(Self::Qwen3Coder)
        } else if has(hermes::OPEN) && has("<arg_key>") {
            Some(Self::Glm45)
        } else if has(hermes::OPEN) {
            Some(Self::Hermes)
        } else if has(PYTHONIC_EXAMPLE) && !has("<TOOLCALL>") {
            // Nemotron has the same words, and other marks.
            Some(Self::Pythonic)
        } else if has(llama::OPEN) || is_llama && has("\"parameters\"") {
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
            Self::Qwen3Coder => xml::QWEN_MARKS,
            Self::Glm45 => xml::GLM_MARKS,
            Self::Pythonic => pythonic::MARKS,
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
