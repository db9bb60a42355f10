//! What is found in an output.

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
pub struct Events(Vec<Event>);

impl Events {
    pub(crate) fn content(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Event::Content(before)) => before.push_str(text),
            _ => self.0.push(Event::Content(text.to_owned())),
        }
    }

    pub(crate) fn reasoning(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Event::Reasoning(before)) => before.push_str(text),
            _ => self.0.push(Event::Reasoning(text.to_owned())),
        }
    }

    pub(crate) fn call(&mut self, name: String) {
        self.0.push(Event::Call { name });
    }

    pub(crate) fn arguments(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(Event::Arguments(before)) => before.push_str(text),
            _ => self.0.push(Event::Arguments(text.to_owned())),
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

    /// Takes them out, in order.
    pub fn drain(&mut self) -> std::vec::Drain<'_, Event> {
        self.0.drain(..)
    }

    /// The events.
    #[must_use]
    pub fn as_slice(&self) -> &[Event] {
        &self.0
    }
}

impl IntoIterator for Events {
    type Item = Event;
    type IntoIter = std::vec::IntoIter<Event>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
