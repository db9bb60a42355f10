//! Distributions of durations in bounded memory.

use std::time::Duration;

use serde::Serialize;

/// Buckets an octave: a reading is right to 1.1 %.
const PER_OCTAVE: usize = 64;
/// Octaves over one nanosecond: up to 18 minutes.
const OCTAVES: usize = 40;

/// Counts of durations in logarithmic buckets.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    sum_ns: f64,
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; PER_OCTAVE * OCTAVES],
            total: 0,
            sum_ns: 0.0,
            max_ns: 0,
        }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn add(&mut self, value: Duration) {
        let ns = value.as_nanos() as u64;
        let at = ((ns.max(1) as f64).log2() * PER_OCTAVE as f64) as usize;
        let at = at.min(self.counts.len() - 1);
        self.counts[at] += 1;
        self.total += 1;
        self.sum_ns += ns as f64;
        self.max_ns = self.max_ns.max(ns);
    }

    /// The value below which a share `q` (0 to 1) of the durations lies.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Duration {
        let rank = ((self.total as f64 * q).ceil() as u64).max(1);
        let mut seen = 0;
        for (at, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                // The middle of the bucket.
                let ns = ((at as f64 + 0.5) / PER_OCTAVE as f64).exp2();
                return Duration::from_nanos((ns as u64).min(self.max_ns));
            }
        }
        Duration::ZERO
    }

    /// The figures that are reported.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        Summary {
            count: self.total,
            mean: self.sum_ns / 1e6 / self.total.max(1) as f64,
            p50: ms(self.quantile(0.5)),
            p90: ms(self.quantile(0.9)),
            p99: ms(self.quantile(0.99)),
            max: self.max_ns as f64 / 1e6,
        }
    }
}

/// A distribution in a few numbers, milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Summary {
    /// Durations counted.
    pub count: u64,
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_the_width_of_a_bucket() {
        let mut histogram = Histogram::default();
        for ms in 1..=1_000 {
            histogram.add(Duration::from_millis(ms));
        }
        for (q, expected) in [(0.5, 500.0), (0.9, 900.0), (0.99, 990.0)] {
            let ms = histogram.quantile(q).as_secs_f64() * 1e3;
            assert!((ms / expected - 1.0).abs() < 0.012, "{q}: {ms}");
        }
        assert_eq!(histogram.summary().count, 1_000);
        assert_eq!(histogram.summary().max, 1_000.0);
    }
}
