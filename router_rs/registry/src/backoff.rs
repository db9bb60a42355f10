//! Pauses between tries.

use std::time::Duration;

/// Doubling pauses, each drawn at random below its bound ("full jitter"), so
/// that many clients of one etcd do not come back in step.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    bound: Duration,
}

impl Backoff {
    pub(crate) fn new((first, longest): (Duration, Duration)) -> Self {
        Self {
            first,
            longest: longest.max(first),
            bound: first,
        }
    }

    /// After success: the next failure starts small again.
    pub(crate) fn reset(&mut self) {
        self.bound = self.first;
    }

    /// The next pause. Never less than a quarter of the bound, so that a
    /// refused connection does not spin.
    pub(crate) fn next(&mut self) -> Duration {
        let bound = self.bound;
        self.bound = (bound * 2).min(self.longest);
        jittered(bound)
    }
}

/// A time drawn between a quarter of `bound` and `bound`.
pub(crate) fn jittered(bound: Duration) -> Duration {
    bound.mul_f64(rand::random_range(0.25..1.0))
}
