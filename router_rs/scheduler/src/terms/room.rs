//! A pool that may not hold what its streams will become.

use super::{Facts, People};
use crate::fit::tokens_held;
use crate::request::{Class, RequestView};
use crate::worker::WorkerView;

/// Streams end at different times, and each gives its blocks back: of streams
/// with exponential lengths, n L / e tokens are the most that n of them, each
/// with L left, hold at once above what they hold now.
const PEAK: f64 = std::f64::consts::E;

/// Probability that the pool is full before the request has ended: what the
/// streams will need at most, as a normal variable, against what is free.
pub(crate) fn full_probability(
    worker: &WorkerView,
    facts: &Facts,
    request: &RequestView<'_>,
) -> f64 {
    let block = f64::from(worker.abilities.block_tokens.max(1));
    let held = request.cached_on(worker.slot);
    let taken = worker.blocks(tokens_held(request).saturating_sub(held));
    let room = (worker.available_blocks().saturating_sub(taken)) as f64 * block;
    let own = (request.sequence() as f64 + request.expected_left() - tokens_held(request) as f64)
        .max(0.0);
    let (mut mean, mut variance) = (own, own * own);
    for class in Class::ALL {
        let streams = f64::from(facts.decoding[class.index()]);
        let growth = worker.left[class.index()] / PEAK;
        mean += streams * growth;
        variance += streams * growth * growth;
    }
    let deviation = variance.sqrt();
    if deviation <= 0.0 {
        return 0.0;
    }
    // The logistic function is the normal one's within 0.01.
    let z = (room - mean) / deviation;
    if z > 6.0 {
        0.0
    } else {
        1.0 / (1.0 + (1.702 * z).exp())
    }
}

/// What a full pool costs: the request, being the youngest there, goes back and
/// is computed again, at the middle of its output.
pub(crate) fn recompute_ms(
    worker: &WorkerView,
    facts: &Facts,
    request: &RequestView<'_>,
    people: &People,
) -> f64 {
    let probability = full_probability(worker, facts, request);
    if probability == 0.0 {
        return 0.0;
    }
    let length = request.sequence() + (request.expected_left() / 2.0) as u64;
    let again = worker.step.prefill_ms(0, length);
    probability * again * people.weights.ttft[request.class.index()]
}
