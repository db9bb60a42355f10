//! Pauses between tries.

use std::time::Duration;

/// Doubling pauses, each drawn between a quarter of its bound and the bound, so
/// that routers which failed together do not come back together. The draws
/// follow from a seed alone.
#[derive(Clone, Debug)]
pub(super) struct Backoff {
    bound: Duration,
    longest: Duration,
    state: u64,
}

impl Backoff {
    /// From `first` to `longest`.
    pub(super) fn new((first, longest): (Duration, Duration), seed: u64) -> Self {
        Self {
            bound: first,
            longest: longest.max(first),
            state: seed,
        }
    }

    /// The next pause.
    pub(super) fn next(&mut self) -> Duration {
        let bound = self.bound;
        self.bound = (bound * 2).min(self.longest);
        bound.mul_f64(0.25 + 0.75 * self.draw())
    }

    /// A number from 0 to 1: SplitMix64 (Steele, Lea, Flood 2014).
    fn draw(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        // The upper 53 bits: as many as a float holds.
        (z >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

    #[test]
    fn pauses_double_to_their_longest_and_stay_within_their_bounds() {
        for seed in 0..100 {
            let mut backoff = Backoff::new(BOUNDS, seed);
            for bound_ms in [100, 200, 400, 800, 1_600, 2_000, 2_000] {
                let bound = Duration::from_millis(bound_ms);
                let pause = backoff.next();
                assert!(
                    pause >= bound / 4 && pause <= bound,
                    "{pause:?} of {bound:?}"
                );
            }
        }
    }

    #[test]
    fn a_seed_repeats_its_pauses_and_another_has_others() {
        let pauses = |seed| {
            let mut backoff = Backoff::new(BOUNDS, seed);
            [backoff.next(), backoff.next(), backoff.next()]
        };
        assert_eq!(pauses(7), pauses(7));
        assert_ne!(pauses(7), pauses(8));
    }
}
