//! Reasoning and tool calls in the text that a model writes, as it comes.
//!
//! ```text
//! text ─▶ reasoning (think, harmony) ─▶ calls (one dialect) ─▶ events
//! ```
//!
//! Pure: pieces of text in, [`Event`]s out. What comes out is a function of the
//! whole text alone, wherever it was cut into pieces. Text that looks like the
//! beginning of a call and becomes none is content, and no text is lost or told
//! twice; only the marks of a format, and white space beside them, are not
//! told. Arguments are the bytes that the model wrote, valid JSON or not; of a
//! format that is no JSON they become JSON.
#![forbid(unsafe_code)]

mod arguments;
mod calls;
mod deepseek;
mod event;
mod format;
mod harmony;
mod hermes;
mod json;
mod llama;
mod look;
mod mistral;
mod object;
mod python;
mod pythonic;
mod think;
mod tool;
mod value;
mod xml;

pub use event::{Event, Events};
pub use format::{ReasoningFormat, ToolFormat, UnknownFormat};
pub use tool::Tool;

use std::sync::Arc;

use calls::{CallParser, Dialect};
use harmony::Harmony;
use think::Think;

/// What tool calls look like in an output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Calls {
    /// There are none: all is content.
    None,
    /// As the model writes them by itself.
    Native {
        /// The model's format.
        format: ToolFormat,
        /// The tools that were offered. A format without marks of its own needs their names
        /// to tell a call from an answer, and one with values as text their types.
        tools: Arc<[Tool]>,
    },
    /// A grammar made the output a list of objects with `name` and `parameters`.
    List,
    /// A grammar made the output the arguments of this tool.
    One(String),
}

/// What is to be found in an output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// How reasoning is marked; `None`: there is none.
    pub reasoning: Option<ReasoningFormat>,
    /// How calls are written.
    pub calls: Calls,
    /// A grammar holds the output: where it begins with JSON no reasoning is before it.
    pub constrained: bool,
}

impl Expected {
    /// Whether an output has to be parsed at all.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.reasoning.is_none() && self.calls == Calls::None
    }

    /// The marks that a model may have special tokens for: they have to be in the
    /// text that is parsed.
    #[must_use]
    pub fn marks(&self) -> Vec<&'static str> {
        let reasoning = self.reasoning.map_or(&[][..], ReasoningFormat::marks);
        let calls = match &self.calls {
            Calls::Native { format, .. } => format.marks(),
            _ => &[],
        };
        let mut all = reasoning.to_vec();
        all.extend(calls.iter().filter(|mark| !reasoning.contains(*mark)));
        all
    }
}

/// Finds reasoning and calls in one output.
#[derive(Debug)]
pub struct OutputParser {
    reasoning: Reasoning,
    calls: Option<CallParser>,
    /// Content on its way from the one to the other.
    between: Events,
}

#[derive(Debug)]
enum Reasoning {
    None,
    Think(Think),
    Harmony(Harmony),
}

impl OutputParser {
    /// For an output that follows a prompt which ends like this; a few dozen
    /// characters of it are enough. A template may have opened the reasoning there.
    #[must_use]
    pub fn new(expected: &Expected, prompt_end: &str) -> Self {
        let calls = match &expected.calls {
            Calls::Native { format, tools } if *format == ToolFormat::Harmony => {
                Some(Arc::clone(tools))
            }
            _ => None,
        };
        let harmony = calls.is_some() || expected.reasoning == Some(ReasoningFormat::Harmony);
        let reasoning = match expected.reasoning {
            _ if harmony => Reasoning::Harmony(Harmony::new(calls, expected.reasoning.is_some())),
            Some(format) => match Think::new(format, prompt_end, expected.constrained) {
                Some(think) => Reasoning::Think(think),
                None => Reasoning::None,
            },
            None => Reasoning::None,
        };
        Self {
            reasoning,
            calls: Dialect::of(&expected.calls).map(CallParser::new),
            between: Events::default(),
        }
    }

    /// Takes the next piece of the output's text.
    pub fn push(&mut self, text: &str, out: &mut Events) {
        match &mut self.reasoning {
            Reasoning::None => return self.content(text, out),
            Reasoning::Think(think) => think.push(text, &mut self.between),
            Reasoning::Harmony(harmony) => harmony.push(text, &mut self.between),
        }
        self.pass(out);
    }

    /// The output is at its end: what was held back comes out.
    pub fn finish(&mut self, out: &mut Events) {
        match &mut self.reasoning {
            Reasoning::None => {}
            Reasoning::Think(think) => think.finish(&mut self.between),
            Reasoning::Harmony(harmony) => harmony.finish(&mut self.between),
        }
        self.pass(out);
        if let Some(calls) = &mut self.calls {
            calls.finish(out);
        }
    }

    fn pass(&mut self, out: &mut Events) {
        for event in std::mem::take(&mut self.between) {
            match event {
                Event::Content(text) => self.content(&text, out),
                event => out.add(event),
            }
        }
    }

    fn content(&mut self, text: &str, out: &mut Events) {
        match &mut self.calls {
            Some(calls) => calls.push(text, out),
            None => out.content(text),
        }
    }
}
