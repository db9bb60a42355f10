//! Calls whose parameters have tags of their own, with values as text: Qwen3-Coder and
//! GLM 4.5.
//!
//! ```text
//! <tool_call>                         <tool_call>NAME
//! <function=NAME>                     <arg_key>KEY</arg_key>
//! <parameter=KEY>                     <arg_value>VALUE</arg_value>
//! VALUE                               </tool_call>
//! </parameter>
//! </function>
//! </tool_call>
//! ```
//!
//! The schema of a tool says what a value is. Those that can only be text are told as they
//! come, others once they are whole.

use crate::{
    calls::{After, Opening},
    event::Events,
    hermes::{CLOSE, OPEN},
    look::{Look, MOST_NAME, More, first, is_space, partial},
    tool::{Tool, Types, named},
    value::{escape, quoted, typed},
};

const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const KEY: &str = "<arg_key>";
const KEY_END: &str = "</arg_key>";
const VALUE: &str = "<arg_value>";
const VALUE_END: &str = "</arg_value>";

pub(crate) const QWEN_OPENING: &[&str] = &[OPEN, FUNCTION];
/// What may be behind arguments that Qwen wrote as JSON.
pub(crate) const QWEN_CLOSING: &[&str] = &[FUNCTION_END, CLOSE];
pub(crate) const QWEN_MARKS: &[&str] = &[OPEN, CLOSE];
pub(crate) const GLM_OPENING: &[&str] = &[OPEN];
pub(crate) const GLM_MARKS: &[&str] = &[OPEN, CLOSE, KEY, KEY_END, VALUE, VALUE_END];

/// How parameters are tagged.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tags {
    /// Before a parameter's name, and behind it.
    key: (&'static str, &'static str),
    /// Before its value; empty: the value follows the name.
    value: &'static str,
    /// What ends a value: its own tag, and those of models that forget it.
    ends: &'static [&'static str],
    /// A value stands on lines of its own.
    lines: bool,
}

const QWEN: Tags = Tags {
    key: ("<parameter=", ">"),
    value: "",
    ends: &["</parameter>", "<parameter=", FUNCTION_END, CLOSE],
    lines: true,
};
const GLM: Tags = Tags {
    key: (KEY, KEY_END),
    value: VALUE,
    ends: &[VALUE_END, CLOSE],
    lines: false,
};

/// Behind one of [`QWEN_OPENING`]. A function without the mark of a call is one if there is
/// a tool of its name.
pub(crate) fn open_qwen(mut look: Look<'_>, mark: &str, tools: &[Tool]) -> Result<Opening, More> {
    if mark == OPEN {
        look.space();
        if !look.literal(FUNCTION)? {
            return Ok(Opening::None);
        }
    }
    let Some(name) = look.until(">", MOST_NAME)? else {
        return Ok(Opening::None);
    };
    let name = name.trim();
    let tool = named(tools, name);
    if !is_name(name) || mark == FUNCTION && tool.is_none() {
        return Ok(Opening::None);
    }
    let begin = look.at;
    look.space();
    Ok(match look.peek()? {
        Some(b'{') => Opening::Arguments(look.at, name.to_owned()),
        _ => Opening::Parameters(begin, Parameters::new(&QWEN, tool, name)),
    })
}

/// Behind one of [`GLM_OPENING`].
pub(crate) fn open_glm(mut look: Look<'_>, tools: &[Tool]) -> Result<Opening, More> {
    look.space();
    let Some(name) = look.before(&['\n', '<'], MOST_NAME)? else {
        return Ok(Opening::None);
    };
    let name = name.trim();
    let begin = look.at;
    look.space();
    let mut end = look;
    let tool = named(tools, name);
    let is_call = look.literal(KEY)? || tool.is_some() && end.literal(CLOSE)?;
    Ok(match is_name(name) && is_call {
        true => Opening::Parameters(begin, Parameters::new(&GLM, tool, name)),
        false => Opening::None,
    })
}

fn is_name(name: &str) -> bool {
    let wrong = |letter: char| letter.is_whitespace() || matches!(letter, '<' | '{' | '"');
    !name.is_empty() && !name.contains(wrong)
}

/// Behind the parameters of a call.
pub(crate) fn after(mut look: Look<'_>) -> Result<After, More> {
    for mark in [FUNCTION_END, CLOSE] {
        let before = look;
        look.space();
        if !look.literal(mark)? {
            look = before;
        }
    }
    Ok(After::Content(look.at))
}

/// How far a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// More of it has to come.
    More,
    /// So many bytes are read.
    Took(usize),
    /// The call ended before this byte.
    Ended(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Between,
    /// Within a value of one of these types, of which so many bytes were looked at.
    Value(Types, usize),
    /// Within a value that is text, of which nothing was told or some.
    Text(bool),
}

/// Reads the parameters of a call.
#[derive(Debug)]
pub(crate) struct Parameters {
    tags: &'static Tags,
    tool: Tool,
    state: State,
    /// There was one.
    any: bool,
}

impl Parameters {
    fn new(tags: &'static Tags, tool: Option<&Tool>, name: &str) -> Self {
        Self {
            tags,
            tool: tool.map_or_else(|| Tool::unknown(name), Tool::clone),
            state: State::Between,
            any: false,
        }
    }

    /// The tool that is called.
    pub(crate) fn name(&self) -> &str {
        self.tool.name()
    }

    /// Reads some of a text that begins with what was not read yet.
    pub(crate) fn step(&mut self, text: &str, ended: bool, out: &mut Events) -> Step {
        let step = match self.state {
            State::Between => self.between(text, out),
            State::Value(types, looked) => Ok(self.value(text, ended, (types, looked), out)),
            State::Text(begun) => Ok(self.text(text, begun, out)),
        };
        match step {
            // What is cut off is told as far as it came: the arguments stay open.
            Ok(Step::More) | Err(More) if ended => Step::Ended(text.len()),
            Ok(step) => step,
            Err(More) => Step::More,
        }
    }

    fn between(&mut self, text: &str, out: &mut Events) -> Result<Step, More> {
        let space = text.bytes().take_while(|byte| is_space(*byte)).count();
        if space > 0 {
            return Ok(Step::Took(space));
        }
        let Some((name, took)) = self.key(text)? else {
            out.arguments(if self.any { "}" } else { "{}" });
            return Ok(Step::Ended(0));
        };
        let types = self.tool.types(name);
        let before = if self.any { ", " } else { "{" };
        out.arguments(&format!("{before}{}: ", quoted(name)));
        self.any = true;
        self.state = State::Value(types, 0);
        if types == Types::STRING {
            out.arguments("\"");
            self.state = State::Text(false);
        }
        Ok(Step::Took(took))
    }

    /// The name of the parameter that comes next, and where its value begins; `None`: no
    /// parameter does.
    fn key<'a>(&self, text: &'a str) -> Result<Option<(&'a str, usize)>, More> {
        // Also at its end: what is cut off is no other thing.
        let mut look = Look::new(text, false);
        let begins = look.literal(self.tags.key.0);
        let mut ends = self.tags.ends.iter();
        let may_end = ends.any(|mark| Look::new(text, false).literal(mark).is_err());
        if !begins? {
            return if may_end { Err(More) } else { Ok(None) };
        }
        let Some(name) = look.until(self.tags.key.1, MOST_NAME)? else {
            return Ok(None);
        };
        if !self.tags.value.is_empty() {
            look.space();
            if !look.literal(self.tags.value)? {
                return Ok(None);
            }
        }
        Ok(Some((name.trim(), look.at)))
    }

    fn value(
        &mut self,
        text: &str,
        ended: bool,
        (types, looked): (Types, usize),
        out: &mut Events,
    ) -> Step {
        let ends = self.tags.ends;
        let Some((at, mark)) = first(&text[looked..], ends) else {
            if ended {
                out.arguments(text[..partial(text, ends)].trim());
            }
            self.state = State::Value(types, partial(text, ends));
            return Step::More;
        };
        let end = looked + at;
        let mut value = &text[..end];
        if self.tags.lines {
            value = value.strip_prefix('\n').unwrap_or(value);
            value = value.strip_suffix('\n').unwrap_or(value);
        }
        out.arguments(&typed(value, types));
        self.ends(end, mark)
    }

    fn text(&mut self, text: &str, begun: bool, out: &mut Events) -> Step {
        if self.tags.lines && !begun {
            if text.is_empty() {
                return Step::More;
            }
            self.state = State::Text(true);
            return Step::Took(usize::from(text.starts_with('\n')));
        }
        let ends = self.tags.ends;
        let found = first(text, ends);
        let mut told = found.map_or_else(|| partial(text, ends), |(at, _)| at);
        if self.tags.lines && text[..told].ends_with('\n') {
            // The format's, if the value ends behind it.
            told -= 1;
        }
        let mut escaped = String::new();
        escape(&text[..told], &mut escaped);
        out.arguments(&escaped);
        match found {
            Some((at, mark)) => {
                out.arguments("\"");
                self.ends(at, mark)
            }
            None if told == 0 => Step::More,
            None => Step::Took(told),
        }
    }

    /// A value ends at this mark.
    fn ends(&mut self, at: usize, mark: &str) -> Step {
        self.state = State::Between;
        let own = self.tags.ends.first() == Some(&mark);
        Step::Took(at + if own { mark.len() } else { 0 })
    }
}
