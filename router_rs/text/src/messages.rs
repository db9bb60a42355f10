//! Messages in the form that a model's templates take.
//!
//! Clients send the arguments of a call as JSON text (OpenAI's form). Most templates want them
//! as a mapping; those of DeepSeek append them to other text as they came, and some of them
//! look for calls only where a message has no content at all. Which form a model's templates
//! take is found out by trying.

use crate::chat::{Chat, Message};
use crate::json::{Style, from_json, mapping, to_json};
use minijinja::{Error, Value};
use serde_json::{Map, Value as Json, json};

/// How templates take the calls of earlier turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Form {
    /// Arguments are JSON text, not a mapping.
    text: bool,
    /// A message that calls and says nothing has `none` for its content, not an empty text.
    silent: bool,
}

/// What the calls of a probe have among their arguments, and nothing else has.
const PROBE: &str = "kvmesh asks";

impl Form {
    /// All of them, the usual one first.
    const ALL: [Self; 4] = [
        Self {
            text: false,
            silent: false,
        },
        Self {
            text: true,
            silent: false,
        },
        Self {
            text: false,
            silent: true,
        },
        Self {
            text: true,
            silent: true,
        },
    ];

    /// The first form in which a prompt tells of a call; the usual one where none does.
    pub(crate) fn found(render: impl Fn(&Chat, Self) -> Option<String>) -> Self {
        let chat = probe();
        Self::ALL
            .into_iter()
            .find(|form| render(&chat, *form).is_some_and(|text| text.contains(PROBE)))
            .unwrap_or_default()
    }

    /// A message as a template's variable.
    pub(crate) fn message(self, message: &Message) -> Result<Value, Error> {
        let silent = self.silent && message.content.is_empty() && !message.tool_calls.is_empty();
        let content = match silent {
            true => Value::from(()),
            false => Value::from(message.content.as_str()),
        };
        let mut fields: Vec<(&str, Value)> = vec![
            ("role", Value::from(message.role.as_str())),
            ("content", content),
        ];
        if let Some(name) = &message.name {
            fields.push(("name", Value::from(name.as_str())));
        }
        if !message.tool_calls.is_empty() {
            let calls = message.tool_calls.iter().map(|call| self.call(call));
            fields.push(("tool_calls", calls.collect::<Result<Value, Error>>()?));
        }
        if let Some(id) = &message.tool_call_id {
            fields.push(("tool_call_id", Value::from(id.as_str())));
        }
        if let Some(thoughts) = &message.reasoning_content {
            fields.push(("reasoning_content", Value::from(thoughts.as_str())));
        }
        Ok(mapping(fields))
    }

    fn call(self, call: &Map<String, Json>) -> Result<Value, Error> {
        with(call, "function", |function| match function {
            Json::Object(function) => with(function, "arguments", |given| self.arguments(given)),
            other => Ok(from_json(other)),
        })
    }

    /// What is neither an object nor the text of one stays what it is.
    fn arguments(self, given: &Json) -> Result<Value, Error> {
        match given {
            Json::Object(_) if self.text => {
                to_json(&from_json(given), &Style::new(None)).map(Value::from)
            }
            Json::String(text) if !self.text => Ok(match serde_json::from_str(text) {
                Ok(parsed @ Json::Object(_)) => from_json(&parsed),
                _ => from_json(given),
            }),
            _ => Ok(from_json(given)),
        }
    }
}

/// A template's mapping from a JSON object of which one member is made otherwise.
fn with(
    object: &Map<String, Json>,
    member: &str,
    make: impl Fn(&Json) -> Result<Value, Error>,
) -> Result<Value, Error> {
    let mut entries = Vec::with_capacity(object.len());
    for (key, value) in object {
        let value = match key == member {
            true => make(value)?,
            false => from_json(value),
        };
        entries.push((key.as_str(), value));
    }
    Ok(mapping(entries))
}

/// A conversation with a call. Its id is one that Mistral's templates take, too.
fn probe() -> Chat {
    let id = "kvmesh000";
    let object = |value: Json| match value {
        Json::Object(object) => object,
        _ => Map::new(),
    };
    let call = json!({"id": id, "type": "function",
        "function": {"name": "ask", "arguments": {"by": PROBE}}});
    let tool = json!({"type": "function", "function": {"name": "ask", "description": "asks",
        "parameters": {"type": "object", "properties": {"by": {"type": "string"}}}}});
    let calling = Message {
        tool_calls: vec![object(call)],
        ..Message::new("assistant", "")
    };
    let answer = Message {
        tool_call_id: Some(id.to_owned()),
        name: Some("ask".to_owned()),
        ..Message::new("tool", "yes")
    };
    Chat {
        tools: vec![object(tool)],
        ..Chat::new(vec![Message::new("user", "ask"), calling, answer])
    }
}
