//! Until the first token, and from it to the second.

use super::Asked;
use crate::facts::Facts;
use crate::transfer::TransferRate;

/// Until a new prompt starts: the running step, and the prompts before it.
pub(crate) fn wait_ms(facts: &Facts, ahead_ms: f64) -> f64 {
    facts.step_left_ms + ahead_ms
}

/// Computing what is not there: its own tokens, and the steps that hold them.
pub(crate) fn prefill_ms(facts: &Facts, asked: &Asked, there: f64) -> f64 {
    let tokens = (asked.sequence - there).max(1.0);
    facts.steps_ms(tokens, asked.context_after(there))
}

/// Pulling a prefix of so many tokens from another worker.
pub(crate) fn pull_ms(facts: &Facts, rate: TransferRate, tokens: f64) -> f64 {
    rate.ms(facts.kv_bytes(tokens))
}

/// KV that arrives after the end of prefill: where blocks flow while it
/// computes only the last chunk's are left, unless the path is slower than the
/// computing. `missing`: tokens that decode lacks.
pub(crate) fn transfer_ms(
    prefill: &Facts,
    decode: &Facts,
    rate: TransferRate,
    missing: f64,
    prefill_ms: f64,
) -> f64 {
    let all = rate.ms(decode.kv_bytes(missing));
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
