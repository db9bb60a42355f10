//! Reasoning between two marks at the beginning of an output.

use crate::{
    event::Events,
    format::ReasoningFormat,
    look::{Look, consume, is_space, partial, space_before},
    value::is_json,
};

/// Longest number that may be all of an output, bytes.
const MOST_SCALAR: usize = 1 << 10;

/// Finds reasoning before the content.
#[derive(Debug)]
pub(crate) struct Think {
    open: &'static str,
    close: &'static str,
    state: State,
    /// Output that is not told.
    held: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but white space has come. `opened`: the prompt ends within reasoning,
    /// unless a grammar has the output begin with JSON.
    Begin {
        opened: bool,
        constrained: bool,
    },
    Reasoning,
    /// White space between reasoning and content.
    Gap,
    Content,
}

impl Think {
    /// `None`: a format that is not read here.
    pub(crate) fn new(
        format: ReasoningFormat,
        prompt_end: &str,
        constrained: bool,
    ) -> Option<Self> {
        let (open, close) = format.around()?;
        let opened = prompt_end.trim_end().ends_with(open);
        let state = State::Begin {
            opened,
            constrained,
        };
        let held = String::new();
        Some(Self {
            open,
            close,
            state,
            held,
        })
    }

    pub(crate) fn push(&mut self, text: &str, out: &mut Events) {
        if self.state == State::Content {
            return out.content(text);
        }
        self.held.push_str(text);
        self.read(false, out);
    }

    pub(crate) fn finish(&mut self, out: &mut Events) {
        self.read(true, out);
    }

    fn read(&mut self, ended: bool, out: &mut Events) {
        let mut held = std::mem::take(&mut self.held);
        consume(&mut held, |text| self.step(text, ended, out));
        self.held = held;
    }

    /// Takes some bytes; `None`: more have to come, or none are left.
    fn step(&mut self, text: &str, ended: bool, out: &mut Events) -> Option<usize> {
        match self.state {
            State::Begin {
                opened,
                constrained,
            } => self.begin(text, ended, opened, constrained),
            State::Reasoning => {
                let found = text.find(self.close);
                let end = found.unwrap_or_else(|| match ended {
                    true => text.len(),
                    false => partial(text, &[self.close]),
                });
                // White space before the mark is the format's.
                let told = match found.is_none() && ended {
                    true => end,
                    false => space_before(text, end),
                };
                out.reasoning(&text[..told]);
                match found {
                    Some(_) => {
                        self.state = State::Gap;
                        Some(end + self.close.len())
                    }
                    None => (told > 0).then_some(told),
                }
            }
            State::Gap => {
                let space = text.bytes().take_while(|byte| is_space(*byte)).count();
                if space < text.len() {
                    self.state = State::Content;
                    return Some(space);
                }
                (space > 0).then_some(space)
            }
            State::Content => {
                out.content(text);
                (!text.is_empty()).then_some(text.len())
            }
        }
    }

    fn begin(&mut self, text: &str, ended: bool, opened: bool, constrained: bool) -> Option<usize> {
        let mut look = Look::new(text, ended);
        look.space();
        let first = look.peek().ok()?;
        if look.literal(self.open).ok()? {
            look.space();
            // White space behind the mark may go on: so much of it is the format's.
            look.peek().ok()?;
            self.state = State::Reasoning;
            return Some(look.at);
        }
        let json = constrained && opened && begins_json(look)?;
        if opened && !json && first.is_some() {
            self.state = State::Reasoning;
            return Some(look.at);
        }
        self.state = State::Content;
        Some(0)
    }
}

/// Whether an output that a grammar holds begins with JSON. A number or a word is the whole
/// of it: a thought may begin with one, too. `None`: more has to come.
fn begins_json(mut look: Look<'_>) -> Option<bool> {
    let first = look.peek().ok()?;
    if matches!(first, Some(b'{' | b'[' | b'"')) {
        return Some(true);
    }
    let part = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.');
    let length = look
        .rest()
        .bytes()
        .take(MOST_SCALAR)
        .take_while(part)
        .count();
    let scalar = &look.rest()[..length];
    look.at += length;
    look.space();
    let alone = look.peek().ok()?.is_none();
    Some(alone && is_json(scalar))
}
