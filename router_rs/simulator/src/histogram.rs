//! Times by their logarithm: quantiles within 1 %.

const SMALLEST_MS: f64 = 0.01;
const GROWTH: f64 = 1.02;
const BUCKETS: usize = 1_200;

/// How often which time was seen.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    sum: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            total: 0,
            sum: 0.0,
        }
    }
}

impl Histogram {
    /// A time was seen so often.
    pub fn add(&mut self, ms: f64, count: u32) {
        let at = (ms.max(SMALLEST_MS) / SMALLEST_MS).ln() / GROWTH.ln();
        self.counts[(at as usize).min(BUCKETS - 1)] += u64::from(count);
        self.total += u64::from(count);
        self.sum += ms * f64::from(count);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// Their mean, ms; 0 of none.
    pub fn mean(&self) -> f64 {
        self.sum / self.total.max(1) as f64
    }

    /// The time that this share is not above, ms; 0 of none.
    pub fn quantile(&self, share: f64) -> f64 {
        let rank = (share * self.total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (at, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return SMALLEST_MS * GROWTH.powf(at as f64 + 0.5);
            }
        }
        0.0
    }
}
