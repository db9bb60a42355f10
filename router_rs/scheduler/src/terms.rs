//! The terms of a plan's cost: one small function each, all in milliseconds.

use crate::booking::Work;
use crate::fit::tokens_held;
use crate::request::RequestView;
use crate::worker::WorkerView;

/// Weight of stretched streaming against waiting for a first token
/// (SCHEDULING 2): a statement about people.
pub(crate) const STRETCH: f64 = 0.1;

/// What moving KV takes until it is learnt: a fixed part and a rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct TransferPrior {
    pub(crate) fixed_ms: f64,
    pub(crate) bytes_per_ms: f64,
}

/// One host's shared memory, or a network of 10 Gbit/s.
pub(crate) const TRANSFER_PRIOR: TransferPrior = TransferPrior {
    fixed_ms: 2.0,
    bytes_per_ms: 1e6,
};

/// Until a new prompt starts: the running step, and the prompts before it.
pub(crate) fn wait_ms(worker: &WorkerView) -> f64 {
    let backlog = worker.prefill_backlog_tokens();
    worker.load.step_left_ms + worker.step.backlog_ms(backlog, backlog.min(4096))
}

/// Computing what is not there. Decoding streams share the steps.
pub(crate) fn prefill_ms(worker: &WorkerView, request: &RequestView<'_>, there: u64) -> f64 {
    let tokens = request.sequence().saturating_sub(there).max(1);
    let chunks = tokens.div_ceil(u64::from(worker.step.saturating_chunk.max(1)));
    let company = decode_part_ms(worker);
    worker.step.prefill_ms(there, tokens) + chunks as f64 * company
}

/// What the streams that decode on a worker add to each of its steps.
fn decode_part_ms(worker: &WorkerView) -> f64 {
    worker
        .step
        .decode_ms(worker.decode_batch(), worker.decode_context())
        - worker.step.a_ms
}

/// Pulling a prefix of so many tokens from another worker.
pub(crate) fn pull_ms(worker: &WorkerView, tokens: u64) -> f64 {
    TRANSFER_PRIOR.fixed_ms + kv_bytes(worker, tokens) / TRANSFER_PRIOR.bytes_per_ms
}

/// KV that arrives after the end of prefill: blocks flow while it computes,
/// so only the last chunk's are left.
pub(crate) fn transfer_ms(
    prefill: &WorkerView,
    decode: &WorkerView,
    request: &RequestView<'_>,
) -> f64 {
    let missing = request
        .sequence()
        .saturating_sub(request.cached_on(decode.slot));
    let tail = if prefill.abilities.streamed_hand_off && decode.abilities.streamed_hand_off {
        missing.min(u64::from(prefill.step.saturating_chunk))
    } else {
        missing
    };
    TRANSFER_PRIOR.fixed_ms + kv_bytes(decode, tail) / TRANSFER_PRIOR.bytes_per_ms
}

fn kv_bytes(worker: &WorkerView, tokens: u64) -> f64 {
    worker.blocks(tokens) as f64 * worker.abilities.block_bytes as f64
}

/// Waiting for a place in the batch: for each request over the limit, one
/// stream must end first; taken as a step each of what an average one has
/// left, shared by the batch.
pub(crate) fn decode_wait_ms(worker: &WorkerView, request: &RequestView<'_>) -> f64 {
    let limit = worker.abilities.max_batch.max(1);
    let over = (worker.decode_batch() + 1).saturating_sub(limit);
    if over == 0 {
        return 0.0;
    }
    let step = worker
        .step
        .decode_ms(worker.decode_batch(), worker.decode_context());
    f64::from(over) * request.expected_left() * step / f64::from(limit)
}

/// The request's own stream, slower than on an empty worker.
pub(crate) fn own_stretch_ms(worker: &WorkerView, request: &RequestView<'_>) -> f64 {
    let batch = worker.decode_batch();
    let joined = worker
        .step
        .decode_ms(batch + 1, worker.decode_context() + request.sequence());
    let alone = worker.step.decode_ms(1, request.sequence());
    STRETCH * request.expected_left() * (joined - alone)
}

/// The streams that are there, each slowed by this one from now on; they are
/// taken to have as much left as it has.
pub(crate) fn joining_stretch_ms(worker: &WorkerView, request: &RequestView<'_>) -> f64 {
    let batch = worker.decode_batch();
    let joined = worker
        .step
        .decode_ms(batch + 1, worker.decode_context() + request.sequence());
    let before = worker.step.decode_ms(batch, worker.decode_context());
    STRETCH * f64::from(batch) * request.expected_left() * (joined - before)
}

/// The streams that decode where a prompt is computed, held up by its chunks.
pub(crate) fn chunks_stretch_ms(worker: &WorkerView, request: &RequestView<'_>, there: u64) -> f64 {
    let tokens = request.sequence().saturating_sub(there);
    STRETCH * f64::from(worker.decode_batch()) * worker.step.prefill_ms(there, tokens)
}

/// What to book for the prompt.
pub(crate) fn prefill_work(worker: &WorkerView, request: &RequestView<'_>) -> Work {
    let cached = request.cached_on(worker.slot);
    Work {
        prefills: 1,
        prefill_tokens: request.sequence() - cached,
        blocks: new_blocks(worker, request),
        ..Work::default()
    }
}

/// What to book for the output.
pub(crate) fn decode_work(worker: &WorkerView, request: &RequestView<'_>) -> Work {
    Work {
        decodes: 1,
        decode_context: request.sequence(),
        blocks: new_blocks(worker, request),
        ..Work::default()
    }
}

/// What to book for both.
pub(crate) fn whole_work(worker: &WorkerView, request: &RequestView<'_>) -> Work {
    Work {
        decodes: 1,
        decode_context: request.sequence(),
        ..prefill_work(worker, request)
    }
}

fn new_blocks(worker: &WorkerView, request: &RequestView<'_>) -> u64 {
    worker.blocks(tokens_held(request))
        - request.cached_on(worker.slot) / u64::from(worker.abilities.block_tokens.max(1))
}
