//! Text on its way in and out: chat template, tokeniser, detokeniser, stop
//! strings.
//!
//! In: [`ModelText::render_chat`] turns messages into the model's prompt,
//! [`ModelText::encode`] turns text into token ids. Out: [`TextStream`] turns
//! token ids into text, one step at a time, and finds stop strings; it is a
//! [`Detokenizer`] and a [`StopMatcher`] in a row.
//!
//! All of it is pure: no clock, no randomness, no async. The text of a
//! generation is a function of (output ids so far, settings), so any router
//! that holds the ids gives the same bytes.
#![forbid(unsafe_code)]

mod chat;
mod detokenize;
mod error;
mod files;
mod json;
mod messages;
mod model_text;
mod pieces;
mod stop;
mod stream;
mod template;
mod time;
mod weight;

pub use chat::{Chat, Message};
pub use detokenize::Detokenizer;
pub use error::{EncodeError, JsonError, LoadError, StopError, TemplateError};
pub use files::{TextFile, digest_of};
pub use model_text::{Limits, ModelText};
pub use stop::{MAX_STOP_BYTES, MAX_STOPS, StopMatcher};
pub use stream::{StopHit, TextSettings, TextStream};
pub use time::UnixSeconds;
pub use weight::tree_bytes;
