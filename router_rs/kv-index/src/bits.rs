//! Sets of workers as words of bits, without trailing zero words.

/// A set of small numbers. Equal sets have equal words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Bits(Vec<u64>);

impl Bits {
    pub(crate) fn set(&mut self, at: usize) {
        let word = at / 64;
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (at % 64);
    }

    pub(crate) fn clear(&mut self, at: usize) {
        if let Some(word) = self.0.get_mut(at / 64) {
            *word &= !(1 << (at % 64));
        }
        while self.0.last() == Some(&0) {
            self.0.pop();
        }
    }

    pub(crate) fn has(&self, at: usize) -> bool {
        self.0
            .get(at / 64)
            .is_some_and(|word| word & (1 << (at % 64)) != 0)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The word that holds numbers 64 i to 64 i + 63.
    pub(crate) fn word(&self, i: usize) -> u64 {
        self.0.get(i).copied().unwrap_or(0)
    }

    pub(crate) fn as_words(&self) -> &[u64] {
        &self.0
    }

    pub(crate) fn words(&self) -> usize {
        self.0.len()
    }

    /// This set with another one's members added.
    pub(crate) fn union(&self, other: &Bits) -> Bits {
        let words = self.0.len().max(other.0.len());
        Bits((0..words).map(|i| self.word(i) | other.word(i)).collect())
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        self.0.capacity() * 8
    }
}

/// Numbers of the bits that are set in word `i`.
pub(crate) fn members(i: usize, mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let bit = word.trailing_zeros() as usize;
        word &= word - 1;
        Some(i * 64 + bit)
    })
}
