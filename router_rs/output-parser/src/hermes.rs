//! `<tool_call>` around an object: Hermes, Qwen 2.5 and 3, and those that learnt of them.

use crate::{
    calls::{After, Opening},
    look::{Look, More},
};

pub(crate) const OPEN: &str = "<tool_call>";
pub(crate) const CLOSE: &str = "</tool_call>";

pub(crate) fn open(mut look: Look<'_>) -> Result<Opening, More> {
    look.space();
    Ok(match look.peek()? {
        Some(b'{') => Opening::Object(look.at),
        _ => Opening::None,
    })
}

pub(crate) fn after(mut look: Look<'_>) -> Result<After, More> {
    look.space();
    look.literal(CLOSE)?;
    Ok(After::Content(look.at))
}
