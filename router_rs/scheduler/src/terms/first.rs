//! Until the first token, and from it to the second.

use super::{Facts, compute_ms, kv_bytes};
use crate::request::RequestView;
use crate::transfer::TransferRate;
use crate::worker::WorkerView;

/// Until a new prompt starts: the running step, and the prompts before it.
pub(crate) fn wait_ms(worker: &WorkerView, ahead_ms: f64) -> f64 {
    worker.load.step_left_ms + ahead_ms
}

/// Computing what is not there.
pub(crate) fn prefill_ms(
    worker: &WorkerView,
    facts: &Facts,
    request: &RequestView<'_>,
    there: u64,
) -> f64 {
    compute_ms(worker, facts, there, request.sequence())
}

/// Pulling a prefix of so many tokens from another worker.
pub(crate) fn pull_ms(worker: &WorkerView, rate: TransferRate, tokens: u64) -> f64 {
    rate.ms(kv_bytes(worker, tokens))
}

/// KV that arrives after the end of prefill: where blocks flow while it
/// computes only the last chunk's are left, unless the path is slower than the
/// computing.
pub(crate) fn transfer_ms(
    prefill: &WorkerView,
    facts: &Facts,
    decode: &WorkerView,
    request: &RequestView<'_>,
    rate: TransferRate,
    prefill_ms: f64,
) -> f64 {
    let missing = request
        .sequence()
        .saturating_sub(request.cached_on(decode.slot));
    let all = rate.ms(kv_bytes(decode, missing));
    if !(prefill.abilities.streamed_hand_off && decode.abilities.streamed_hand_off) {
        return all;
    }
    let last = rate.ms(kv_bytes(decode, missing.min(facts.chunk as u64)));
    last.max(all - prefill_ms)
}

/// Waiting for a place in the batch: for each request over the limit one
/// stream must end first; taken as a step each of what an average one has
/// left, shared by the batch.
pub(crate) fn decode_wait_ms(worker: &WorkerView, facts: &Facts, request: &RequestView<'_>) -> f64 {
    let limit = worker.abilities.max_batch.max(1);
    let over = (facts.batch + 1).saturating_sub(limit);
    if over == 0 {
        return 0.0;
    }
    f64::from(over) * request.expected_left() * facts.step_ms / f64::from(limit)
}
