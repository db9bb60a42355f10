//! The terms of a plan's cost: one small function each, all in milliseconds.
//!
//! Those of the request's first token are in [`first`], what it does to those
//! that wait in [`queued`], to streams in [`stretch`], to the pool in [`room`].
//! What several of them ask of a worker is counted once ([`Facts`]).

pub(crate) mod first;
pub(crate) mod queued;
pub(crate) mod room;
pub(crate) mod stretch;

use crate::booking::Work;
use crate::chunk::{ChunkBounds, PREEMPTION_TARGET_MS, tokens_within};
use crate::deadline::{ClassTargets, Weights};
use crate::fit::tokens_held;
use crate::request::{Class, PerClass, RequestView};
use crate::step_model::{StepModel, prefill_context};
use crate::worker::{ByClass, WorkerView};

/// Statements about people, not about hardware (SCHEDULING 2).
#[derive(Debug, Clone, Copy)]
pub(crate) struct People {
    /// A millisecond of stretched streaming against one of waiting (ε).
    pub(crate) stretch: f64,
    /// How much more it counts beyond a stream's ITL target (κ).
    pub(crate) beyond_target: f64,
    /// Milliseconds of one class against another's.
    pub(crate) weights: Weights,
    pub(crate) targets: ClassTargets,
}

/// What is on a worker, counted once a choice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts {
    /// Streams that decode there or will.
    pub(crate) batch: u32,
    /// Sum of their contexts, tokens.
    pub(crate) context: u64,
    /// The same streams by class.
    pub(crate) decoding: PerClass<u32>,
    /// A step of theirs, ms; that of an empty worker where there are none.
    pub(crate) step_ms: f64,
    /// What they add to a step that computes prompts, ms.
    pub(crate) company_ms: f64,
    /// Tokens of a typical chunk there.
    pub(crate) chunk: f64,
    /// Prompts there that are not computed yet.
    pub(crate) waiting: ByClass,
}

impl Facts {
    pub(crate) fn of(worker: &WorkerView, people: &People) -> Self {
        let (batch, context) = (worker.decode_batch(), worker.decode_context());
        let waiting = worker.by_class();
        let step_ms = worker.step.decode_ms(batch, context);
        let chunk = chunk_there(worker, people, &waiting.decoding, batch, step_ms);
        Self {
            batch,
            context,
            decoding: waiting.decoding,
            step_ms,
            company_ms: step_ms - worker.step.a_ms,
            chunk,
            waiting,
        }
    }

    /// What a chunk adds to a decode step, ms.
    pub(crate) fn chunk_ms(&self, model: &StepModel, context_each: f64) -> f64 {
        model.tokens_ms(self.chunk, self.chunk * context_each)
    }
}

/// Size of the chunks that a worker computes beside its streams.
fn chunk_there(
    worker: &WorkerView,
    people: &People,
    decoding: &PerClass<u32>,
    batch: u32,
    step_ms: f64,
) -> f64 {
    let most = u64::from(worker.step.saturating_chunk.max(1));
    if batch == 0 && worker.abilities.layer_preemption {
        return most as f64;
    }
    let targets = people.weights.itl_target_ms;
    let strictest = (0..Class::ALL.len())
        .filter(|class| decoding[*class] > 0)
        .map(|class| targets[class])
        .fold(f64::INFINITY, f64::min);
    let bounds = ChunkBounds {
        itl_target_ms: strictest,
        preemption_ms: if worker.abilities.layer_preemption {
            f64::INFINITY
        } else {
            PREEMPTION_TARGET_MS
        },
        block_tokens: worker.abilities.block_tokens,
    };
    // At the beginning of a prompt: later ones of the same budget are smaller.
    let fits = tokens_within(&worker.step, bounds.budget_ms(batch > 0, step_ms), 0, most);
    fits.max(u64::from(bounds.block_tokens.min(most as u32)))
        .max(1) as f64
}

/// Computing what is not there yet: its own tokens, and the constant part of
/// the steps that hold them. Streams that decode there share those steps.
pub(crate) fn compute_ms(worker: &WorkerView, facts: &Facts, there: u64, length: u64) -> f64 {
    let tokens = length.saturating_sub(there).max(1);
    steps_ms(worker, facts, tokens as f64, prefill_context(there, tokens))
}

/// Steps for so many prompt tokens with such a sum of contexts.
pub(crate) fn steps_ms(worker: &WorkerView, facts: &Facts, tokens: f64, context: f64) -> f64 {
    let steps = (tokens / facts.chunk).ceil();
    steps * (worker.step.a_ms + facts.company_ms) + worker.step.tokens_ms(tokens, context)
}

/// KV bytes of so many tokens.
pub(crate) fn kv_bytes(worker: &WorkerView, tokens: u64) -> f64 {
    worker.blocks(tokens) as f64 * worker.abilities.block_bytes as f64
}

fn one(class: Class) -> PerClass<u32> {
    Class::ALL.map(|other| u32::from(other == class))
}

/// What to book for the prompt.
pub(crate) fn prefill_work(worker: &WorkerView, request: &RequestView<'_>) -> Work {
    let cached = request.cached_on(worker.slot);
    let tokens = request.sequence() - cached;
    let mut classes = ByClass {
        waiting: one(request.class),
        ..ByClass::default()
    };
    classes.waiting_tokens[request.class.index()] = tokens;
    Work {
        prefills: 1,
        prefill_tokens: tokens,
        prefill_context: prefill_context(cached, tokens) as u64,
        blocks: new_blocks(worker, request),
        classes,
        ..Work::default()
    }
}

/// What to book for the output.
pub(crate) fn decode_work(worker: &WorkerView, request: &RequestView<'_>) -> Work {
    Work {
        decodes: 1,
        decode_context: request.sequence(),
        blocks: new_blocks(worker, request),
        classes: ByClass {
            decoding: one(request.class),
            ..ByClass::default()
        },
        ..Work::default()
    }
}

/// What to book for both.
pub(crate) fn whole_work(worker: &WorkerView, request: &RequestView<'_>) -> Work {
    let prompt = prefill_work(worker, request);
    Work {
        decodes: 1,
        decode_context: request.sequence(),
        classes: ByClass {
            decoding: one(request.class),
            ..prompt.classes
        },
        ..prompt
    }
}

fn new_blocks(worker: &WorkerView, request: &RequestView<'_>) -> u64 {
    worker.blocks(tokens_held(request))
        - request.cached_on(worker.slot) / u64::from(worker.abilities.block_tokens.max(1))
}
