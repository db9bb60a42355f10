//! How much of which prompt a step computes (SCHEDULING 4).

use super::{EngineSettings, Sequence};
use kvmesh_scheduler::StepModel;

/// Tokens at whose multiples chunks end.
const ALIGN: u32 = 16;

/// What is left of a step for prompts.
#[derive(Debug)]
pub(super) struct Budget {
    model: StepModel,
    ms: f64,
    tokens: u32,
}

impl Budget {
    /// Beside so many streams, whose step alone takes `decode_ms`.
    pub(super) fn new(settings: &EngineSettings, batch: u32, decode_ms: f64, itl_ms: f64) -> Self {
        let mut ms = if settings.layer_preemption {
            f64::INFINITY
        } else {
            settings.preemption_target_ms
        };
        if batch > 0 {
            ms = ms.min(itl_ms.max(1.5 * decode_ms) - decode_ms);
        }
        Self {
            model: settings.truth,
            ms,
            tokens: settings.truth.saturating_chunk,
        }
    }

    /// Whether nothing is left.
    pub(super) fn spent(&self) -> bool {
        self.tokens == 0
    }

    /// Tokens of the next chunk of a prompt; takes them off the budget. The
    /// first of a step gets at least a unit, whatever the budget.
    pub(super) fn take(&mut self, sequence: &Sequence, first: bool) -> u32 {
        let left = sequence.left_to_compute();
        let mut fitting = left.min(self.tokens);
        if self.ms.is_finite() {
            fitting = fitting.min(self.within(sequence.computed));
        }
        if fitting < left {
            // What a chunk made can be shared where it ends with a unit.
            let end = (sequence.computed + fitting) / ALIGN * ALIGN;
            fitting = end.saturating_sub(sequence.computed);
            if fitting == 0 && first {
                fitting = left.min(ALIGN - sequence.computed % ALIGN);
            }
        }
        self.tokens = if fitting == 0 {
            0
        } else {
            self.tokens.saturating_sub(fitting)
        };
        let (start, tokens) = (f64::from(sequence.computed), f64::from(fitting));
        self.ms -= self.model.b_ms * tokens
            + self.model.c_ms * (tokens * start + tokens * (tokens + 1.0) / 2.0);
        fitting
    }

    /// Most tokens after `start` whose time fits: the larger root of
    /// `b n + c (n start + n (n + 1) / 2) = ms`.
    fn within(&self, start: u32) -> u32 {
        if self.ms <= 0.0 {
            return 0;
        }
        let linear = self.model.b_ms + self.model.c_ms * (f64::from(start) + 0.5);
        let root = (linear * linear + 2.0 * self.model.c_ms * self.ms).sqrt();
        if linear + root <= 0.0 {
            return u32::MAX;
        }
        (2.0 * self.ms / (linear + root)) as u32
    }
}
