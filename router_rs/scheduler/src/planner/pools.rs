//! What a controller is told, and what it makes of it over time.

use crate::deadline::{ClassTargets, Weights};
use crate::facts::{Facts, Names};
use crate::request::{Class, PerClass};
use crate::step_model::StepModel;
use crate::worker::{Cluster, Role, WorkerView};
use kvmesh_kv_index::WorkerSlot;
use std::sync::Arc;

/// A model's workers, and what came for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Pools {
    /// Name of the model.
    pub model: Arc<str>,
    /// Its workers, of every role.
    pub workers: Vec<PoolWorker>,
    /// What came.
    pub demand: Demand,
}

/// A worker, as far as the size of pools goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PoolWorker {
    /// Its number.
    pub slot: WorkerSlot,
    /// Its role.
    pub role: Role,
    /// Takes work: serves, does not drain, is not silent. Only such a one
    /// counts, and may change its role.
    pub steady: bool,
    /// Its step times.
    pub step: StepModel,
    /// Computing the prompts that wait there, ms.
    pub waiting_ms: PerClass<f64>,
    /// Streams that decode there or will.
    pub streams: PerClass<f64>,
    /// Sum of their contexts, tokens.
    pub context: f64,
    /// Most streams in a step.
    pub max_batch: f64,
    /// Share of its KV pool that running requests hold.
    pub room_used: f64,
}

/// What came for a model since its router began, also what admission turned
/// away for want of room: sums that only grow. Ones that fall are those of a
/// router that began anew.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Demand {
    /// Requests.
    pub requests: PerClass<f64>,
    /// Computing what is not cached of their prompts, alone on a worker, ms
    /// ([`crate::Estimate::work_ms`] or the `prefill` term of their plans).
    pub prompt_ms: PerClass<f64>,
    /// Output tokens expected of them.
    pub output_tokens: PerClass<f64>,
    /// Tokens that those output tokens attend to, all in all: of each the prompt,
    /// also what is cached of it, and half of the output. It is what decoding reads
    /// and holds of them.
    pub attended_tokens: PerClass<f64>,
    /// Of those prompts, what waits in routers now, ms: no sum.
    pub queued_ms: PerClass<f64>,
}

impl Demand {
    /// A request came: so many ms to compute of a prompt of so many tokens, and what is
    /// expected of its output.
    pub fn add(&mut self, class: Class, prompt_ms: f64, prompt_tokens: f64, output_tokens: f64) {
        let class = class.index();
        self.requests[class] += 1.0;
        self.prompt_ms[class] += prompt_ms;
        self.output_tokens[class] += output_tokens;
        self.attended_tokens[class] += output_tokens * (prompt_tokens + output_tokens / 2.0);
    }

    /// What came to two routers.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        let sum = |a: &PerClass<f64>, b: &PerClass<f64>| std::array::from_fn(|at| a[at] + b[at]);
        Self {
            requests: sum(&self.requests, &other.requests),
            prompt_ms: sum(&self.prompt_ms, &other.prompt_ms),
            output_tokens: sum(&self.output_tokens, &other.output_tokens),
            attended_tokens: sum(&self.attended_tokens, &other.attended_tokens),
            queued_ms: sum(&self.queued_ms, &other.queued_ms),
        }
    }
}

impl Pools {
    /// A model's workers in a cluster.
    pub fn of(
        model: &Arc<str>,
        cluster: &Cluster<'_>,
        demand: Demand,
        targets: &ClassTargets,
    ) -> Self {
        let workers = cluster.workers.iter();
        Self {
            model: Arc::clone(model),
            workers: workers
                .filter(|worker| worker.model == *model)
                .map(|worker| PoolWorker::of(worker, targets))
                .collect(),
            demand,
        }
    }

    pub(super) fn steady(&self) -> impl Iterator<Item = &PoolWorker> {
        self.workers.iter().filter(|worker| worker.steady)
    }
}

impl PoolWorker {
    /// A worker by its view.
    pub fn of(worker: &WorkerView, targets: &ClassTargets) -> Self {
        let weights = Weights::of(targets);
        let facts = Facts::of(worker, targets, &weights, &mut Names::default());
        let there = worker.by_class();
        let pool = worker.abilities.pool_blocks.max(1) as f64;
        Self {
            slot: worker.slot,
            role: worker.role,
            steady: worker.takes_work() && !worker.suspect,
            step: worker.step,
            waiting_ms: std::array::from_fn(|class| {
                let tokens = there.waiting_tokens[class] as f64;
                let each = tokens / f64::from(there.waiting[class].max(1));
                facts.flow_ms(tokens, tokens * each / 2.0)
            }),
            streams: there.decoding.map(f64::from),
            context: worker.decode_context() as f64,
            max_batch: f64::from(worker.abilities.max_batch.max(1)),
            room_used: 1.0 - (worker.available_blocks() as f64 / pool).min(1.0),
        }
    }

    /// What it has to do, in the unit of its role: ms of prompts, or streams.
    pub(super) fn work(&self) -> f64 {
        match self.role {
            Role::Prefill => self.waiting_ms.iter().sum(),
            _ => self.streams.iter().sum(),
        }
    }
}

/// What was seen of a model, smoothed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Watched {
    /// When, ms, and the sums then.
    last: Option<(f64, Demand)>,
    /// Time seen so far, ms.
    seen_ms: f64,
    /// Requests, ms of prompts, output tokens, and what these attend to, a ms.
    pub(super) requests: PerClass<f64>,
    pub(super) prompts: PerClass<f64>,
    tokens: PerClass<f64>,
    attended: PerClass<f64>,
    /// Ms of prompts that wait, streams, their contexts.
    pub(super) waiting_ms: PerClass<f64>,
    pub(super) streams: PerClass<f64>,
    pub(super) context: f64,
    /// Share of the decoding pool that is held.
    pub(super) room_used: f64,
    /// Half of `memory_ms` has passed.
    warm: bool,
}

impl Watched {
    pub(super) fn take(&mut self, pools: &Pools, memory_ms: f64, now_ms: f64) {
        let Some((at_ms, before)) = self.last else {
            self.last = Some((now_ms, pools.demand));
            self.take_levels(pools, 1.0);
            return;
        };
        let passed_ms = now_ms - at_ms;
        if passed_ms <= 0.0 {
            return;
        }
        self.last = Some((now_ms, pools.demand));
        self.seen_ms += passed_ms;
        self.warm = self.seen_ms >= memory_ms / 2.0;
        // At the beginning all that was seen weighs the same.
        let share = (1.0 - (-passed_ms / memory_ms).exp()).max(passed_ms / self.seen_ms);
        let rate = |of: fn(&Demand) -> &PerClass<f64>, kept: &mut PerClass<f64>| {
            for (class, kept) in kept.iter_mut().enumerate() {
                let (now, then) = (of(&pools.demand)[class], of(&before)[class]);
                let came = if now >= then { now - then } else { now };
                *kept += share * (came / passed_ms - *kept);
            }
        };
        rate(|demand| &demand.requests, &mut self.requests);
        rate(|demand| &demand.prompt_ms, &mut self.prompts);
        rate(|demand| &demand.output_tokens, &mut self.tokens);
        rate(|demand| &demand.attended_tokens, &mut self.attended);
        self.take_levels(pools, share);
    }

    fn take_levels(&mut self, pools: &Pools, share: f64) {
        let toward = |kept: &mut f64, value: f64| *kept += share * (value - *kept);
        let workers = || pools.steady();
        for class in 0..Class::ALL.len() {
            let there: f64 = workers().map(|worker| worker.waiting_ms[class]).sum();
            let waiting = there + pools.demand.queued_ms[class];
            toward(&mut self.waiting_ms[class], waiting);
            let streams = workers().map(|worker| worker.streams[class]).sum();
            toward(&mut self.streams[class], streams);
        }
        toward(
            &mut self.context,
            workers().map(|worker| worker.context).sum(),
        );
        let decoding = || workers().filter(|worker| worker.role != Role::Prefill);
        let held: f64 = decoding().map(|worker| worker.room_used).sum();
        toward(&mut self.room_used, held / decoding().count().max(1) as f64);
    }

    /// Whether enough was seen to say something.
    pub(super) fn knows(&self) -> bool {
        self.warm
    }

    /// Whether a class comes, or streams.
    pub(super) fn comes(&self, class: Class) -> bool {
        self.streams[class.index()] > 1e-9 || self.tokens[class.index()] > 1e-12
    }

    /// Workers that computing the prompts keeps busy.
    pub(super) fn prompt_load(&self) -> f64 {
        self.prompts.iter().sum()
    }

    /// Output tokens a ms.
    pub(super) fn token_rate(&self) -> f64 {
        self.tokens.iter().sum()
    }

    /// Tokens a ms that output tokens attend to.
    pub(super) fn attended_rate(&self) -> f64 {
        self.attended.iter().sum()
    }
}
