//! A conversation as the model's template sees it.

use crate::error::{JsonError, cut};
use serde_json::{Map, Value};

/// A conversation to render.
#[derive(Debug, Clone, PartialEq)]
pub struct Chat {
    /// The messages, oldest first.
    pub messages: Vec<Message>,
    /// Whether the template opens the assistant's turn.
    pub add_generation_prompt: bool,
    /// Tools offered to the model, each an object of the OpenAI `tools` form.
    pub tools: Vec<Map<String, Value>>,
    /// Extra variables for the template. They cannot replace `messages`,
    /// `tools` and `add_generation_prompt`.
    pub arguments: Map<String, Value>,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Message {
    /// Who speaks.
    pub role: String,
    /// What was said.
    pub content: String,
    /// Name of the speaker or tool.
    pub name: Option<String>,
    /// Calls that the assistant made, each an object of the OpenAI
    /// `tool_calls` form.
    pub tool_calls: Vec<Map<String, Value>>,
    /// Which call this answers.
    pub tool_call_id: Option<String>,
    /// What the assistant thought before it said this.
    pub reasoning_content: Option<String>,
}

impl Chat {
    /// A conversation without tools that opens the assistant's turn.
    pub fn new(messages: Vec<Message>) -> Self {
        Self {
            messages,
            add_generation_prompt: true,
            tools: Vec::new(),
            arguments: Map::new(),
        }
    }

    /// Adds a tool from its JSON text.
    ///
    /// # Errors
    /// [`JsonError`] where the text is not a JSON object.
    pub fn add_tool(&mut self, json: &str) -> Result<(), JsonError> {
        self.tools.push(object(json)?);
        Ok(())
    }

    /// Sets the extra variables from JSON text. Empty text means none.
    ///
    /// # Errors
    /// [`JsonError`] where the text is not a JSON object.
    pub fn set_arguments(&mut self, json: &str) -> Result<(), JsonError> {
        self.arguments = if json.is_empty() {
            Map::new()
        } else {
            object(json)?
        };
        Ok(())
    }
}

impl Message {
    /// A message of plain text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            ..Self::default()
        }
    }

    /// Adds a tool call from its JSON text. Its arguments may be an object, or the JSON text of
    /// one, as clients of the OpenAI form send them: the template gets what it takes.
    ///
    /// # Errors
    /// [`JsonError`] where the text is not a JSON object.
    pub fn add_tool_call(&mut self, json: &str) -> Result<(), JsonError> {
        self.tool_calls.push(object(json)?);
        Ok(())
    }
}

fn object(json: &str) -> Result<Map<String, Value>, JsonError> {
    match serde_json::from_str(json) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(JsonError::NotAnObject),
        Err(error) => Err(JsonError::Syntax(cut(error.to_string()))),
    }
}
