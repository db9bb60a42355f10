//! What the terms ask of a worker, counted once a change and not once a choice.
//!
//! A choice walks over one row a worker, all of them side by side in memory;
//! names (models, kinds of KV) are numbers there.

use crate::chunk::{ChunkBounds, OWN_STEP_SHARE, tokens_within};
use crate::deadline::{ClassTargets, Weights};
use crate::floor::Floors;
use crate::request::{Class, PerClass};
use crate::step_model::StepModel;
use crate::terms::newcomers::Usual;
use crate::terms::queued::Waiting;
use crate::worker::{Phase, Role, WorkerView};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Streams end at different times, and each gives its blocks back: of n streams
/// with exponential lengths, each with L left, n L / e tokens are the most that
/// they hold at once above what they hold now.
const PEAK: f64 = std::f64::consts::E;

/// Streams of one class on a worker.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Streams {
    /// How many, each by the weight of a stretched step of its class.
    pub(crate) weight: f64,
    /// Output tokens that each has left.
    pub(crate) left: f64,
    /// ITL target in force: never under 1.5 of the worker's own step.
    pub(crate) target_ms: f64,
}

/// What decides who may take a request at all.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gate {
    /// Number of its model's name.
    pub(crate) model: u32,
    /// As in [`Facts`].
    pub(crate) kind: u32,
    pub(crate) slot: u32,
    /// Takes new work now, room apart.
    pub(crate) ready: bool,
    /// May give a prefix.
    pub(crate) gives: bool,
    /// Takes prompts with a cache salt.
    pub(crate) salted: bool,
    pub(crate) role: Role,
    /// Tokens that a new request could get, those of one block, longest one.
    pub(crate) room: f64,
    pub(crate) block: f64,
    pub(crate) limit: f64,
    /// As in [`WorkerView`].
    pub(crate) relay_ms: f64,
}

impl Gate {
    fn of(worker: &WorkerView, names: &mut Names, kind: u32) -> Self {
        let abilities = &*worker.abilities;
        let serves = matches!(worker.phase, Phase::Serving | Phase::WarmingUp);
        let block = f64::from(abilities.block_tokens.max(1));
        Self {
            model: names.model(&worker.model),
            kind,
            slot: worker.slot.0,
            ready: serves && !worker.draining && !worker.suspect,
            gives: abilities.prefix_pull && !worker.suspect,
            salted: !abilities.no_cache_salt,
            role: worker.role,
            room: worker.available_blocks() as f64 * block,
            block,
            limit: (abilities.pool_blocks as f64 * block).min(f64::from(abilities.context_length)),
            relay_ms: worker.relay_ms,
        }
    }
}

/// One worker's row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts {
    pub(crate) prefix_pull: bool,
    pub(crate) streamed: bool,
    pub(crate) emits_first: bool,
    /// A step of prompts that runs there stops between layers for what is more
    /// urgent: none that also carries streams does.
    pub(crate) stops: bool,
    /// Whether prompts wait there.
    pub(crate) waits: bool,
    /// Number of its (digest, pairing): equal ones exchange KV.
    pub(crate) kind: u32,
    /// Number of its host; 0: not known.
    pub(crate) host: u32,
    pub(crate) slot: u32,
    /// Streams that decode there or will.
    pub(crate) batch: f64,
    /// Places in a step's batch.
    pub(crate) max_batch: f64,
    pub(crate) step: StepModel,
    /// A step of the streams, ms; that of an empty worker where there are none.
    pub(crate) step_ms: f64,
    /// What the streams add to a step that computes prompts, ms.
    pub(crate) company_ms: f64,
    /// When the running step should end, ms.
    pub(crate) step_ends_ms: f64,
    /// As in [`WorkerView`].
    pub(crate) relay_ms: f64,
    /// Tokens of a typical chunk there, and one over that.
    pub(crate) chunk: f64,
    pub(crate) per_chunk: f64,
    /// One over what a chunk there may take, ms; 0 where nothing bounds it.
    pub(crate) per_budget: f64,
    pub(crate) streams: PerClass<Streams>,
    /// Streams that end, and others that come in their place, a step.
    pub(crate) ending: f64,
    /// Streams that are likely to come.
    pub(crate) usual: Usual,
    pub(crate) line: Waiting,
    /// Tokens that a new request could get, and those of one block.
    pub(crate) room: f64,
    pub(crate) block: f64,
    /// Bytes of a token's KV.
    pub(crate) token_bytes: f64,
    /// What a token that lies on the host, or on disk, takes to come back, ms.
    pub(crate) reload_ms: [f64; 2],
    /// What its streams will hold more than now: mean and variance, tokens.
    pub(crate) growth: f64,
    pub(crate) growth_variance: f64,
}

impl Facts {
    pub(crate) fn of(
        worker: &WorkerView,
        targets: &ClassTargets,
        weights: &Weights,
        names: &mut Names,
    ) -> Self {
        let (batch, context) = (worker.decode_batch(), worker.decode_context());
        let there = worker.by_class();
        let step_ms = worker.step.decode_ms(batch, context);
        let (chunk, budget_ms) = chunk_there(worker, weights, &there.decoding, batch, step_ms);
        let abilities = &*worker.abilities;
        let block = f64::from(abilities.block_tokens.max(1));
        let token_bytes = abilities.block_bytes as f64 / block;
        let growth = |class: Class| worker.left[class.index()] / PEAK;
        let streams = |class: Class| f64::from(there.decoding[class.index()]);
        let sum = |of: &dyn Fn(Class) -> f64| Class::ALL.into_iter().map(of).sum();
        let mut row = Self {
            prefix_pull: abilities.prefix_pull,
            streamed: abilities.streamed_hand_off,
            emits_first: abilities.prefill_emits_first_token,
            stops: abilities.layer_preemption && batch == 0,
            waits: !worker.prompts.is_empty() || there.waiting_tokens != [0; 3],
            kind: names.kind(&worker.digest, &abilities.pairing),
            host: names.host(&abilities.host),
            slot: worker.slot.0,
            batch: f64::from(batch),
            max_batch: f64::from(abilities.max_batch.max(1)),
            step: worker.step,
            step_ms,
            company_ms: step_ms - worker.step.a_ms,
            step_ends_ms: worker.load.step_ends_ms,
            relay_ms: worker.relay_ms,
            chunk,
            per_chunk: chunk.recip(),
            per_budget: budget_ms.recip(),
            streams: Class::ALL.map(|class| Streams {
                weight: streams(class) * weights.itl[class.index()],
                left: worker.left[class.index()],
                target_ms: weights.itl_target_ms[class.index()].max(OWN_STEP_SHARE * step_ms),
            }),
            ending: Class::ALL
                .into_iter()
                .map(|class| (streams(class), worker.left[class.index()]))
                .filter(|(count, left)| *count > 0.0 && *left > 0.0)
                .map(|(count, left)| count / left)
                .sum(),
            usual: Usual::of(worker, weights),
            line: Waiting::default(),
            room: worker.available_blocks() as f64 * block,
            block,
            token_bytes,
            reload_ms: [abilities.reload.host, abilities.reload.disk]
                .map(|bytes_per_ms| token_bytes / bytes_per_ms.max(1) as f64),
            growth: sum(&|class| streams(class) * growth(class)),
            growth_variance: sum(&|class| streams(class) * growth(class) * growth(class)),
        };
        if row.waits {
            row.line = Waiting::of(&row, worker, &there, targets, weights);
        }
        row
    }

    /// A decode step with another stream of so many tokens, ms.
    pub(crate) fn joined_ms(&self, sequence: f64) -> f64 {
        self.step_ms + self.step.d_ms + self.step.e_ms * sequence
    }

    /// A decode step of one stream alone, ms.
    pub(crate) fn alone_ms(&self, sequence: f64) -> f64 {
        self.step.a_ms + self.step.d_ms + self.step.e_ms * sequence
    }

    /// Computing so many prompt tokens with such a sum of contexts.
    pub(crate) fn chunks(&self, tokens: f64, context: f64) -> Chunks {
        let tokens_ms = self.step.tokens_ms(tokens, context);
        Chunks {
            steps: ceil(self.steps(tokens, tokens_ms)),
            tokens_ms,
            step_ms: self.step.a_ms + self.company_ms,
        }
    }

    /// So many tokens of a backlog, ms: they share their steps with others, so
    /// the constant part counts by the token.
    pub(crate) fn flow_ms(&self, tokens: f64, context: f64) -> f64 {
        let tokens_ms = self.step.tokens_ms(tokens, context);
        let steps = self.steps(tokens, tokens_ms);
        steps * (self.step.a_ms + self.company_ms) + tokens_ms
    }

    /// Steps for so many tokens that take so long: a chunk fits the budget
    /// whatever its context, so late in a long prompt chunks hold fewer tokens.
    fn steps(&self, tokens: f64, tokens_ms: f64) -> f64 {
        (tokens * self.per_chunk).max(tokens_ms * self.per_budget)
    }

    /// KV bytes of so many tokens, in whole blocks.
    pub(crate) fn kv_bytes(&self, tokens: f64) -> f64 {
        ceil(tokens / self.block) * self.block * self.token_bytes
    }
}

/// A prompt as the steps that compute it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunks {
    /// How many.
    pub(crate) steps: f64,
    /// What the prompt adds to all of them, ms.
    pub(crate) tokens_ms: f64,
    /// What each of them takes without it: the constant part, and the streams
    /// that share it.
    step_ms: f64,
}

impl Chunks {
    /// All of it, ms.
    pub(crate) fn ms(&self) -> f64 {
        self.steps * self.step_ms + self.tokens_ms
    }
}

/// Rounds a number from 0 to 2^63 up; the processor's baseline has no
/// instruction for it, and this is called for every worker.
pub(crate) fn ceil(value: f64) -> f64 {
    let whole = value as i64 as f64;
    if whole < value { whole + 1.0 } else { whole }
}

/// Size of the chunks that a worker computes beside its streams.
fn chunk_there(
    worker: &WorkerView,
    weights: &Weights,
    decoding: &PerClass<u32>,
    batch: u32,
    step_ms: f64,
) -> (f64, f64) {
    let most = u64::from(worker.step.saturating_chunk.max(1));
    let bounds = ChunkBounds {
        itl_target_ms: weights.strictest_itl_ms(|class| decoding[class] > 0),
        layer_preemption: worker.abilities.layer_preemption,
        block_tokens: worker.abilities.block_tokens,
    };
    // At the beginning of a prompt: later ones of the same budget are smaller.
    let budget = bounds.budget_ms(batch > 0, step_ms);
    let least = u64::from(bounds.block_tokens.max(1)).min(most);
    let chunk = tokens_within(&worker.step, budget, 0, most).max(least) as f64;
    // At least a block, whatever it takes.
    let block_ms = worker.step.tokens_ms(least as f64, 0.0);
    (chunk, budget.max(block_ms).max(1e-3))
}

/// Numbers for names.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names {
    models: BTreeMap<Arc<str>, u32>,
    kinds: BTreeMap<(Arc<str>, Arc<str>), u32>,
    hosts: BTreeMap<Arc<str>, u32>,
}

impl Names {
    fn model(&mut self, name: &Arc<str>) -> u32 {
        if let Some(number) = self.models.get(name) {
            return *number;
        }
        let next = self.models.len() as u32;
        self.models.insert(Arc::clone(name), next);
        next
    }

    fn kind(&mut self, digest: &Arc<str>, pairing: &Arc<str>) -> u32 {
        let next = self.kinds.len() as u32;
        let key = (Arc::clone(digest), Arc::clone(pairing));
        *self.kinds.entry(key).or_insert(next)
    }

    fn host(&mut self, name: &Arc<str>) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let next = self.hosts.len() as u32 + 1;
        *self.hosts.entry(Arc::clone(name)).or_insert(next)
    }

    /// The number of a model that some worker has or had.
    pub(crate) fn find_model(&self, name: &str) -> Option<u32> {
        self.models.get(name).copied()
    }
}

/// The rows of all workers, in the order of their views: who may take a
/// request, what that costs at least, and what the terms ask. The first two are
/// read for every worker, the last for few.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    targets: ClassTargets,
    weights: Weights,
    pub(crate) names: Names,
    pub(crate) gates: Vec<Gate>,
    pub(crate) floors: Floors,
    pub(crate) rows: Vec<Facts>,
}

impl Table {
    pub(crate) fn new(targets: &ClassTargets) -> Self {
        Self {
            targets: *targets,
            weights: Weights::of(targets),
            names: Names::default(),
            gates: Vec::new(),
            floors: Floors::default(),
            rows: Vec::new(),
        }
    }

    /// Counts one worker anew: its place is in the table, or is the next one.
    pub(crate) fn count(&mut self, place: usize, worker: &WorkerView) {
        let row = Facts::of(worker, &self.targets, &self.weights, &mut self.names);
        let gate = Gate::of(worker, &mut self.names, row.kind);
        self.floors.count(place, &row);
        if place < self.rows.len() {
            self.gates[place] = gate;
            self.rows[place] = row;
        } else {
            self.gates.push(gate);
            self.rows.push(row);
        }
    }

    /// Takes one out; the last one takes its place.
    pub(crate) fn swap_remove(&mut self, place: usize) {
        self.gates.swap_remove(place);
        self.floors.swap_remove(place);
        self.rows.swap_remove(place);
    }

    /// Counts all workers anew.
    pub(crate) fn count_all(&mut self, workers: &[WorkerView]) {
        self.gates.clear();
        self.floors.clear();
        self.rows.clear();
        for (place, worker) in workers.iter().enumerate() {
            self.count(place, worker);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ceil;

    #[test]
    fn rounding_up_is_that_of_the_library() {
        for value in [0.0, 0.2, 1.0, 1.0001, 7.9999, 1e9, 1e12 + 0.5] {
            assert_eq!(ceil(value), f64::ceil(value), "{value}");
        }
    }
}
