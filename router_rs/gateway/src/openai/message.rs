//! Messages of a conversation, as clients send them.

use kvmesh_wire::v1;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::RequestError;

/// One message.
#[derive(Debug, Deserialize)]
pub(super) struct Message {
    role: String,
    content: Option<Content>,
    /// What was said instead of it.
    refusal: Option<String>,
    name: Option<String>,
    tool_calls: Option<Vec<Map<String, Value>>>,
    tool_call_id: Option<String>,
    /// By the two names that answers have it under; the first wins.
    reasoning_content: Option<String>,
    reasoning: Option<String>,
}

/// What was said: text, or parts of which each is one.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "text, or a list of parts with a type each")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
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
        let calls = self.tool_calls.unwrap_or_default();
        let content = match self.content {
            None => self.refusal.unwrap_or_default(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => joined(parts, &self.role, at)?,
        };
        Ok(v1::ChatMessage {
            role: self.role,
            content,
            name: self.name.unwrap_or_default(),
            tool_calls_json: calls
                .into_iter()
                .map(|call| Value::Object(call).to_string())
                .collect(),
            tool_call_id: self.tool_call_id.unwrap_or_default(),
            reasoning_content: self
                .reasoning_content
                .or(self.reasoning)
                .unwrap_or_default(),
        })
    }
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
