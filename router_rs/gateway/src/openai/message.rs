//! Messages of a conversation, as clients send them.

use std::fmt;

use kvmesh_wire::v1;
use serde::{
    Deserialize,
    de::{Deserializer, Error, IgnoredAny, SeqAccess, Visitor, value::SeqAccessDeserializer},
};
use serde_json::value::RawValue;

use crate::error::RequestError;

/// One message.
#[derive(Debug, Deserialize)]
pub(super) struct Message {
    role: String,
    content: Option<Content>,
    /// What was said instead of it.
    refusal: Option<String>,
    name: Option<String>,
    tool_calls: Option<Vec<Box<RawValue>>>,
    tool_call_id: Option<String>,
    /// By the two names that answers have it under; the first wins.
    reasoning_content: Option<String>,
    reasoning: Option<String>,
    /// Older clients' word for a tool call.
    function_call: Option<IgnoredAny>,
    /// What was said aloud.
    audio: Option<IgnoredAny>,
}

/// What was said: text, or parts of which each is one.
#[derive(Debug)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(ContentVisitor)
    }
}

/// Reads parts as they come: what nobody knows of them is skipped.
struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text, or a list of parts with a type each")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content::Text(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Content, E> {
        Ok(Content::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Content, A::Error> {
        Deserialize::deserialize(SeqAccessDeserializer::new(list)).map(Content::Parts)
    }
}

#[derive(Debug, Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
    refusal: Option<String>,
}

impl Message {
    /// The message as gRPC has it; `at` is its place in the conversation.
    fn into_wire(self, at: usize) -> Result<v1::ChatMessage, RequestError> {
        for (said, name, words) in [
            (
                &self.function_call,
                "function_call",
                "tool_calls have its place",
            ),
            (&self.audio, "audio", "messages are text"),
        ] {
            if said.is_some() {
                return Err(RequestError::Unsupported {
                    field: format!("messages[{at}].{name}"),
                    words: words.to_owned(),
                });
            }
        }
        let calls = self.tool_calls.unwrap_or_default().into_iter();
        let calls = calls
            .enumerate()
            .map(|(call, json)| match is_object(&json) {
                true => Ok(String::from(Box::<str>::from(json))),
                false => {
                    let field = format!("messages[{at}].tool_calls[{call}]");
                    Err(RequestError::invalid(field, "a JSON object"))
                }
            });
        let content = match self.content {
            None => self.refusal.unwrap_or_default(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => joined(parts, &self.role, at)?,
        };
        Ok(v1::ChatMessage {
            role: self.role,
            content,
            name: self.name.unwrap_or_default(),
            tool_calls_json: calls.collect::<Result<_, _>>()?,
            tool_call_id: self.tool_call_id.unwrap_or_default(),
            reasoning_content: self
                .reasoning_content
                .or(self.reasoning)
                .unwrap_or_default(),
        })
    }
}

/// Whether a JSON text is one of an object.
pub(super) fn is_object(json: &RawValue) -> bool {
    json.get().starts_with('{')
}

/// Parts as one text, a line break between two: templates take text. What an assistant refused
/// in words is text, too.
fn joined(parts: Vec<Part>, role: &str, at: usize) -> Result<String, RequestError> {
    let mut whole = String::new();
    for (number, part) in parts.into_iter().enumerate() {
        let field = |name| format!("messages[{at}].content[{number}].{name}");
        let (name, text) = match part.r#type.as_str() {
            "text" => ("text", part.text),
            "refusal" if role == "assistant" => ("refusal", part.refusal),
            _ => {
                return Err(RequestError::Unsupported {
                    field: field("type"),
                    words: "only parts of type \"text\"".to_owned(),
                });
            }
        };
        let Some(text) = text else {
            return Err(RequestError::invalid(field(name), "required"));
        };
        if number > 0 {
            whole.push('\n');
        }
        whole.push_str(&text);
    }
    Ok(whole)
}

/// A conversation as gRPC has it, without what its template is told besides.
pub(super) fn chat(messages: Vec<Message>) -> Result<v1::Chat, RequestError> {
    let messages = messages.into_iter().enumerate();
    let messages: Result<_, _> = messages
        .map(|(at, message)| message.into_wire(at))
        .collect();
    Ok(v1::Chat {
        messages: messages?,
        ..v1::Chat::default()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::cell::Cell;

    use serde::de::value::SeqDeserializer;
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_said_is_read_part_by_part() {
        let read = |body: &str| serde_json::from_str::<Content>(body);
        assert!(matches!(read("\"a\\n\"").unwrap(), Content::Text(text) if text == "a\n"));
        let parts = r#"[{"text": "b", "type": "text", "new": {"deep": [1]}}, {"type": "x"}]"#;
        let Content::Parts(parts) = read(parts).unwrap() else {
            panic!("parts");
        };
        assert_eq!(
            (parts[0].text.as_deref(), parts[1].r#type.as_str()),
            (Some("b"), "x")
        );
        for wrong in [
            "7",
            "{}",
            "true",
            "[7]",
            "[{\"text\": \"no type\"}]",
            "[{\"type\": 1}]",
        ] {
            assert!(read(wrong).unwrap_err().is_data(), "{wrong}");
        }
        // It ends at the first that is none, and nothing behind it was kept until then.
        let seen = Cell::new(0);
        let list = (0..1_000_000).map(|_| {
            seen.set(seen.get() + 1);
            json!({"text": "no type"})
        });
        let list = SeqDeserializer::<_, serde_json::Error>::new(list);
        assert!(Content::deserialize(list).is_err());
        assert_eq!(seen.get(), 1);
    }
}
