//! Stop strings across token borders.

use crate::error::StopError;

/// Most stop strings a request may have.
pub const MAX_STOPS: usize = 64;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;

/// Finds the first stop string in a text that comes in parts.
///
/// *First* is the one that is complete first; of several that are complete at
/// the same byte, the longest. So the answer does not depend on how the text
/// is cut into parts. Text is held back only while it is a possible beginning
/// of a stop string. One Knuth-Morris-Pratt automaton a string: a byte costs
/// amortised O(1) a string, and nothing but a table look-up while no string
/// has begun.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    /// First bytes of all stop strings.
    begins: Box<[bool; 256]>,
    include: bool,
    /// Text that may be the beginning of a stop string.
    held: String,
    done: bool,
}

#[derive(Debug, Clone)]
struct Stop {
    text: Box<[u8]>,
    /// Border lengths: `back[k]` is the longest proper border of the first
    /// `k + 1` bytes.
    back: Box<[u16]>,
    /// Bytes matched so far.
    matched: u16,
}

impl Stop {
    fn new(text: &str) -> Self {
        let text: Box<[u8]> = text.as_bytes().into();
        let mut back = vec![0u16; text.len()];
        let mut border = 0usize;
        for at in 1..text.len() {
            while border > 0 && text[border] != text[at] {
                border = usize::from(back[border - 1]);
            }
            if text[border] == text[at] {
                border += 1;
            }
            back[at] = border as u16;
        }
        Self {
            text,
            back: back.into(),
            matched: 0,
        }
    }

    /// Takes a byte; true where the string is complete with it.
    fn step(&mut self, byte: u8) -> bool {
        let mut matched = usize::from(self.matched);
        if matched == self.text.len() {
            matched = usize::from(self.back[matched - 1]);
        }
        while matched > 0 && self.text[matched] != byte {
            matched = usize::from(self.back[matched - 1]);
        }
        if self.text[matched] == byte {
            matched += 1;
        }
        self.matched = matched as u16;
        matched == self.text.len()
    }

    /// Bytes at the end of the text that may still grow into this string.
    fn pending(&self) -> usize {
        let matched = usize::from(self.matched);
        if matched == self.text.len() {
            usize::from(self.back[matched - 1])
        } else {
            matched
        }
    }
}

impl StopMatcher {
    /// A matcher for these strings. With `include` the stop string stays in
    /// the text.
    ///
    /// # Errors
    /// [`StopError`] for more than [`MAX_STOPS`] strings, or one that is empty
    /// or longer than [`MAX_STOP_BYTES`].
    pub fn new(stops: &[String], include: bool) -> Result<Self, StopError> {
        if stops.len() > MAX_STOPS {
            return Err(StopError::TooMany {
                count: stops.len(),
                limit: MAX_STOPS,
            });
        }
        let mut begins = Box::new([false; 256]);
        for (index, stop) in stops.iter().enumerate() {
            match stop.as_bytes().first() {
                Some(&first) if stop.len() <= MAX_STOP_BYTES => begins[usize::from(first)] = true,
                _ => {
                    return Err(StopError::Length {
                        index,
                        bytes: stop.len(),
                        limit: MAX_STOP_BYTES,
                    });
                }
            }
        }
        Ok(Self {
            stops: stops.iter().map(|stop| Stop::new(stop)).collect(),
            begins,
            include,
            held: String::new(),
            done: false,
        })
    }

    /// Takes the next part of the text and appends to `out` what is safe to
    /// show. Returns which stop string ended the text; from then on nothing
    /// more comes out. With `honour` false nothing that is complete within
    /// this part ends the text (min_tokens).
    pub fn push(&mut self, text: &str, honour: bool, out: &mut String) -> Option<usize> {
        if self.done {
            return None;
        }
        if self.stops.is_empty() {
            out.push_str(text);
            return None;
        }
        if self.held.is_empty() && !text.bytes().any(|byte| self.begins[usize::from(byte)]) {
            out.push_str(text);
            return None;
        }
        let before = self.held.len();
        self.held.push_str(text);
        let mut idle = before == 0;
        for (at, byte) in text.bytes().enumerate() {
            if idle && !self.begins[usize::from(byte)] {
                continue;
            }
            let hit = self.step(byte);
            idle = self.stops.iter().all(|stop| stop.matched == 0);
            if let Some(index) = hit.filter(|_| honour) {
                let end = before + at + 1;
                let cut = if self.include {
                    end
                } else {
                    end - self.stops[index].text.len()
                };
                out.push_str(&self.held[..cut]);
                self.held.clear();
                self.done = true;
                return Some(index);
            }
        }
        let keep = self.stops.iter().map(Stop::pending).max().unwrap_or(0);
        let shown = self.held.len() - keep;
        out.push_str(&self.held[..shown]);
        self.held.drain(..shown);
        None
    }

    /// The text is at its end: what was held back is no stop string.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.done = true;
    }

    /// Bytes held back now: at most the longest stop string's, less one.
    pub fn held_bytes(&self) -> usize {
        self.held.len()
    }

    /// Moves all automata by one byte; the longest string that it completes.
    fn step(&mut self, byte: u8) -> Option<usize> {
        let mut hit: Option<(usize, usize)> = None;
        for (index, stop) in self.stops.iter_mut().enumerate() {
            let length = stop.text.len();
            if stop.step(byte) && hit.is_none_or(|(_, best)| best < length) {
                hit = Some((index, length));
            }
        }
        hit.map(|(index, _)| index)
    }
}
