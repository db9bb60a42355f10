//! What is found in outputs, wherever they are cut into pieces.
#![allow(clippy::unwrap_used)]

mod formats;
mod marks;
mod pieces;
mod pythonic;
mod reasoning;
mod slips;
mod xml;

use std::sync::Arc;

use kvmesh_output_parser::{
    Calls, Event, Events, Expected, OutputParser, ReasoningFormat, Tool, ToolFormat,
};
use serde_json::json;

/// Two tools, of one of which the types are known.
pub(crate) fn tools() -> Arc<[Tool]> {
    let schema = json!({"type": "object", "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "exact": {"type": "boolean"},
        "near": {"type": ["string", "null"]},
    }});
    [Tool::new("weather", &schema), Tool::new("time", &json!({}))].into()
}

pub(crate) fn native(format: ToolFormat) -> Expected {
    Expected {
        reasoning: None,
        calls: Calls::Native {
            format,
            tools: tools(),
        },
        constrained: false,
    }
}

pub(crate) fn thinking(format: ReasoningFormat) -> Expected {
    Expected {
        reasoning: Some(format),
        calls: Calls::None,
        constrained: false,
    }
}

/// Events of pieces; texts that follow each other joined.
pub(crate) fn parsed<'a>(
    expected: &Expected,
    prompt: &str,
    pieces: impl IntoIterator<Item = &'a str>,
) -> Vec<Event> {
    let mut parser = OutputParser::new(expected, prompt);
    let mut out = Events::default();
    for piece in pieces {
        parser.push(piece, &mut out);
    }
    parser.finish(&mut out);
    out.into_iter().collect()
}

/// The events of a text, which are the same for each way to cut it in two or in
/// characters.
pub(crate) fn events(expected: &Expected, prompt: &str, text: &str) -> Vec<Event> {
    let whole = parsed(expected, prompt, [text]);
    let letters: Vec<&str> = text.split("").collect();
    assert_eq!(parsed(expected, prompt, letters), whole, "{text}");
    for at in (0..text.len()).filter(|at| text.is_char_boundary(*at)) {
        let (first, second) = text.split_at(at);
        assert_eq!(
            parsed(expected, prompt, [first, second]),
            whole,
            "{first}|{second}"
        );
    }
    whole
}

pub(crate) fn content(text: &str) -> Event {
    Event::Content(text.to_owned())
}

pub(crate) fn reasoning(text: &str) -> Event {
    Event::Reasoning(text.to_owned())
}

pub(crate) fn call(name: &str, arguments: &str) -> [Event; 2] {
    let name = name.to_owned();
    [Event::Call { name }, Event::Arguments(arguments.to_owned())]
}

pub(crate) fn calls(all: &[(&str, &str)]) -> Vec<Event> {
    all.iter()
        .flat_map(|(name, arguments)| call(name, arguments))
        .collect()
}
