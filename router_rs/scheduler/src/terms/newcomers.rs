//! Streams that are likely to come to a decode worker while it computes a prompt.
//!
//! A decode worker is where others' streams go next, whoever is there now: a prompt of many
//! seconds that begins in a moment without streams would meet them all. So what a worker usually
//! has counts beside what it has. Streams come at random (Poisson) and stay for exponential
//! times; then from an empty worker on their number is Poisson, with the mean that
//! [`expected`] gives (the queue M/G/infinity, Takács 1962).

use super::People;
use super::stretch::surviving;
use crate::chunk::ChunkBounds;
use crate::deadline::Weights;
use crate::facts::{Chunks, Facts};
use crate::request::Class;
use crate::worker::{Role, WorkerView};

/// What a worker usually has, counted once a change. None where it computes prompts as
/// much as its streams: its plans all meet them alike.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usual {
    /// Streams, ...
    streams: f64,
    /// ... each by the weight of a stretched step of its class.
    weight: f64,
    /// How long one stays, ms.
    stay_ms: f64,
    /// A step of theirs, and what a chunk beside it may take, ms.
    step_ms: f64,
    budget_ms: f64,
}

impl Usual {
    pub(crate) fn of(worker: &WorkerView, weights: &Weights) -> Self {
        if worker.role != Role::Decode {
            return Self::default();
        }
        let (mut streams, mut weight, mut tokens) = (0.0, 0.0, 0.0);
        for class in Class::ALL {
            let (count, at) = (worker.usual.streams(class), class.index());
            streams += count;
            weight += count * weights.itl[at];
            tokens += count * worker.left[at];
        }
        let step = &worker.step;
        let step_ms = step.a_ms + step.d_ms * streams.max(1.0);
        if tokens <= 0.0 || step_ms <= 0.0 {
            return Self::default();
        }
        let bounds = ChunkBounds {
            itl_target_ms: weights
                .strictest_itl_ms(|at| worker.usual.streams(Class::ALL[at]) > 0.0),
            layer_preemption: worker.abilities.layer_preemption,
            block_tokens: worker.abilities.block_tokens,
        };
        Self {
            streams,
            weight,
            stay_ms: tokens / streams * step_ms,
            step_ms,
            budget_ms: bounds.budget_ms(true, step_ms),
        }
    }
}

/// What they make of a prompt, and it of them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct HeldUp {
    /// How much later the prompt is computed: its chunks fit their target between tokens.
    pub(crate) prompt_ms: f64,
    /// Their steps, longer by its chunks.
    pub(crate) stretch_ms: f64,
}

/// Mean number of those that came, over a time that begins with none of them: at its middle.
fn expected(usual: &Usual, over_ms: f64) -> f64 {
    usual.streams * (1.0 - surviving(over_ms / (2.0 * usual.stay_ms)))
}

/// Of a prompt in such chunks. What a chunk takes its streams wait for, so that a newcomer
/// waits for as much as is computed while it is there.
pub(crate) fn held_up(facts: &Facts, chunks: &Chunks, people: &People) -> HeldUp {
    let usual = &facts.usual;
    if usual.streams == 0.0 {
        return HeldUp::default();
    }
    let come = expected(usual, chunks.ms());
    // With streams there now its chunks fit their target already.
    let prompt_ms = if facts.batch == 0.0 {
        let some = 1.0 - surviving(come);
        some * chunks.tokens_ms * usual.step_ms / usual.budget_ms
    } else {
        0.0
    };
    let weight = usual.weight * come / usual.streams;
    HeldUp {
        prompt_ms,
        stretch_ms: people.stretch * weight * chunks.tokens_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of 10 ms and 1 ms a stream that each stay for 1.1 s.
    const ONE: Usual = Usual {
        streams: 1.0,
        weight: 1.0,
        stay_ms: 1_100.0,
        step_ms: 11.0,
        budget_ms: 5.5,
    };

    #[test]
    fn few_come_in_a_moment_and_all_that_usually_are_there_in_a_long_time() {
        assert!(expected(&ONE, 11.0) < 0.01);
        assert!((expected(&ONE, 50_000.0) - 1.0).abs() < 0.01);
        let three = Usual {
            streams: 3.0,
            ..ONE
        };
        let ratio = expected(&three, 900.0) / expected(&ONE, 900.0);
        assert!((ratio - 3.0).abs() < 1e-9);
    }
}
