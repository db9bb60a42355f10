//! What is found in an output.

use crate::{
    json::{Nested, Within},
    look::is_space,
};

/// A part of an output, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// What the model thought before it answered.
    Reasoning(String),
    /// The answer.
    Content(String),
    /// A call begins.
    Call {
        /// The tool.
        name: String,
    },
    /// More of the arguments of the call that began last, as they were written.
    Arguments(String),
}

/// Events in order; texts of one kind that follow each other are one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Events {
    told: Vec<Event>,
    /// The call that began last, also of events that were taken out.
    call: Extent,
}

/// How far the arguments of a call have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Extent {
    /// There is no call, or all of them are told.
    #[default]
    Whole,
    /// Nothing of them.
    Begun,
    /// Some of them, which are JSON.
    Json(Nested),
    /// Some of them, of which nobody knows where they end.
    Bare,
}

impl Extent {
    fn take(&mut self, text: &str) {
        for byte in text.bytes() {
            match self {
                Self::Begun if is_space(byte) => continue,
                Self::Begun if !matches!(byte, b'{' | b'[' | b'"') => *self = Self::Bare,
                Self::Begun => *self = Self::Json(Nested::default()),
                _ => {}
            }
            let Self::Json(nested) = self else { return };
            if nested.take(byte) == Within::Last {
                *self = Self::Whole;
                return;
            }
        }
    }
}

impl Events {
    pub(crate) fn content(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        self.call = Extent::Whole;
        match self.told.last_mut() {
            Some(Event::Content(before)) => before.push_str(text),
            _ => self.told.push(Event::Content(text.to_owned())),
        }
    }

    pub(crate) fn reasoning(&mut self, text: &str) {
        match self.told.last_mut() {
            _ if text.is_empty() => {}
            Some(Event::Reasoning(before)) => before.push_str(text),
            _ => self.told.push(Event::Reasoning(text.to_owned())),
        }
    }

    pub(crate) fn call(&mut self, name: String) {
        self.call = Extent::Begun;
        self.told.push(Event::Call { name });
    }

    pub(crate) fn arguments(&mut self, text: &str) {
        self.call.take(text);
        match self.told.last_mut() {
            _ if text.is_empty() => {}
            Some(Event::Arguments(before)) => before.push_str(text),
            _ => self.told.push(Event::Arguments(text.to_owned())),
        }
    }

    pub(crate) fn add(&mut self, event: Event) {
        match event {
            Event::Reasoning(text) => self.reasoning(&text),
            Event::Content(text) => self.content(&text),
            Event::Call { name } => self.call(name),
            Event::Arguments(text) => self.arguments(&text),
        }
    }

    /// Whether the arguments of the last call have not come to their end.
    #[must_use]
    pub fn within_call(&self) -> bool {
        self.call != Extent::Whole
    }

    /// Takes them out, in order.
    pub fn drain(&mut self) -> std::vec::Drain<'_, Event> {
        self.told.drain(..)
    }

    /// The events.
    #[must_use]
    pub fn as_slice(&self) -> &[Event] {
        &self.told
    }
}

impl IntoIterator for Events {
    type Item = Event;
    type IntoIter = std::vec::IntoIter<Event>;

    fn into_iter(self) -> Self::IntoIter {
        self.told.into_iter()
    }
}
