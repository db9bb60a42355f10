//! A pool that may not hold what its streams will become.

use super::{Asked, People};
use crate::facts::Facts;

/// Beyond so many standard deviations the pool is not full.
const SURE: f64 = 6.0;

/// Probability that the pool is full before the request has ended: what the
/// streams will need at most, as a normal variable, against what is free when
/// the request has its room. `cached`: tokens of it that are there.
pub(crate) fn full_probability(facts: &Facts, asked: &Asked, cached: f64) -> f64 {
    let room = facts.room - (asked.held - cached);
    let own = (asked.sequence + asked.left - asked.held).max(0.0);
    let mean = own + facts.growth;
    let variance = own * own + facts.growth_variance;
    let spare = room - mean;
    if variance == 0.0 || spare > 0.0 && spare * spare > SURE * SURE * variance {
        return 0.0;
    }
    // The logistic function is the normal one's within 0.01.
    1.0 / (1.0 + (1.702 * spare / variance.sqrt()).exp())
}

/// What a full pool costs: the request, being the youngest there, goes back and
/// is computed again, at the middle of its output.
pub(crate) fn recompute_ms(facts: &Facts, asked: &Asked, people: &People, cached: f64) -> f64 {
    let probability = full_probability(facts, asked, cached);
    if probability == 0.0 {
        return 0.0;
    }
    let length = asked.sequence + asked.left / 2.0;
    let again = facts.chunks(length, length * length / 2.0).ms();
    probability * again * people.weights.ttft[asked.class]
}
