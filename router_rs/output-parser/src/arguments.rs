//! Arguments of a call whose name is known already.

use crate::{
    event::Events,
    json::{Nested, Within},
    look::is_space,
    object::Progress,
};

/// Reads arguments at the beginning of a text that grows, and tells of them at once.
#[derive(Clone, Debug)]
pub(crate) struct Arguments {
    nested: Nested,
    /// Bytes that were looked at.
    at: usize,
    /// Bytes that were told, or are white space before the first.
    told: usize,
    begun: bool,
    /// They are no JSON: a mark alone ends them.
    bare: bool,
    /// What ends them wherever it is no part of a string.
    closing: &'static [&'static str],
}

impl Arguments {
    pub(crate) fn new(closing: &'static [&'static str]) -> Self {
        Self {
            nested: Nested::default(),
            at: 0,
            told: 0,
            begun: false,
            bare: false,
            closing,
        }
    }

    /// How many bytes at their beginning nobody looks at any more; they are to be taken
    /// off.
    pub(crate) fn cut(&mut self) -> usize {
        let cut = std::mem::take(&mut self.told);
        self.at -= cut;
        cut
    }

    /// Looks at what has come of them. `text` begins with them, less what was cut.
    pub(crate) fn read(&mut self, text: &str, ended: bool, out: &mut Events) -> Progress {
        let progress = match self.look(text, ended) {
            Progress::More if ended => Progress::Call(text.len()),
            progress => progress,
        };
        let end = match progress {
            Progress::Call(end) => end,
            _ => self.at,
        };
        out.arguments(&text[self.told..end]);
        self.told = end;
        if progress != Progress::More && !self.begun {
            out.arguments("{}");
        }
        progress
    }

    fn look(&mut self, text: &str, ended: bool) -> Progress {
        while let Some(byte) = text.as_bytes().get(self.at) {
            // Marks begin with ASCII.
            if byte.is_ascii() && !self.nested.in_string() {
                let rest = &text[self.at..];
                if self.closing.iter().any(|mark| rest.starts_with(mark)) {
                    return Progress::Call(self.at);
                }
                if !ended && self.closing.iter().any(|mark| mark.starts_with(rest)) {
                    return Progress::More;
                }
            }
            self.at += 1;
            if !self.begun {
                if is_space(*byte) {
                    self.told = self.at;
                    continue;
                }
                self.begun = true;
                self.bare = !matches!(byte, b'{' | b'[' | b'"');
            }
            if !self.bare && self.nested.take(*byte) == Within::Last {
                return Progress::Call(self.at);
            }
        }
        Progress::More
    }
}
