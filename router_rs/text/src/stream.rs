//! The output side in one: ids in, text out, stop strings found.

use crate::detokenize::Detokenizer;
use crate::error::StopError;
use crate::stop::StopMatcher;

/// How the text of one generation is made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TextSettings {
    /// Special tokens stay in the text.
    pub special_tokens: bool,
    /// These stay in any case, by their text; others than special tokens of the model
    /// are without effect.
    pub kept_special_tokens: Vec<String>,
    /// Stop strings: at most 64, each 1 to 1,024 bytes.
    pub stops: Vec<String>,
    /// The stop string stays in the text.
    pub include_stop: bool,
    /// A stop string counts only if it is completed by this token of the
    /// output (counted from 1) or a later one.
    pub min_tokens: u32,
}

/// A stop string ended the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopHit {
    /// Which one, as an index into `TextSettings::stops`.
    pub stop: usize,
    /// Number of output tokens up to and with the one that completed it.
    pub tokens: u32,
}

/// The text of one generation, made as its ids come.
#[derive(Debug, Clone)]
pub struct TextStream {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    min_tokens: u32,
    tokens: u32,
    piece: String,
}

impl TextStream {
    pub(crate) fn new(
        detokenizer: Detokenizer,
        settings: &TextSettings,
    ) -> Result<Self, StopError> {
        Ok(Self {
            detokenizer,
            stops: StopMatcher::new(&settings.stops, settings.include_stop)?,
            min_tokens: settings.min_tokens,
            tokens: 0,
            piece: String::new(),
        })
    }

    /// Takes the next ids of the output, in order, and appends the text that
    /// may be shown to `out`. Ids after a hit are not looked at.
    pub fn push(&mut self, ids: &[u32], out: &mut String) -> Option<StopHit> {
        for &id in ids {
            self.tokens = self.tokens.saturating_add(1);
            self.piece.clear();
            self.detokenizer.push(id, &mut self.piece);
            let honour = self.tokens >= self.min_tokens;
            if let Some(stop) = self.stops.push(&self.piece, honour, out) {
                return Some(StopHit {
                    stop,
                    tokens: self.tokens,
                });
            }
        }
        None
    }

    /// The output ended for another reason: appends what was held back. A
    /// stop string that only the last, broken character completes is text.
    pub fn finish(&mut self, out: &mut String) {
        self.piece.clear();
        self.detokenizer.finish(&mut self.piece);
        let piece = std::mem::take(&mut self.piece);
        self.stops.push(&piece, false, out);
        self.stops.finish(out);
    }

    /// Ids taken so far.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }
}
