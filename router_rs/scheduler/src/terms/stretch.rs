//! Streams that take longer: a request's own, and others'.

use super::{Asked, People};
use crate::chunk::OWN_STEP_SHARE;
use crate::facts::{Chunks, Facts};

/// What a step costs the request's stream that takes `to` instead of `from`: ε,
/// and κ ε beyond its target, by the weight of its class. The target is what it
/// asked for, or that of its class; in force it is never under 1.5 of the
/// worker's own step.
fn stretch(people: &People, asked: &Asked, own_step_ms: f64, from_ms: f64, to_ms: f64) -> f64 {
    let class = asked.class;
    let target = asked.itl_target_ms;
    let target = target.unwrap_or(people.weights.itl_target_ms[class]);
    let target = target.max(OWN_STEP_SHARE * own_step_ms);
    let beyond = (to_ms - target).max(0.0) - (from_ms - target).max(0.0);
    let stretched = (to_ms - from_ms) + (people.beyond_target - 1.0) * beyond;
    people.stretch * people.weights.itl[class] * stretched.max(0.0)
}

/// The request's own stream, slower than on an empty worker: each of its steps
/// by company, some by chunks of the prompts (`chunks_ms` of computing) that
/// are left when it starts.
pub(crate) fn own_stretch_ms(facts: &Facts, asked: &Asked, people: &People, chunks_ms: f64) -> f64 {
    let (alone, joined) = (
        facts.alone_ms(asked.sequence),
        facts.joined_ms(asked.sequence),
    );
    let each = stretch(people, asked, facts.step_ms, alone, joined);
    if chunks_ms <= 0.0 {
        return asked.left * each;
    }
    let context = facts.chunk * asked.sequence / 2.0;
    let chunk_ms = facts.step.tokens_ms(facts.chunk, context);
    // Later chunks of a prompt hold fewer tokens, for the same time.
    let chunk_ms = chunk_ms.min(facts.per_budget.recip());
    let slowed = (chunks_ms / chunk_ms.max(1e-6)).min(asked.left);
    let to = joined + chunk_ms;
    let with_chunk = stretch(people, asked, facts.step_ms, alone, to);
    (asked.left - slowed) * each + slowed * with_chunk
}

/// The streams that are there, each slowed by this one until the pool is level
/// again.
pub(crate) fn joining_stretch_ms(facts: &Facts, asked: &Asked, people: &People) -> f64 {
    if facts.batch == 0.0 {
        return 0.0;
    }
    let joined = facts.joined_ms(asked.sequence);
    of_all(facts, people, joined, |left| steps_until_level(facts, left))
}

/// Steps for which one that joins slows a stream with so many left. As many
/// streams come as end: the next that would have come here goes elsewhere, since
/// this one did, and from then on the pool is as it would be without. So it is
/// the first of both, this stream's end and another's arrival.
pub(crate) fn steps_until_level(facts: &Facts, left: f64) -> f64 {
    left / (1.0 + left * facts.ending)
}

/// The streams that decode where a prompt is computed, held up by its chunks.
/// `ahead_ms`: until it begins.
pub(crate) fn chunks_stretch_ms(
    facts: &Facts,
    chunks: &Chunks,
    ahead_ms: f64,
    people: &People,
) -> f64 {
    if facts.batch == 0.0 {
        return 0.0;
    }
    let to_ms = facts.step_ms + chunks.tokens_ms / chunks.steps;
    let before = ahead_ms / to_ms.max(1e-6);
    of_all(facts, people, to_ms, |left| {
        steps_there(left, before, chunks.steps)
    })
}

/// Steps of all streams that take `to_ms`, which is no less than before: so many
/// steps of a stream that has `left` tokens left. As [`stretch`] would say of each.
fn of_all(facts: &Facts, people: &People, to_ms: f64, steps: impl Fn(f64) -> f64) -> f64 {
    let longer = to_ms - facts.step_ms;
    let mut sum = 0.0;
    for streams in &facts.streams {
        if streams.weight == 0.0 {
            continue;
        }
        let beyond = (to_ms - streams.target_ms).max(0.0);
        let each = longer + (people.beyond_target - 1.0) * beyond;
        sum += streams.weight * steps(streams.left) * each;
    }
    people.stretch * sum
}

/// Of so many steps, those that a stream is there for that has `left` tokens
/// left, exponentially, and `before` steps to make first.
fn steps_there(left: f64, before: f64, most: f64) -> f64 {
    if left <= 0.0 {
        return 0.0;
    }
    left * (surviving(before / left) - surviving((before + most) / left))
}

/// exp(-x) for x >= 0 within 0.03, without a call for every worker.
pub(super) fn surviving(x: f64) -> f64 {
    1.0 / (1.0 + x * (1.0 + x * (0.5 + x / 6.0)))
}

/// The gap between first and second token, where the first comes from prefill
/// and the second waits for KV and for a place: one step, stretched to that.
pub(crate) fn gap_ms(facts: &Facts, asked: &Asked, people: &People, gap_ms: f64) -> f64 {
    let alone = facts.alone_ms(asked.sequence);
    stretch(people, asked, facts.step_ms, alone, alone + gap_ms)
}
