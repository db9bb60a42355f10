//! How many streams a worker has on average: who is likely to come while a prompt is computed.

use crate::request::{Class, PerClass};

/// What is older than this counts for less than a third, ms.
const WINDOW_MS: f64 = 60_000.0;

/// Streams of a worker by class, averaged over the last minute or so.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct UsualStreams {
    average: PerClass<f64>,
    last: Option<(f64, PerClass<u32>)>,
}

impl UsualStreams {
    /// Always so many.
    pub fn of(average: PerClass<f64>) -> Self {
        Self {
            average,
            last: None,
        }
    }

    /// So many are there now. Between two calls there were as many as the first one said;
    /// before the first one there were none.
    pub fn observe(&mut self, now_ms: f64, decoding: PerClass<u32>) {
        let Some((then_ms, there)) = self.last else {
            self.last = Some((now_ms, decoding));
            return;
        };
        let kept = (-(now_ms - then_ms).max(0.0) / WINDOW_MS).exp();
        for (average, there) in self.average.iter_mut().zip(there) {
            *average = kept * *average + (1.0 - kept) * f64::from(there);
        }
        self.last = Some((now_ms.max(then_ms), decoding));
    }

    /// How many of a class.
    pub fn streams(&self, class: Class) -> f64 {
        self.average[class.index()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interactive(usual: &UsualStreams) -> f64 {
        usual.streams(Class::Interactive)
    }

    #[test]
    fn it_is_the_average_over_time_however_often_it_is_told() {
        let (mut often, mut seldom) = (UsualStreams::default(), UsualStreams::default());
        // Two streams for a fifth of the time.
        for second in 0..600 {
            let there = [if second % 10 < 2 { 2 } else { 0 }, 0, 0];
            for tenth in 0..10 {
                often.observe(f64::from(1_000 * second + 100 * tenth), there);
            }
            if matches!(second % 10, 0 | 2) {
                seldom.observe(f64::from(1_000 * second), there);
            }
        }
        for usual in [&mut often, &mut seldom] {
            usual.observe(600_000.0, [0; 3]);
            assert!((interactive(usual) - 0.4).abs() < 0.04, "{usual:?}");
        }
        assert!((interactive(&often) - interactive(&seldom)).abs() < 1e-9);
    }

    #[test]
    fn what_was_is_forgotten_and_time_never_goes_back() {
        let mut usual = UsualStreams::of([5.0, 0.0, 0.0]);
        usual.observe(1_000.0, [0; 3]);
        assert_eq!(interactive(&usual), 5.0);
        usual.observe(500.0, [0; 3]);
        assert_eq!(interactive(&usual), 5.0);
        usual.observe(1_000.0 + 5.0 * WINDOW_MS, [7, 0, 0]);
        assert!(interactive(&usual) < 0.05);
    }
}
