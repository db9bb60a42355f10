//! The answer is a list of calls as Python has them: Llama 3.2 and 4.
//!
//! `[weather(city="Paris", days=2), time()]`, maybe behind `<|python_start|>`.

use crate::{
    calls::{After, Opening},
    event::Events,
    look::{Look, More},
    python,
    tool::{Tool, named},
    xml::Step,
};

const START: &str = "<|python_start|>";
const END: &str = "<|python_end|>";
const TAG: &str = "<|python_tag|>";
pub(crate) const MARKS: &[&str] = &[START, END, TAG];
pub(crate) const OPENING: &[&str] = &[START, TAG];

/// A list of calls. Nothing marks one, so that its first has to be of a tool that there is.
pub(crate) fn open(mut look: Look<'_>, tools: &[Tool]) -> Result<Opening, More> {
    look.space();
    if !look.literal("[")? {
        return Ok(Opening::None);
    }
    Ok(match call(&mut look, tools)? {
        Some(name) => Opening::Python(look.at, name.to_owned()),
        None => Opening::None,
    })
}

/// The name of a call, up to its bracket.
fn call<'a>(look: &mut Look<'a>, tools: &[Tool]) -> Result<Option<&'a str>, More> {
    look.space();
    let name = look.word()?;
    look.space();
    let is_call = look.literal("(")?;
    Ok(Some(name).filter(|name| is_call && named(tools, name).is_some()))
}

/// Behind a call.
pub(crate) fn after(mut look: Look<'_>, tools: &[Tool]) -> Result<After, More> {
    let begin = look;
    look.space();
    if look.literal("]")? {
        let end = look;
        look.space();
        return Ok(After::Content(match look.literal(END)? {
            true => look.at,
            false => end.at,
        }));
    }
    let next = match look.literal(",")? {
        true => call(&mut look, tools)?,
        false => None,
    };
    Ok(match next {
        Some(name) => After::Python(look.at, name.to_owned()),
        None => After::Content(begin.at),
    })
}

/// Where a text is in strings of Python.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Quoted {
    #[default]
    No,
    /// A quote has come, or two.
    Begun(u8, u8),
    /// Within one of these.
    Single(u8),
    /// Within three of these; so many of them have come that may end it.
    Triple(u8, u8),
    /// Behind a backslash within one, or three.
    Escaped(u8, bool),
}

/// Reads the arguments of a call, which are told once they are whole.
#[derive(Debug, Default)]
pub(crate) struct PythonArguments {
    /// Bytes that were looked at.
    looked: usize,
    depth: u32,
    quoted: Quoted,
}

impl PythonArguments {
    /// Reads a text that begins behind the call's bracket.
    pub(crate) fn step(&mut self, text: &str, ended: bool, out: &mut Events) -> Step {
        for byte in &text.as_bytes()[self.looked..] {
            if self.closes(*byte) {
                let (written, behind) = (&text[..self.looked], self.looked + 1);
                // What is no Python is passed on as it is.
                let read = python::arguments(written);
                out.arguments(read.as_deref().unwrap_or(written));
                return Step::Ended(behind);
            }
            self.looked += 1;
        }
        if ended {
            out.arguments(text);
            return Step::Ended(text.len());
        }
        Step::More
    }

    /// Whether this byte closes the call's bracket.
    fn closes(&mut self, byte: u8) -> bool {
        match self.quoted {
            Quoted::Begun(quote, 1) if byte == quote => self.quoted = Quoted::Begun(quote, 2),
            Quoted::Begun(quote, 2) if byte == quote => self.quoted = Quoted::Triple(quote, 0),
            Quoted::Begun(quote, 1) | Quoted::Single(quote) => {
                self.quoted = match byte {
                    b'\\' => Quoted::Escaped(quote, false),
                    byte if byte == quote => Quoted::No,
                    _ => Quoted::Single(quote),
                };
            }
            Quoted::Triple(quote, ends) => {
                self.quoted = match byte {
                    b'\\' => Quoted::Escaped(quote, true),
                    byte if byte == quote && ends == 2 => Quoted::No,
                    byte if byte == quote => Quoted::Triple(quote, ends + 1),
                    _ => Quoted::Triple(quote, 0),
                };
            }
            Quoted::Escaped(quote, triple) => {
                self.quoted = match triple {
                    true => Quoted::Triple(quote, 0),
                    false => Quoted::Single(quote),
                };
            }
            // Two quotes are an empty string: this byte is behind it.
            Quoted::No | Quoted::Begun(..) => return self.plain(byte),
        }
        false
    }

    fn plain(&mut self, byte: u8) -> bool {
        self.quoted = Quoted::No;
        match byte {
            b'"' | b'\'' => self.quoted = Quoted::Begun(byte, 1),
            b'(' | b'[' | b'{' => self.depth = self.depth.saturating_add(1),
            b')' if self.depth == 0 => return true,
            b')' | b']' | b'}' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        false
    }
}
