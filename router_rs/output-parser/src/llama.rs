//! Llama 3.1 and later: the whole answer is an object, or several with a semicolon between
//! them, often behind `<|python_tag|>`.

use crate::{
    calls::{After, Opening},
    look::{Look, More},
};

pub(crate) const OPEN: &str = "<|python_tag|>";

pub(crate) fn open(mut look: Look<'_>) -> Result<Opening, More> {
    look.space();
    Ok(match look.peek()? {
        Some(b'{') => Opening::Object(look.at),
        _ => Opening::None,
    })
}

pub(crate) fn after(mut look: Look<'_>) -> Result<After, More> {
    let begin = look;
    look.space();
    if !matches!(look.peek()?, Some(b';' | b',')) {
        return Ok(After::Content(begin.at));
    }
    look.at += 1;
    look.space();
    Ok(match look.peek()? {
        Some(b'{') => After::Object(look.at),
        _ => After::Content(begin.at),
    })
}
