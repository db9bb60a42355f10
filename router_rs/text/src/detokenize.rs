//! Token ids to text, a token at a time.

use crate::pieces::Pieces;
use std::sync::Arc;

/// Turns output token ids into text as they come.
///
/// The text after any number of ids is a function of these ids and the
/// setting alone. A character whose bytes are spread over tokens comes out
/// with the token that completes it; bytes that can no longer become a
/// character come out as U+FFFD, as in `String::from_utf8_lossy`. A token
/// costs the length of its piece, whatever came before.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    special_tokens: bool,
    /// Special tokens that are shown in any case; a few.
    kept: Arc<[u32]>,
    /// Bytes of a character that is not complete.
    partial: Vec<u8>,
    /// Nothing but skipped tokens so far.
    at_start: bool,
    /// Spaces that the decoder still takes off the beginning.
    strip: usize,
}

impl Detokenizer {
    pub(crate) fn new(pieces: Arc<Pieces>, special_tokens: bool, kept: Arc<[u32]>) -> Self {
        let strip = pieces.strip_start;
        Self {
            pieces,
            special_tokens,
            kept,
            partial: Vec::new(),
            at_start: true,
            strip,
        }
    }

    /// Takes the next id and appends the text that it completes to `out`. Ids
    /// outside the vocabulary have no text.
    pub fn push(&mut self, id: u32, out: &mut String) {
        let Self {
            pieces,
            special_tokens,
            kept,
            partial,
            at_start,
            strip,
        } = self;
        let Some(piece) = pieces.get(id) else { return };
        if piece.special && !*special_tokens && !kept.contains(&id) {
            return;
        }
        let mut bytes = piece.bytes;
        if *at_start {
            bytes = pieces.first(id, bytes);
            *at_start = false;
        }
        while *strip > 0 && !bytes.is_empty() {
            if let [b' ', rest @ ..] = bytes {
                bytes = rest;
                *strip -= 1;
            } else {
                *strip = 0;
            }
        }
        if partial.is_empty() {
            show(bytes, partial, out);
        } else {
            let mut joined = std::mem::take(partial);
            joined.extend_from_slice(bytes);
            show(&joined, partial, out);
        }
    }

    /// The output is at its end: a character that is still not complete comes
    /// out as U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !self.partial.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.partial.clear();
        }
    }
}

/// Appends complete characters; keeps the beginning of one, at most three
/// bytes, in `partial`.
fn show(mut bytes: &[u8], partial: &mut Vec<u8>, out: &mut String) {
    loop {
        let error = match std::str::from_utf8(bytes) {
            Ok(text) => return out.push_str(text),
            Err(error) => error,
        };
        let (valid, rest) = bytes.split_at(error.valid_up_to());
        out.push_str(std::str::from_utf8(valid).unwrap_or_default());
        match error.error_len() {
            Some(length) => {
                out.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[length..];
            }
            None => return partial.extend_from_slice(rest),
        }
    }
}
