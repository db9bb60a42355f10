//! Mistral: `[TOOL_CALLS]` before a list of objects, and since its eleventh tokeniser
//! before each name.

use crate::{
    calls::{After, Opening},
    look::{Look, More},
};

pub(crate) const OPEN: &str = "[TOOL_CALLS]";
const ARGUMENTS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";
pub(crate) const MARKS: &[&str] = &[OPEN, ARGUMENTS, CALL_ID];
/// What may be behind the arguments of a call with a name of its own.
pub(crate) const CLOSING: &[&str] = &[OPEN];

pub(crate) fn open(mut look: Look<'_>) -> Result<Opening, More> {
    look.space();
    if look.literal("[")? {
        look.space();
        return Ok(match look.peek()? {
            Some(b'{') => Opening::List(look.at),
            _ => Opening::None,
        });
    }
    let name = look.word()?;
    if name.is_empty() {
        return Ok(Opening::None);
    }
    if look.literal(CALL_ID)? {
        look.word()?;
    }
    let marked = look.literal(ARGUMENTS)?;
    look.space();
    Ok(match marked || look.peek()? == Some(b'{') {
        true => Opening::Arguments(look.at, name.to_owned()),
        false => Opening::None,
    })
}

/// Behind an object of a list.
pub(crate) fn after(mut look: Look<'_>) -> Result<After, More> {
    let begin = look;
    look.space();
    if look.literal("]")? {
        return Ok(After::Content(look.at));
    }
    if !look.literal(",")? {
        return Ok(After::Content(begin.at));
    }
    look.space();
    Ok(match look.peek()? {
        Some(b'{') => After::Object(look.at),
        _ => After::Content(begin.at),
    })
}
