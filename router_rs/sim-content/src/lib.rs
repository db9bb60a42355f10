//! A decode step of the simulated model: block contents and tokens of streams.
//!
//! The arithmetic is that of `services/kvmesh/engine/sim/content.py`, where it
//! is explained and where prompts are computed; here it is for many streams of
//! one token each, so that a step of the simulated engine costs less than what
//! is measured with it. All of it is modulo 2^64.
#![forbid(unsafe_code)]

/// Constants of a model's content.
#[derive(Clone, Debug)]
pub struct Content {
    /// K: h[p] = K h[p - 1] + a(t[p]).
    pub state_factor: u64,
    /// a(t) = (t + 1) times this; also the factor of `mix`.
    pub token_factor: u64,
    /// C: word j of a token is C[j] h.
    pub spread: Vec<u64>,
    /// What reading a right content gives, a unit of h.
    pub gain: u64,
    /// First token id that is drawn.
    pub first_token: u32,
    /// Number of token ids that are drawn.
    pub tokens: u32,
    /// Mean number of tokens after which a text ends by itself. 0: never.
    pub end_of_text: u64,
    /// The id that ends a text.
    pub end_id: u32,
    /// Tokens of a block.
    pub block_tokens: usize,
}

/// A stream between two steps.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// The position that is computed next.
    pub position: u64,
    /// h before it.
    pub state: u64,
    /// S before it.
    pub reading: u64,
    /// Mixed into what is drawn.
    pub tag: u64,
}

impl Content {
    /// Words of a token.
    #[must_use]
    pub fn words(&self) -> usize {
        self.spread.len()
    }

    /// Where in the pool the words of a position lie, whose block is in `slot`.
    #[must_use]
    pub fn place(&self, slot: u32, position: usize) -> usize {
        (slot as usize * self.block_tokens + position % self.block_tokens) * self.words()
    }

    /// Computes the next token: its words, and the token drawn after it.
    #[must_use]
    pub fn step(&self, stream: &mut Stream, token: u32, words: &mut [u64]) -> u32 {
        let number = u64::from(token)
            .wrapping_add(1)
            .wrapping_mul(self.token_factor);
        stream.state = stream
            .state
            .wrapping_mul(self.state_factor)
            .wrapping_add(number);
        for (word, factor) in words.iter_mut().zip(&self.spread) {
            *word = factor.wrapping_mul(stream.state);
        }
        let weight = stream.position.wrapping_mul(2).wrapping_add(1);
        stream.position += 1;
        let read = self.gain.wrapping_mul(stream.state).wrapping_mul(weight);
        stream.reading = stream.reading.wrapping_add(read);
        let drawn = self.mix(stream.state ^ stream.reading ^ stream.tag);
        if self.end_of_text > 0 && self.mix(drawn).is_multiple_of(self.end_of_text) {
            return self.end_id;
        }
        // Less than `tokens`, which is u32.
        self.first_token + (drawn % u64::from(self.tokens.max(1))) as u32
    }

    fn mix(&self, value: u64) -> u64 {
        let value = (value ^ (value >> 32)).wrapping_mul(self.token_factor);
        value ^ (value >> 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Content {
        Content {
            state_factor: 0x9E37_79B9_7F4A_7C15,
            token_factor: 0xD6E8_FEB8_6659_FD93,
            spread: vec![1, 3],
            gain: 7,
            first_token: 3,
            tokens: 10,
            end_of_text: 0,
            end_id: 2,
            block_tokens: 16,
        }
    }

    #[test]
    fn positions_lie_in_their_block() {
        let content = content();
        assert_eq!(content.place(5, 0), 5 * 16 * 2);
        assert_eq!(content.place(0, 17), 2);
    }

    #[test]
    fn what_is_drawn_follows_from_tokens_position_and_tag() {
        let content = content();
        let run = |tokens: [u32; 3], tag| {
            let mut stream = Stream {
                position: 0,
                state: 1,
                reading: 0,
                tag,
            };
            let mut words = [0; 2];
            let drawn = tokens
                .into_iter()
                .map(|token| content.step(&mut stream, token, &mut words))
                .collect::<Vec<_>>();
            assert_eq!(words, [stream.state, stream.state.wrapping_mul(3)]);
            assert!(drawn.iter().all(|id| (3..13).contains(id)));
            (drawn, stream.state, stream.reading)
        };
        assert_eq!(run([4, 5, 6], 0), run([4, 5, 6], 0));
        assert_ne!(run([4, 5, 6], 0).1, run([5, 4, 6], 0).1);
        assert_ne!(run([4, 5, 6], 0).2, run([6, 5, 4], 0).2);
        assert_eq!(run([4, 5, 6], 0).2, run([4, 5, 6], 9).2);
    }
}
