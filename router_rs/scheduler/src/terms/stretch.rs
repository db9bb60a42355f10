//! Streams that take longer: a request's own, and others'.

use super::{Facts, People};
use crate::chunk::OWN_STEP_SHARE;
use crate::request::{Class, RequestView};
use crate::worker::WorkerView;

/// What a step costs a stream of this class that takes `to` instead of `from`:
/// ε, and κ ε beyond the stream's target, by the weight of its class. The
/// target in force is never under 1.5 of the worker's own step.
pub(crate) fn stretch(
    people: &People,
    class: Class,
    own_step_ms: f64,
    from_ms: f64,
    to_ms: f64,
) -> f64 {
    let at = class.index();
    let target = people.weights.itl_target_ms[at].max(OWN_STEP_SHARE * own_step_ms);
    let beyond = (to_ms - target).max(0.0) - (from_ms - target).max(0.0);
    let stretched = (to_ms - from_ms) + (people.beyond_target - 1.0) * beyond;
    people.stretch * people.weights.itl[at] * stretched.max(0.0)
}

/// The request's own stream, slower than on an empty worker: each of its steps
/// by company, some by chunks of the prompts (`chunks_ms` of computing) that
/// are left when it starts.
pub(crate) fn own_stretch_ms(
    worker: &WorkerView,
    facts: &Facts,
    request: &RequestView<'_>,
    people: &People,
    chunks_ms: f64,
) -> f64 {
    let sequence = request.sequence();
    let left = request.expected_left();
    let alone = worker.step.decode_ms(1, sequence);
    let joined = worker
        .step
        .decode_ms(facts.batch + 1, facts.context + sequence);
    let each = stretch(people, request.class, facts.step_ms, alone, joined);
    if chunks_ms <= 0.0 {
        return left * each;
    }
    let chunk_ms = facts.chunk_ms(&worker.step, sequence as f64 / 2.0);
    let slowed = (chunks_ms / chunk_ms.max(1e-6)).min(left);
    let with_chunk = stretch(
        people,
        request.class,
        facts.step_ms,
        alone,
        joined + chunk_ms,
    );
    (left - slowed) * each + slowed * with_chunk
}

/// The streams that are there, each slowed by this one from now on.
pub(crate) fn joining_stretch_ms(
    worker: &WorkerView,
    facts: &Facts,
    request: &RequestView<'_>,
    people: &People,
) -> f64 {
    if facts.batch == 0 {
        return 0.0;
    }
    let joined = worker
        .step
        .decode_ms(facts.batch + 1, facts.context + request.sequence());
    of_all(facts, people, joined, |class| worker.left[class.index()])
}

/// The streams that decode where a prompt is computed, held up by its chunks.
pub(crate) fn chunks_stretch_ms(
    worker: &WorkerView,
    facts: &Facts,
    request: &RequestView<'_>,
    there: u64,
    people: &People,
) -> f64 {
    if facts.batch == 0 {
        return 0.0;
    }
    let sequence = request.sequence();
    let tokens = sequence.saturating_sub(there).max(1) as f64;
    let chunks = (tokens / facts.chunk).ceil();
    let chunk = tokens / chunks;
    let context = (there + sequence) as f64 / 2.0;
    let chunk_ms = worker.step.tokens_ms(chunk, chunk * context);
    of_all(facts, people, facts.step_ms + chunk_ms, |class| {
        chunks.min(worker.left[class.index()])
    })
}

/// Steps of all streams that take `to_ms` now, each for so many steps.
fn of_all(facts: &Facts, people: &People, to_ms: f64, steps: impl Fn(Class) -> f64) -> f64 {
    let mut sum = 0.0;
    for class in Class::ALL {
        let streams = facts.decoding[class.index()];
        if streams > 0 {
            let each = stretch(people, class, facts.step_ms, facts.step_ms, to_ms);
            sum += f64::from(streams) * steps(class) * each;
        }
    }
    sum
}

/// The gap between first and second token, where the first comes from prefill
/// and the second waits for KV and for a place: one step, stretched to that.
pub(crate) fn gap_ms(
    worker: &WorkerView,
    facts: &Facts,
    request: &RequestView<'_>,
    people: &People,
    gap_ms: f64,
) -> f64 {
    let alone = worker.step.decode_ms(1, request.sequence());
    stretch(people, request.class, facts.step_ms, alone, alone + gap_ms)
}
