//! Chunks of prompts, sized in milliseconds (SCHEDULING 4).
//!
//! `services/kvmesh/engine/core/queue.py` has the same rule in Python, where
//! engines use it once a step; both are held to the vectors in
//! `tests/data/chunks.json`.

use crate::step_model::StepModel;

/// A decode step may always take this much longer by a chunk, whatever the
/// target says: the ITL target in force is never under 1.5 of its own step.
pub const OWN_STEP_SHARE: f64 = 1.5;

/// What bounds a chunk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChunkBounds {
    /// Strictest ITL target of the streams that decode there, ms; infinite
    /// where none has one.
    pub itl_target_ms: f64,
    /// Whether the engine can stop a step of prompts alone between its layers.
    pub layer_preemption: bool,
    /// KV block size: a chunk ends where a block does, in tokens.
    pub block_tokens: u32,
}

/// Most that prompts may add to a step which nothing can stop, ms: a more urgent
/// prompt waits for it, and a stream that joins. The streams' own part of the step
/// is not counted in it: they would be waited for without prompts, too.
pub const PREEMPTION_TARGET_MS: f64 = 100.0;

impl ChunkBounds {
    /// Milliseconds that prompts may take of a step beside `decode_ms` of
    /// decoding; `decodes` says whether anyone decodes. A step that also carries
    /// streams is stopped by no engine; infinite where one can be stopped.
    pub fn budget_ms(&self, decodes: bool, decode_ms: f64) -> f64 {
        if decodes {
            let target = self.itl_target_ms.max(OWN_STEP_SHARE * decode_ms);
            PREEMPTION_TARGET_MS.min(target - decode_ms)
        } else if self.layer_preemption {
            f64::INFINITY
        } else {
            PREEMPTION_TARGET_MS
        }
    }
}

/// Most prompt tokens from position `start` on whose marginal time fits a
/// budget: the n with b n + c (n start + n (n + 1) / 2) = budget.
pub fn tokens_within(model: &StepModel, budget_ms: f64, start: u64, most: u64) -> u64 {
    if budget_ms <= 0.0 {
        return 0;
    }
    if budget_ms == f64::INFINITY {
        return most;
    }
    let linear = model.b_ms + model.c_ms * (start as f64 + 0.5);
    let root = (linear * linear + 2.0 * model.c_ms * budget_ms).sqrt();
    if linear + root <= 0.0 {
        return most;
    }
    // Written so that a c near zero loses no digits.
    ((2.0 * budget_ms / (linear + root)) as u64).min(most)
}

/// Next chunk of a prompt that has `start` of its `length` tokens, beside
/// `batch` streams with `context` tokens together: what fits the budget, at
/// most the chunk that saturates the device, and at least to the next block's
/// end, so that prompts go on whatever decodes.
pub fn chunk_tokens(
    model: &StepModel,
    bounds: &ChunkBounds,
    start: u64,
    length: u64,
    batch: u32,
    context: u64,
) -> u64 {
    let left = length.saturating_sub(start);
    let block = u64::from(bounds.block_tokens.max(1));
    let most = left.min(u64::from(model.saturating_chunk).max(block));
    let decode_ms = model.decode_ms(batch, context);
    let fits = tokens_within(model, bounds.budget_ms(batch > 0, decode_ms), start, most);
    if fits >= left {
        return left;
    }
    let whole = ((start + fits) / block * block).saturating_sub(start);
    if whole > 0 {
        whole
    } else {
        left.min(block - start % block)
    }
}
