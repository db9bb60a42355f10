//! What to expect of pools of a size: first tokens and steps.
//!
//! Of prompts: a fluid for the backlog (what waits, and what comes over what
//! is computed, up to a horizon) and M/M/1's mean wait for the rest, classes
//! served in their order. Of streams: the batch at which a worker's step makes
//! as many tokens as are asked of it, `B = g step(B)`; beyond the largest batch
//! tokens come as much later as too many are asked for. No wait and no batch
//! is under what is measured.

use super::pools::{Pools, Watched};
use super::{ClassTargets, PlannerSettings};
use crate::chunk::OWN_STEP_SHARE;
use crate::request::{Class, PerClass};
use crate::step_model::StepModel;
use crate::worker::Role;

/// Beyond this use a queue is as long as its backlog says.
const FULL: f64 = 0.95;
/// Pools are full from here on: what is held grows in jumps.
const ROOM_FULL: f64 = 0.9;

/// What is expected of a model's pools at their sizes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    /// Workers that only compute prompts.
    pub prefill: usize,
    /// Workers that only decode.
    pub decode: usize,
    /// Workers that do both: each counts half in either pool.
    pub both: usize,
    /// Mean time to the first token, ms; 0 for a class that does not come.
    pub ttft_ms: PerClass<f64>,
    /// Between tokens, ms; 0 where nothing streams.
    pub itl_ms: f64,
    /// Worst TTFT over its target.
    pub prefill_pressure: f64,
    /// Worst of ITL over its target, batch over its most, KV held over nine
    /// tenths of the pool.
    pub decode_pressure: f64,
}

impl Outlook {
    /// The worse of both pressures.
    pub fn worst(&self) -> f64 {
        self.prefill_pressure.max(self.decode_pressure)
    }

    /// The pool that is short, if one is: the worse one.
    pub(super) fn shortest(&self, relieve_at: f64) -> Option<Role> {
        if self.worst() <= relieve_at {
            None
        } else if self.prefill_pressure > self.decode_pressure {
            Some(Role::Prefill)
        } else {
            Some(Role::Decode)
        }
    }
}

/// Sizes of the pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Split {
    prefill: usize,
    decode: usize,
    both: usize,
}

impl Split {
    pub(super) fn of(pools: &Pools) -> Self {
        let of = |role| pools.steady().filter(|worker| worker.role == role).count();
        Self {
            prefill: of(Role::Prefill),
            decode: of(Role::Decode),
            both: of(Role::Both),
        }
    }

    /// One worker of another role.
    pub(super) fn changed(mut self, from: Role, to: Role) -> Self {
        let gone = self.of_role(from);
        *gone = gone.saturating_sub(1);
        *self.of_role(to) += 1;
        self
    }

    fn of_role(&mut self, role: Role) -> &mut usize {
        match role {
            Role::Prefill => &mut self.prefill,
            Role::Decode => &mut self.decode,
            Role::Both => &mut self.both,
        }
    }

    /// Workers that do a stage; one for both does half of either.
    pub(super) fn doing(self, stage: Role) -> f64 {
        match stage {
            Role::Prefill => self.computing(),
            _ => self.decoding(),
        }
    }

    fn computing(self) -> f64 {
        self.prefill as f64 + self.both as f64 / 2.0
    }

    fn decoding(self) -> f64 {
        self.decode as f64 + self.both as f64 / 2.0
    }

    /// Workers whose KV pools streams can be in: all of a pool is there, also
    /// where half of the time is.
    fn holding(self) -> f64 {
        (self.decode + self.both) as f64
    }
}

/// What expectations are made from.
pub(super) struct Expected<'a> {
    watched: &'a Watched,
    targets: &'a ClassTargets,
    horizon_ms: f64,
    /// The mean of the workers' steps.
    step: StepModel,
    max_batch: f64,
    /// Workers that hold streams, as things stand.
    holding: f64,
}

impl<'a> Expected<'a> {
    pub(super) fn of(watched: &'a Watched, pools: &Pools, settings: &'a PlannerSettings) -> Self {
        let count = pools.steady().count().max(1) as f64;
        let mean = |of: fn(&StepModel) -> f64| {
            let sum: f64 = pools.steady().map(|worker| of(&worker.step)).sum();
            sum / count
        };
        Self {
            watched,
            targets: &settings.targets,
            horizon_ms: settings.horizon_ms,
            step: StepModel {
                a_ms: mean(|step| step.a_ms),
                b_ms: mean(|step| step.b_ms),
                c_ms: mean(|step| step.c_ms),
                d_ms: mean(|step| step.d_ms),
                e_ms: mean(|step| step.e_ms),
                ..StepModel::default()
            },
            max_batch: pools
                .steady()
                .map(|worker| worker.max_batch)
                .fold(f64::INFINITY, f64::min),
            holding: Split::of(pools).holding(),
        }
    }

    pub(super) fn outlook(&self, split: Split) -> Outlook {
        let ttft_ms = self.ttft_ms(split.computing());
        let ttft = Class::ALL.map(|class| ttft_ms[class.index()] / self.targets.of(class).ttft_ms);
        let (itl_ms, decode_pressure) = self.decode(split);
        Outlook {
            prefill: split.prefill,
            decode: split.decode,
            both: split.both,
            ttft_ms,
            itl_ms,
            prefill_pressure: ttft.into_iter().fold(0.0, f64::max),
            decode_pressure,
        }
    }

    fn ttft_ms(&self, workers: f64) -> PerClass<f64> {
        let watched = self.watched;
        let (mut load, mut waiting_ms, mut rate) = (0.0, 0.0, 0.0);
        Class::ALL.map(|class| {
            let class = class.index();
            load += watched.prompts[class];
            waiting_ms += watched.waiting_ms[class];
            rate += watched.requests[class];
            if watched.requests[class] <= 1e-9 {
                return 0.0;
            }
            let workers = workers.max(1e-3);
            let each_ms = load / rate;
            let used = (load / workers).min(FULL);
            let behind = used / (1.0 - used) * each_ms / workers;
            let grows_ms = waiting_ms + (load - workers) * self.horizon_ms;
            let backlog = waiting_ms.max(grows_ms) / workers;
            watched.prompts[class] / watched.requests[class] + behind.max(backlog)
        })
    }

    /// Time between tokens, and the pressure of the workers that decode.
    fn decode(&self, split: Split) -> (f64, f64) {
        let watched = self.watched;
        let there: f64 = watched.streams.iter().sum();
        let tokens = watched.token_rate();
        if there <= 1e-9 && tokens <= 1e-12 {
            return (0.0, 0.0);
        }
        let workers = split.decoding().max(1e-3);
        let context = watched.context / there.max(1.0);
        let each_ms = self.step.d_ms + self.step.e_ms * context;
        let asked = tokens / workers;
        // B = g (a + b B), or as many as there may be: what is asked beyond
        // that waits for its turn.
        let rest = 1.0 - asked * each_ms;
        let most = self.max_batch.max(1.0);
        let steady = if rest > 0.0 {
            (asked * self.step.a_ms / rest).min(most)
        } else {
            most
        };
        let batch = steady.max(there / workers);
        let full_ms = self.step.a_ms + each_ms * most;
        let over = (asked * full_ms / most).max(batch / most);
        let itl_ms = (self.step.a_ms + each_ms * batch.clamp(1.0, most)) * over.max(1.0);
        let own_ms = OWN_STEP_SHARE * (self.step.a_ms + each_ms);
        let itl = Class::ALL.map(|class| match self.targets.of(class).itl_ms {
            Some(target) if watched.comes(class) => itl_ms / target.max(own_ms),
            _ => 0.0,
        });
        let room = watched.room_used * self.holding / split.holding().max(1e-3) / ROOM_FULL;
        let pressure = itl.into_iter().fold(room, f64::max);
        (itl_ms, pressure.max(over))
    }
}
