//! Until the first token, and from it to the second.

use super::Asked;
use super::queued::Line;
use crate::facts::{Chunks, Facts};
use crate::transfer::TransferRate;

/// Until a new prompt starts: the running step, and the prompts before it. A
/// step that computes prompts alone, less urgent than all of this one's, is stopped
/// at the next layer, where the engine can: one with streams is left to end.
pub(crate) fn wait_ms(facts: &Facts, line: &Line, now_ms: f64) -> f64 {
    let stops = facts.stops && line.ahead_ms == 0.0 && line.behind_ms > 0.0;
    let left_ms = (facts.step_ends_ms - now_ms).max(0.0);
    let running = if stops {
        left_ms.min(facts.step_ms)
    } else {
        left_ms
    };
    running + line.ahead_ms
}

/// Computing what is not there: its own tokens, and the steps that hold them.
pub(crate) fn prefill(facts: &Facts, asked: &Asked, there: f64) -> Chunks {
    let tokens = (asked.sequence - there).max(1.0);
    facts.chunks(tokens, asked.context_after(there))
}

/// Bringing cached tokens back to the device: those that lie on the host, and
/// those on disk.
pub(crate) fn reload_ms(facts: &Facts, below: [f64; 2]) -> f64 {
    below[0] * facts.reload_ms[0] + below[1] * facts.reload_ms[1]
}

/// Pulling a prefix of so many tokens from another worker.
pub(crate) fn pull_ms(facts: &Facts, rate: TransferRate, tokens: f64) -> f64 {
    rate.ms(facts.kv_bytes(tokens))
}

/// KV that arrives after the end of prefill: where blocks flow while it
/// computes only the last chunk's are left, unless the path is slower than the
/// computing. `missing`: tokens that decode lacks, and their bytes.
pub(crate) fn transfer_ms(
    prefill: &Facts,
    decode: &Facts,
    rate: TransferRate,
    (missing, bytes): (f64, f64),
    prefill_ms: f64,
) -> f64 {
    let all = rate.ms(bytes);
    if !(prefill.streamed && decode.streamed) {
        return all;
    }
    let last = rate.ms(decode.kv_bytes(missing.min(prefill.chunk)));
    last.max(all - prefill_ms)
}

/// Waiting for a place in the batch: for each request over the limit one
/// stream must end first; taken as a step each of what an average one has
/// left, shared by the batch.
pub(crate) fn decode_wait_ms(facts: &Facts, asked: &Asked) -> f64 {
    let over = facts.batch + 1.0 - facts.max_batch;
    if over <= 0.0 {
        return 0.0;
    }
    over * asked.left * facts.step_ms / facts.max_batch
}
