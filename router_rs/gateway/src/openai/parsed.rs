//! Answers in whose text reasoning and tool calls are looked for.

use std::sync::Arc;

use kvmesh_output_parser::{Event, Events, Expected, OutputParser, ToolFormat};
use rand::RngExt;
use serde::Serialize;

use super::answer::Called;

/// Bytes of a whole answer that are read at once.
const PIECE: usize = 4 << 10;

/// What is looked for in the answers of a call.
#[derive(Clone, Debug)]
pub(super) struct Parsing {
    pub(super) expected: Arc<Expected>,
    /// The prompt's last characters.
    pub(super) prompt_end: String,
    /// Of several calls more than the first are told.
    pub(super) parallel: bool,
    /// How ids of calls look.
    pub(super) ids: Ids,
}

/// A part of an answer, as a chunk of a stream has it.
#[derive(Debug)]
pub(super) enum Delta<'a> {
    Content(&'a str),
    Other(Other<'a>),
}

/// A part that is no content.
#[derive(Debug, Default, Serialize)]
pub(super) struct Other<'a> {
    /// Under the name that DeepSeek's API has.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    /// The same, under the name that vLLM has since 0.11.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta<'a>; 1]>,
}

#[derive(Debug, Serialize)]
struct CallDelta<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Debug, Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

/// A call of a whole answer.
#[derive(Debug, Serialize)]
pub(super) struct ToolCall {
    id: String,
    r#type: &'static str,
    function: Function,
}

#[derive(Debug, Serialize)]
struct Function {
    name: String,
    arguments: String,
}

/// A whole answer.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) content: String,
    pub(super) reasoning: String,
    pub(super) calls: Vec<ToolCall>,
    pub(super) called: Called,
}

/// One answer on its way to its client.
#[derive(Debug)]
pub(super) struct Parsed {
    parser: OutputParser,
    events: Events,
    parallel: bool,
    ids: Ids,
    /// Calls that began.
    calls: usize,
}

impl Parsed {
    pub(super) fn new(parsing: &Parsing) -> Self {
        Self {
            parser: OutputParser::new(&parsing.expected, &parsing.prompt_end),
            events: Events::default(),
            parallel: parsing.parallel,
            ids: parsing.ids,
            calls: 0,
        }
    }

    /// What it called, of which the last is told of or not.
    pub(super) fn called(&self) -> Called {
        let told = self.calls == 1 || self.parallel;
        match self.calls {
            0 => Called::Nothing,
            _ if told && self.events.within_call() => Called::Within,
            _ => Called::Whole,
        }
    }

    /// Takes text, and lends what is known of it then. `ended`: there is no more.
    pub(super) fn push(&mut self, text: &str, ended: bool, mut take: impl FnMut(Delta<'_>)) {
        self.parser.push(text, &mut self.events);
        if ended {
            self.parser.finish(&mut self.events);
        }
        for event in self.events.drain() {
            if let Event::Call { .. } = event {
                self.calls += 1;
            }
            let told = self.calls == 1 || self.parallel;
            match event {
                Event::Content(text) => take(Delta::Content(&text)),
                Event::Reasoning(text) => take(Delta::Other(Other {
                    reasoning_content: Some(&text),
                    reasoning: Some(&text),
                    tool_calls: None,
                })),
                Event::Call { name } if told => {
                    let id = self.ids.draw();
                    take(call(CallDelta {
                        index: self.calls - 1,
                        id: Some(&id),
                        r#type: Some("function"),
                        function: FunctionDelta {
                            name: Some(&name),
                            arguments: "",
                        },
                    }));
                }
                Event::Arguments(text) if told => take(call(CallDelta {
                    index: self.calls - 1,
                    id: None,
                    r#type: None,
                    function: FunctionDelta {
                        name: None,
                        arguments: &text,
                    },
                })),
                Event::Call { .. } | Event::Arguments(_) => {}
            }
        }
    }

    /// All of an answer at once.
    pub(super) fn whole(mut self, text: &str) -> Parts {
        // In pieces, as a stream has it: what is not told yet is looked at with each mark.
        let mut rest = text;
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(rest.ceil_char_boundary(PIECE));
            self.parser.push(piece, &mut self.events);
            rest = behind;
        }
        self.parser.finish(&mut self.events);
        let mut parts = Parts::default();
        let mut calls = Vec::new();
        for event in self.events.drain() {
            match event {
                Event::Content(text) => parts.content.push_str(&text),
                Event::Reasoning(text) => parts.reasoning.push_str(&text),
                Event::Call { name } => {
                    self.calls += 1;
                    calls.push(ToolCall {
                        id: self.ids.draw(),
                        r#type: "function",
                        function: Function {
                            name,
                            arguments: String::new(),
                        },
                    });
                }
                Event::Arguments(text) => {
                    if let Some(call) = calls.last_mut() {
                        call.function.arguments.push_str(&text);
                    }
                }
            }
        }
        if !self.parallel {
            calls.truncate(1);
        }
        parts.calls = calls;
        parts.called = self.called();
        parts
    }
}

fn call(delta: CallDelta<'_>) -> Delta<'_> {
    Delta::Other(Other {
        tool_calls: Some([delta]),
        ..Other::default()
    })
}

/// How ids of calls look.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ids {
    /// As OpenAI's.
    Usual,
    /// Templates of Mistral take nine letters and digits, nothing else.
    Nine,
}

impl Ids {
    /// As a model's template takes them, also where a grammar held the call.
    pub(super) fn of(format: Option<ToolFormat>) -> Self {
        match format {
            Some(ToolFormat::Mistral) => Self::Nine,
            _ => Self::Usual,
        }
    }

    fn draw(self) -> String {
        let letters = rand::rng().sample_iter(rand::distr::Alphanumeric);
        let letters = letters.map(char::from);
        match self {
            Self::Usual => "call_".chars().chain(letters.take(24)).collect(),
            Self::Nine => letters.take(9).collect(),
        }
    }
}
