//! How much of which prompt a step computes (SCHEDULING 4).

use super::{EngineSettings, Sequence};
use kvmesh_scheduler::{ChunkBounds, StepModel, tokens_within};

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
        let (model, fixed) = (settings.truth, settings.chunk_tokens);
        if fixed > 0 {
            return Self {
                model,
                ms: f64::INFINITY,
                tokens: fixed,
            };
        }
        let bounds = ChunkBounds {
            itl_target_ms: itl_ms,
            layer_preemption: settings.layer_preemption,
            block_tokens: ALIGN,
        };
        Self {
            model,
            ms: bounds.budget_ms(batch > 0, decode_ms),
            tokens: model.saturating_chunk,
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
        let most = u64::from(left.min(self.tokens));
        // Never more than `most`, which is of 32 bits.
        let mut fitting =
            tokens_within(&self.model, self.ms, u64::from(sequence.computed), most) as u32;
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Stage;
    use kvmesh_scheduler::Class;

    /// Tokens of the first chunk of a prompt of 5,000 beside a stream without a target.
    fn beside_a_stream(chunk_tokens: u32) -> u32 {
        let settings = EngineSettings {
            truth: StepModel {
                a_ms: 10.0,
                b_ms: 0.5,
                c_ms: 0.0,
                d_ms: 1.0,
                e_ms: 0.0,
                relative_error: 0.0,
                saturating_chunk: 1_024,
            },
            pool_units: 1_000,
            block_tokens: 16,
            max_batch: 64,
            layer_preemption: true,
            chunk_tokens,
            itl_ms: [50.0, 100.0, f64::INFINITY],
            routers: 1,
        };
        let prompt = Sequence::new(0, 0, Class::Batch, 0.0, Stage::Whole, 5_000, 1, 0.0);
        Budget::new(&settings, 1, 11.0, f64::INFINITY).take(&prompt, true)
    }

    #[test]
    fn beside_streams_a_chunk_fits_the_preemption_target_unless_its_size_is_set() {
        // The whole units of the 200 tokens that take 100 ms.
        assert_eq!(beside_a_stream(0), 192);
        assert_eq!(beside_a_stream(4_096), 4_096);
    }
}
