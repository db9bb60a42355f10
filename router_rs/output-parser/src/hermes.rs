//! `<tool_call>` around an object: Hermes, Qwen 2.5 and 3, and those that learnt of them.
//! Small models put several objects between two tags, with or without a list around them,
//! and close more braces than they opened.

use crate::{
    calls::{After, Opening},
    look::{Look, More},
};

pub(crate) const OPEN: &str = "<tool_call>";
pub(crate) const CLOSE: &str = "</tool_call>";

/// Most braces too many that are taken for a slip.
const MOST_BRACES: usize = 4;

pub(crate) fn open(mut look: Look<'_>) -> Result<Opening, More> {
    look.space();
    let list = look.literal("[")?;
    look.space();
    Ok(match look.peek()? {
        Some(b'{') if list => Opening::List(look.at),
        Some(b'{') => Opening::Object(look.at),
        _ => Opening::None,
    })
}

/// Behind an object, of a list or not.
pub(crate) fn after(mut look: Look<'_>, list: bool) -> Result<After, More> {
    look.space();
    let mut next = look;
    if next.literal(",")? {
        next.space();
    }
    if next.peek()? == Some(b'{') {
        return Ok(After::Object(next.at));
    }
    let mut end = look;
    for _ in 0..MOST_BRACES {
        if !end.literal("}")? {
            break;
        }
        end.space();
    }
    if list && end.literal("]")? {
        look = end;
        end.space();
    }
    let closed = end.literal(CLOSE)? || end.peek()?.is_none();
    Ok(After::Content(if closed { end.at } else { look.at }))
}
