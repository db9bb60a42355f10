//! DeepSeek V3, R1 and V3.1: each call between marks, the name behind its kind and before
//! its arguments.

use crate::{
    calls::{After, Opening},
    look::{Look, MOST_NAME, More},
};

const CALLS: &str = "<｜tool▁calls▁begin｜>";
const CALLS_END: &str = "<｜tool▁calls▁end｜>";
const CALL: &str = "<｜tool▁call▁begin｜>";
const CALL_END: &str = "<｜tool▁call▁end｜>";
const SEPARATOR: &str = "<｜tool▁sep｜>";
const FENCE: &str = "```";
pub(crate) const MARKS: &[&str] = &[CALLS, CALLS_END, CALL, CALL_END, SEPARATOR];
pub(crate) const OPENING: &[&str] = &[CALLS, CALL];
/// What may be behind arguments.
pub(crate) const CLOSING: &[&str] = &[CALL_END, CALLS_END, FENCE];

/// Behind one of [`OPENING`].
pub(crate) fn open(mut look: Look<'_>) -> Result<Opening, More> {
    look.space();
    // Behind the mark of all calls is that of the first.
    look.literal(CALL)?;
    let Some(first) = look.until(SEPARATOR, MOST_NAME)? else {
        return Ok(Opening::None);
    };
    let mut name = first.trim();
    let written = look;
    look.space();
    if name == "function" && look.peek()? != Some(b'{') {
        // V3 and R1: the kind was first, the name is a line, arguments are fenced.
        look = written;
        let Some(line) = look.until("\n", MOST_NAME)? else {
            return Ok(Opening::None);
        };
        name = line.trim();
        look.space();
        if look.literal(FENCE)? {
            look.literal("json")?;
        }
    }
    Ok(match name.is_empty() || name.contains('<') {
        true => Opening::None,
        false => Opening::Arguments(look.at, name.to_owned()),
    })
}

/// Behind the arguments of a call.
pub(crate) fn after(mut look: Look<'_>) -> Result<After, More> {
    for mark in [FENCE, CALL_END, CALLS_END] {
        let before = look;
        look.space();
        if !look.literal(mark)? {
            look = before;
        }
    }
    Ok(After::Content(look.at))
}
