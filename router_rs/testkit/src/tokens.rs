//! The tokens of the mock worker: a pure function of prompt and position, so
//! that whoever knows the prompt can check a stream.

use std::sync::Arc;

use crate::vocabulary::Vocabulary;

/// Names each output token by (prompt token ids, position).
#[derive(Clone, Debug)]
pub struct TokenFunction {
    vocabulary: Arc<Vocabulary>,
}

/// The part of a prompt that decides its output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptSeed(u64);

impl TokenFunction {
    /// The function over the ids of `vocabulary` that are plain text.
    #[must_use]
    pub fn new(vocabulary: Arc<Vocabulary>) -> Self {
        Self { vocabulary }
    }

    /// The function over the vocabulary that this crate makes.
    #[must_use]
    pub fn built_in() -> Self {
        Self::new(Arc::new(Vocabulary::built_in()))
    }

    /// The vocabulary that ids are taken from.
    #[must_use]
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// Folds a prompt once, so that each position is cheap.
    #[must_use]
    pub fn seed(prompt_ids: &[u32]) -> PromptSeed {
        PromptSeed(prompt_ids.iter().fold(0, |state, id| {
            mix(state.wrapping_add(u64::from(*id)).wrapping_add(1))
        }))
    }

    /// The output token at `position` (from 0).
    #[must_use]
    pub fn at(&self, seed: PromptSeed, position: u32) -> u32 {
        let choices = self.vocabulary.text_ids();
        let draw = mix(seed.0 ^ mix(u64::from(position).wrapping_add(1)));
        // The high half times the length: uniform enough, and no division.
        let index = ((draw >> 32) * choices.len() as u64) >> 32;
        choices[index as usize]
    }

    /// The first `count` output tokens of a prompt.
    #[must_use]
    pub fn expected(&self, prompt_ids: &[u32], count: u32) -> Vec<u32> {
        let seed = Self::seed(prompt_ids);
        (0..count).map(|position| self.at(seed, position)).collect()
    }

    /// The text of the first `count` output tokens of a prompt.
    #[must_use]
    pub fn expected_text(&self, prompt_ids: &[u32], count: u32) -> String {
        self.expected(prompt_ids, count)
            .iter()
            .map(|id| self.vocabulary.text(*id))
            .collect()
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable
/// Pseudorandom Number Generators, 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_depend_on_every_prompt_id_and_on_the_position() {
        let tokens = TokenFunction::built_in();
        let base = tokens.expected(&[5, 6, 7], 32);
        assert_eq!(base, tokens.expected(&[5, 6, 7], 32));
        assert_ne!(base, tokens.expected(&[5, 6, 8], 32));
        assert_ne!(base, tokens.expected(&[6, 5, 7], 32));
        assert_ne!(base, tokens.expected(&[0, 5, 6, 7], 32));
        assert!(base.iter().any(|id| *id != base[0]));
    }

    #[test]
    fn a_longer_output_begins_with_the_shorter_one() {
        let tokens = TokenFunction::built_in();
        assert_eq!(
            tokens.expected(&[1, 2], 64)[..16],
            tokens.expected(&[1, 2], 16)
        );
    }
}
