//! How long outputs are: learnt per model and class.

use crate::request::Class;
use std::{collections::BTreeMap, sync::LazyLock};

/// Width of a bucket: lengths are known to a fifth.
const GROWTH: f64 = 1.2;
/// Lengths up to `GROWTH^BUCKETS`, some two million tokens.
const BUCKETS: usize = 80;
/// Outputs that the prior counts for.
const PRIOR_WEIGHT: f64 = 4.0;
/// Outputs after which older ones count half.
const HALF_LIFE: f64 = 1_000.0;

/// Lengths of the outputs that ended, as one quantile sketch a model and
/// class. Its size does not grow with what it has seen.
#[derive(Debug, Clone)]
pub struct OutputLengths {
    prior: f64,
    sketches: BTreeMap<(Box<str>, Class), Sketch>,
}

#[derive(Debug, Clone)]
struct Sketch {
    /// Outputs by length; bucket i ends at `GROWTH^i`.
    counts: [f64; BUCKETS],
    total: f64,
}

impl OutputLengths {
    /// Nothing is learnt yet; `prior_tokens` is expected until it is.
    pub fn new(prior_tokens: u32) -> Self {
        Self {
            prior: f64::from(prior_tokens.max(1)),
            sketches: BTreeMap::new(),
        }
    }

    /// An output of so many tokens is complete.
    pub fn observe(&mut self, model: &str, class: Class, tokens: u32) {
        let empty = || Sketch {
            counts: [0.0; BUCKETS],
            total: 0.0,
        };
        let sketch = self
            .sketches
            .entry((model.into(), class))
            .or_insert_with(empty);
        sketch.counts[bucket(tokens)] += 1.0;
        sketch.total += 1.0;
        if sketch.total >= 2.0 * HALF_LIFE {
            for count in &mut sketch.counts {
                *count /= 2.0;
            }
            sketch.total /= 2.0;
        }
    }

    /// Output tokens that a stream has left which is met at any one moment:
    /// long ones are met more often, so E[L²] / 2 E[L] (renewal theory), of
    /// outputs of at most `most` tokens. For streams of which only the class
    /// is known.
    pub fn left_of_running(&self, model: &str, class: Class, most: u32) -> f64 {
        let high = f64::from(most);
        let prior = self.prior.min(high);
        let mut first = PRIOR_WEIGHT * prior;
        let mut second = PRIOR_WEIGHT * prior * prior;
        if let Some(sketch) = self.sketches.get(&(model.into(), class)) {
            for (count, middle) in sketch.counts.iter().zip(&*MIDDLES) {
                let length = middle.min(high);
                first += count * length;
                second += count * length * length;
            }
        }
        second / (2.0 * first.max(1.0))
    }

    /// Expected length of an output that has `made` tokens and may have
    /// `most`, in tokens: the mean of those that were longer than `made`.
    pub fn expected(&self, model: &str, class: Class, made: u32, most: u32) -> u32 {
        let (low, high) = (f64::from(made), f64::from(most));
        let (mut weight, mut sum) = (0.0, 0.0);
        let mut add = |length: f64, count: f64| {
            if length > low && count > 0.0 {
                weight += count;
                sum += count * length.min(high);
            }
        };
        add(self.prior, PRIOR_WEIGHT);
        if let Some(sketch) = self.sketches.get(&(model.into(), class)) {
            for (count, middle) in sketch.counts.iter().zip(&*MIDDLES) {
                add(*middle, *count);
            }
        }
        // Longer than all that was seen: as much again.
        let mean = if weight > 0.0 {
            sum / weight
        } else {
            2.0 * low
        };
        (mean.min(high).round() as u32).clamp(made.saturating_add(1).min(most), most)
    }
}

fn bucket(tokens: u32) -> usize {
    let at = f64::from(tokens.max(1)).ln() / GROWTH.ln();
    (at.ceil() as usize).min(BUCKETS - 1)
}

/// Lengths in the middle of the buckets. Each request asks for all of them some times, and a
/// power takes longer than all else that is done with one.
static MIDDLES: LazyLock<[f64; BUCKETS]> = LazyLock::new(|| {
    std::array::from_fn(|at| match at {
        0 => 1.0,
        at => GROWTH.powf(at as f64 - 0.5),
    })
});

#[cfg(test)]
mod tests {
    use super::*;

    const CLASS: Class = Class::Standard;

    #[test]
    fn the_prior_counts_until_outputs_are_seen() {
        let mut lengths = OutputLengths::new(256);
        assert_eq!(lengths.expected("m", CLASS, 0, 4_096), 256);
        assert_eq!(lengths.expected("m", CLASS, 0, 100), 100);
        for _ in 0..400 {
            lengths.observe("m", CLASS, 40);
        }
        let learnt = lengths.expected("m", CLASS, 0, 4_096);
        assert!((34..=48).contains(&learnt), "{learnt}");
        // Neither another class nor another model learns from it.
        assert_eq!(lengths.expected("m", Class::Batch, 0, 4_096), 256);
        assert_eq!(lengths.expected("n", CLASS, 0, 4_096), 256);
    }

    #[test]
    fn what_is_left_is_that_of_outputs_as_long() {
        let mut lengths = OutputLengths::new(16);
        for _ in 0..300 {
            lengths.observe("m", CLASS, 20);
            lengths.observe("m", CLASS, 1_000);
        }
        let at_start = lengths.expected("m", CLASS, 0, 8_192);
        let later = lengths.expected("m", CLASS, 100, 8_192);
        assert!((430..=600).contains(&at_start), "{at_start}");
        assert!((830..=1_200).contains(&later), "{later}");
        assert_eq!(lengths.expected("m", CLASS, 3_000, 8_192), 6_000);
        assert_eq!(lengths.expected("m", CLASS, 8_192, 8_192), 8_192);
    }

    #[test]
    fn it_follows_a_change() {
        let mut lengths = OutputLengths::new(256);
        for _ in 0..10_000 {
            lengths.observe("m", CLASS, 2_000);
        }
        for _ in 0..10_000 {
            lengths.observe("m", CLASS, 50);
        }
        let now = lengths.expected("m", CLASS, 0, 8_192);
        assert!((40..=70).contains(&now), "{now}");
    }
}
