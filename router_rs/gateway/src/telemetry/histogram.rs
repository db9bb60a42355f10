//! Histograms of times: fixed buckets, atomics, and a local one that is merged.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Upper bounds in seconds: about three a decade, 0.5 ms to 2 min.
pub(super) const BOUNDS: [f64; 18] = [
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
    10.0, 30.0, 120.0,
];
const BUCKETS: usize = BOUNDS.len() + 1;

/// The same in microseconds.
const BOUNDS_US: [u64; BOUNDS.len()] = {
    let mut us = [0; BOUNDS.len()];
    let mut i = 0;
    while i < us.len() {
        us[i] = (BOUNDS[i] * 1e6 + 0.5) as u64;
        i += 1;
    }
    us
};

fn bucket(us: u64) -> usize {
    BOUNDS_US.partition_point(|bound| *bound < us)
}

fn micros(time: Duration) -> u64 {
    let seconds = time.as_secs().saturating_mul(1_000_000);
    seconds.saturating_add(u64::from(time.subsec_micros()))
}

/// A histogram that many write.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    counts: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
}

impl Histogram {
    pub(crate) fn observe(&self, time: Duration) {
        let us = micros(time);
        self.counts[bucket(us)].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// Takes a local one over and empties it.
    pub(super) fn take(&self, local: &mut LocalHistogram) {
        for (all, one) in self.counts.iter().zip(&local.counts) {
            if *one > 0 {
                all.fetch_add(u64::from(*one), Ordering::Relaxed);
            }
        }
        self.sum_us.fetch_add(local.sum_us, Ordering::Relaxed);
        *local = LocalHistogram::default();
    }

    /// Sum in seconds, number, and (bound, count) of each bucket.
    pub(super) fn read(&self) -> (f64, u64, Vec<(f64, u64)>) {
        // Scrapers refuse a histogram without a bucket named `+Inf`, and only
        // the infinite bound is written so.
        let bounds = BOUNDS.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds
            .zip(
                self.counts
                    .iter()
                    .map(|count| count.load(Ordering::Relaxed)),
            )
            .collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        (
            Duration::from_micros(self.sum_us.load(Ordering::Relaxed)).as_secs_f64(),
            count,
            buckets,
        )
    }
}

/// A histogram of one stream.
#[derive(Debug, Default)]
pub(super) struct LocalHistogram {
    counts: [u32; BUCKETS],
    sum_us: u64,
    count: u32,
}

impl LocalHistogram {
    pub(super) fn observe(&mut self, time: Duration) {
        let us = micros(time);
        self.counts[bucket(us)] += 1;
        self.sum_us = self.sum_us.saturating_add(us);
        self.count += 1;
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stream_counted_arrives_once() {
        let all = Histogram::default();
        let mut one = LocalHistogram::default();
        one.observe(Duration::from_millis(10));
        one.observe(Duration::from_secs(500));
        all.take(&mut one);
        all.take(&mut one);
        let (sum, count, buckets) = all.read();
        assert_eq!(count, 2);
        assert!((sum - 500.01).abs() < 1e-6);
        assert_eq!(buckets[4], (0.01, 1));
        assert_eq!(buckets[BUCKETS - 1], (f64::INFINITY, 1));
    }
}
