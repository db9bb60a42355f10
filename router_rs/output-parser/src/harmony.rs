//! The messages of gpt-oss (<https://github.com/openai/harmony>): a header with channel and
//! recipient, a body, a mark behind it.

use std::sync::Arc;

use crate::{
    event::Events,
    look::{Look, More, consume, first, is_space, partial},
    tool::{Tool, named},
};

const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
const CONSTRAIN: &str = "<|constrain|>";
const END: &str = "<|end|>";
const CALL: &str = "<|call|>";
const RETURN: &str = "<|return|>";
/// A header may begin with its recipient: the prompt has named the speaker.
const RECIPIENT: &str = " to=";
pub(crate) const MARKS: &[&str] = &[START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN];
const HEADERS: &[&str] = &[START, CHANNEL];
const BODY_ENDS: &[&str] = &[END, CALL, RETURN, START, CHANNEL];

/// Longest header, bytes.
const MOST_HEADER: usize = 1 << 10;

/// ```text
/// Begin ─▶ Header ─▶ Body ─▶ Between ─▶ Header
///    └──▶ Plain ──▲    └──────────────▲    (text without a header)
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Begin,
    Header,
    Body(Body),
    Between,
    Plain,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Body {
    Reasoning,
    Content,
    /// Whether anything of the arguments has come.
    Call(bool),
}

/// Reads messages.
#[derive(Debug)]
pub(crate) struct Harmony {
    /// Where calls are to be found: the tools that there are.
    calls: Option<Arc<[Tool]>>,
    /// Whether reasoning is to be found.
    reasoning: bool,
    state: State,
    /// Output that is not told.
    held: String,
}

impl Harmony {
    pub(crate) fn new(calls: Option<Arc<[Tool]>>, reasoning: bool) -> Self {
        Self {
            calls,
            reasoning,
            state: State::Begin,
            held: String::new(),
        }
    }

    pub(crate) fn push(&mut self, text: &str, out: &mut Events) {
        self.held.push_str(text);
        self.read(false, out);
    }

    pub(crate) fn finish(&mut self, out: &mut Events) {
        self.read(true, out);
        if self.state == State::Body(Body::Call(false)) {
            self.body_ends(out);
        }
    }

    fn read(&mut self, ended: bool, out: &mut Events) {
        let mut held = std::mem::take(&mut self.held);
        consume(&mut held, |text| self.step(text, ended, out));
        self.held = held;
    }

    /// Takes some bytes, or goes on to another state; `None`: more have to come.
    fn step(&mut self, text: &str, ended: bool, out: &mut Events) -> Option<usize> {
        match &self.state {
            State::Begin => {
                let begins = begins(text, ended, &[START, CHANNEL, RECIPIENT]).ok()?;
                self.state = if begins { State::Header } else { State::Plain };
                Some(0)
            }
            State::Header => self.header(text, ended, out),
            State::Body(_) => self.body(text, ended, out),
            State::Between => {
                let space = text.bytes().take_while(|byte| is_space(*byte)).count();
                if space > 0 {
                    return Some(space);
                }
                if text.is_empty() {
                    return None;
                }
                let begins = begins(text, ended, HEADERS).ok()?;
                self.state = if begins { State::Header } else { State::Plain };
                Some(0)
            }
            State::Plain => {
                let found = first(text, HEADERS);
                let told = match found {
                    Some((at, _)) => at,
                    None if ended => text.len(),
                    None => partial(text, HEADERS),
                };
                out.content(&text[..told]);
                if found.is_some() {
                    self.state = State::Header;
                    return Some(told);
                }
                (told > 0).then_some(told)
            }
        }
    }

    fn header(&mut self, text: &str, ended: bool, out: &mut Events) -> Option<usize> {
        let mut look = Look::new(text, ended);
        let header = look.until(MESSAGE, MOST_HEADER).ok()?;
        if header.is_none() && ended && is_cut_off(text) {
            self.state = State::Between;
            return Some(text.len());
        }
        let broken = |header: &str| first(header, &[END, CALL, RETURN]).is_some();
        let Some(header) = header.filter(|header| !broken(header)) else {
            // No header: what it began with is content, and there may be one behind it.
            let marks = [START, CHANNEL, RECIPIENT];
            let mark = marks.iter().find(|mark| text.starts_with(**mark));
            let told = mark.map_or(0, |mark| mark.len());
            out.content(&text[..told]);
            self.state = State::Plain;
            return Some(told);
        };
        let called = self.calls.as_ref().and_then(|tools| called(header, tools));
        let body = match called {
            Some(name) => {
                out.call(name.to_owned());
                Body::Call(false)
            }
            None if channel(header) == "analysis" && self.reasoning => Body::Reasoning,
            None => Body::Content,
        };
        self.state = State::Body(body);
        Some(look.at)
    }

    fn body(&mut self, text: &str, ended: bool, out: &mut Events) -> Option<usize> {
        let found = first(text, BODY_ENDS);
        let told = match found {
            Some((at, _)) => at,
            None if ended => text.len(),
            None => partial(text, BODY_ENDS),
        };
        if told > 0
            && let State::Body(body) = &mut self.state
        {
            match body {
                Body::Reasoning => out.reasoning(&text[..told]),
                Body::Content => out.content(&text[..told]),
                Body::Call(any) => {
                    *any = true;
                    out.arguments(&text[..told]);
                }
            }
        }
        let Some((at, mark)) = found else {
            return (told > 0).then_some(told);
        };
        self.body_ends(out);
        if HEADERS.contains(&mark) {
            self.state = State::Header;
            return Some(at);
        }
        self.state = State::Between;
        Some(at + mark.len())
    }

    fn body_ends(&mut self, out: &mut Events) {
        if self.state == State::Body(Body::Call(false)) {
            out.arguments("{}");
        }
        self.state = State::Between;
    }
}

/// Whether a chat template is written for these messages.
pub(crate) fn is_in(template: &str) -> bool {
    template.contains(CHANNEL) && template.contains(MESSAGE)
}

/// Whether a text begins with one of these.
fn begins(text: &str, ended: bool, marks: &[&str]) -> Result<bool, More> {
    let mut more = false;
    for mark in marks {
        match Look::new(text, ended).literal(mark) {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            Err(More) => more = true,
        }
    }
    if more { Err(More) } else { Ok(false) }
}

/// The word behind this text in a header.
fn word_behind<'a>(header: &'a str, before: &str) -> Option<&'a str> {
    let (_, rest) = header.split_once(before)?;
    let end = rest.find(|c: char| c.is_whitespace() || c == '<');
    Some(&rest[..end.unwrap_or(rest.len())])
}

fn channel(header: &str) -> &str {
    word_behind(header, CHANNEL).unwrap_or_default()
}

/// The function that a message is for. Where a model leaves out that it is one, it is that of
/// a tool that there is.
fn called<'a>(header: &'a str, tools: &[Tool]) -> Option<&'a str> {
    let recipient = word_behind(header, "to=")?;
    match recipient.strip_prefix("functions.") {
        Some(name) => Some(name).filter(|name| !name.is_empty()),
        None => Some(recipient).filter(|name| named(tools, name).is_some()),
    }
}

/// Whether an output that ends without the body of this message ends within its header,
/// which is nothing to tell. A mark has to be there: words alone may be anything.
fn is_cut_off(header: &str) -> bool {
    let marked = header.starts_with(START) || header.contains(CHANNEL);
    let within = first(header, &[END, CALL, RETURN]).is_none();
    marked && within && header.len() <= MOST_HEADER
}
