//! How many workers of a model compute prompts, and how many decode.
//!
//! A controller that gives a worker of one pool to the other. It is asked
//! again and again, every second or so, with what is known of each model's
//! workers and of what came ([`Pools`]); it says what it expects ([`Outlook`])
//! and, rarely, which worker should change its role ([`Flip`]). What it says
//! may be done or not: it looks at roles as they are.
//!
//! ```text
//!            pressure of one pool > relieve_at
//!   enough ──────────────────────────────────▶ confirming
//!     ▲  ▲          pressure gone                │ for confirm_ms, and the flip
//!     │  └───────────────────────────────────────┤ helps, spares its pool, and
//!     │                                          ▼ undoes none still asked for
//!     │                     (again at each look) recommended
//!     │                                          │ somebody does it
//!     └──────── dwelling (dwell_ms) ◀────── flipping: until the role is seen;
//!                                           after patience_ms as if never begun
//! ```
//!
//! Looking changes nothing: a flip is recommended to whoever looks until
//! somebody does it ([`Planner::began`], or the role is seen).
//!
//! Where a pool has nobody to spare, its worker with the least to do becomes
//! one for both: so a pool of one worker is helped, too, and no role is ever
//! left empty. Such a worker is lent: it goes back, or on, as its pools need
//! it. One that was made `both` by somebody else never changes its role.
//!
//! Why it does not swing: a flip is undone only when what *comes* for each worker
//! has changed by [`PlannerSettings::margin`] since, and stays so: prompt work,
//! output tokens, or the contexts that these attend to, a second. None of it
//! depends on where workers stand; pools change only by flips, which what is
//! compared has in it, and by others, whose changes count like those of a load.

mod change;
mod outlook;
mod pools;

pub use outlook::Outlook;
pub use pools::{Demand, PoolWorker, Pools};

use crate::deadline::ClassTargets;
use crate::worker::Role;
use change::Change;
use kvmesh_kv_index::WorkerSlot;
use outlook::{Expected, Split};
use pools::Watched;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Settings of a [`Planner`].
#[derive(Debug, Clone, PartialEq)]
pub struct PlannerSettings {
    /// What the classes are held to.
    pub targets: ClassTargets,
    /// A pool is short from this pressure on: predicted over target, the worst
    /// class.
    pub relieve_at: f64,
    /// Least share by which a flip must lower the worse pool's pressure.
    pub gain: f64,
    /// How long a pool must be short before a worker is given to it, ms.
    pub confirm_ms: f64,
    /// Least time between two flips of a model, ms.
    pub dwell_ms: f64,
    /// How long a flip may take before it counts as not done, ms.
    pub patience_ms: f64,
    /// Share by which what comes must have changed before a flip is undone.
    pub margin: f64,
    /// What is measured counts by e^-1 after so many ms. Between looks that are
    /// further apart nothing is taken to have lasted.
    pub memory_ms: f64,
    /// How far ahead a growing backlog is looked at, ms.
    pub horizon_ms: f64,
    /// Workers that each pool keeps; at least 1.
    pub keep: usize,
}

impl Default for PlannerSettings {
    fn default() -> Self {
        Self {
            targets: ClassTargets::default(),
            relieve_at: 1.0,
            gain: 0.1,
            confirm_ms: 10_000.0,
            dwell_ms: 60_000.0,
            patience_ms: 30_000.0,
            margin: 0.25,
            memory_ms: 30_000.0,
            horizon_ms: 30_000.0,
            keep: 1,
        }
    }
}

/// A worker that should change its role.
#[derive(Debug, Clone, PartialEq)]
pub struct Flip {
    /// The worker.
    pub worker: WorkerSlot,
    /// Its role.
    pub from: Role,
    /// The role it should have.
    pub to: Role,
    /// The pool that is short: prefill or decode. `to`, or half of a worker
    /// for both.
    pub relieves: Role,
    /// What is expected when it has.
    pub after: Outlook,
}

/// Why no worker changes its role now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Each pool is within its targets.
    Enough,
    /// Too little was seen yet.
    Learning,
    /// A pool is short, but not for long enough yet.
    Confirming,
    /// A flip is under way.
    Flipping,
    /// The last flip was a short while ago.
    Dwelling,
    /// The other pool has nobody to spare.
    NobodyToSpare,
    /// It would help too little.
    NoGain,
    /// It would undo the last flip, and what asked for that one still comes.
    StillAsked,
}

/// What a [`Planner`] says of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Advice {
    /// Name of the model.
    pub model: Arc<str>,
    /// What is expected as things stand.
    pub now: Outlook,
    /// The flip, or why there is none.
    pub flip: Result<Flip, Hold>,
}

/// Recommends role flips; at most one at a time for each model.
#[derive(Debug, Clone)]
pub struct Planner {
    settings: PlannerSettings,
    models: BTreeMap<Arc<str>, Model>,
}

/// What is kept of a model.
#[derive(Debug, Clone, Default)]
struct Model {
    watched: Watched,
    /// When it was looked at last, ms.
    looked_ms: Option<f64>,
    /// The role that is short, and since when, ms.
    short: Option<(Role, f64)>,
    /// The last flip that was done.
    last: Option<Flipped>,
    /// The flip that is being done.
    under_way: Option<Flipped>,
    /// What was recommended of late, or begun and not seen: whoever does it,
    /// that is a flip. By worker.
    advised: BTreeMap<WorkerSlot, Advised>,
    /// Workers that were made `both` here, and the roles they had.
    lent: BTreeMap<WorkerSlot, Role>,
}

/// A flip that was recommended.
#[derive(Debug, Clone, Copy)]
struct Advised {
    from: Role,
    to: Role,
    relieves: Role,
    /// Sizes of the pools once it is done.
    after: Split,
    /// When at last, ms.
    at_ms: f64,
    /// It was begun since, and nothing came of it.
    tried: bool,
}

/// A flip that was begun.
#[derive(Debug, Clone, Copy)]
struct Flipped {
    worker: WorkerSlot,
    advised: Advised,
    at_ms: f64,
    came: Came,
}

/// What comes for each worker of pools, a ms: of prompt work, of output tokens, and of
/// tokens that these attend to.
#[derive(Debug, Clone, Copy)]
struct Came {
    prompts: f64,
    tokens: f64,
    attended: f64,
}

impl Planner {
    /// A controller that has seen nothing.
    pub fn new(settings: PlannerSettings) -> Self {
        Self {
            settings,
            models: BTreeMap::new(),
        }
    }

    /// Its settings.
    pub fn settings(&self) -> &PlannerSettings {
        &self.settings
    }

    /// Looks at all models. Those that are not among `pools` are forgotten.
    /// `now_ms` never goes back.
    pub fn look(&mut self, pools: &[Pools], now_ms: f64) -> Vec<Advice> {
        self.models
            .retain(|model, _| pools.iter().any(|pool| pool.model == *model));
        let settings = &self.settings;
        let look = |pools: &Pools| {
            let model = self.models.entry(Arc::clone(&pools.model)).or_default();
            model.look(settings, pools, now_ms)
        };
        pools.iter().map(look).collect()
    }

    /// A worker is told to take this role. It counts where it was recommended a
    /// short while ago; what else operators do to roles is not this controller's.
    pub fn began(&mut self, worker: WorkerSlot, to: Role, now_ms: f64) {
        for model in self.models.values_mut() {
            let advised = model.advised.get(&worker);
            if let Some(advised) = advised.filter(|advised| advised.to == to) {
                model.under_way = Some(model.flipped(worker, *advised, now_ms));
                model.short = None;
            }
        }
    }

    /// What was begun of a worker was not done: it refused, or was not reached.
    pub fn failed(&mut self, worker: WorkerSlot, now_ms: f64) {
        for model in self.models.values_mut() {
            if model.under_way.is_some_and(|flip| flip.worker == worker) {
                model.in_vain(now_ms);
            }
        }
    }
}

impl Model {
    fn look(&mut self, settings: &PlannerSettings, pools: &Pools, now_ms: f64) -> Advice {
        let before_ms = self.looked_ms.replace(now_ms);
        if before_ms.is_some_and(|before_ms| now_ms - before_ms > settings.memory_ms) {
            // Who did not look cannot say that it was short all the while.
            self.short = None;
        }
        self.watched.take(pools, settings.memory_ms, now_ms);
        self.notice(settings, pools, now_ms);
        let watched = self.watched;
        let expected = Expected::of(&watched, pools, settings);
        let split = Split::of(pools);
        let now = expected.outlook(split);
        let flip = self.decide(settings, pools, &expected, split, &now, now_ms);
        if let Ok(flip) = &flip {
            let advised = Advised {
                from: flip.from,
                to: flip.to,
                relieves: flip.relieves,
                after: split.changed(flip.from, flip.to),
                at_ms: now_ms,
                tried: false,
            };
            self.advised.insert(flip.worker, advised);
        }
        Advice {
            model: Arc::clone(&pools.model),
            now,
            flip,
        }
    }

    fn flipped(&self, worker: WorkerSlot, advised: Advised, at_ms: f64) -> Flipped {
        Flipped {
            worker,
            advised,
            at_ms,
            came: Came::of(&self.watched, advised.after),
        }
    }

    /// What became of flips: their worker stands in the role, whoever saw to that;
    /// or it does not for too long, which is as if it had never begun.
    fn notice(&mut self, settings: &PlannerSettings, pools: &Pools, now_ms: f64) {
        let worker = |slot| pools.workers.iter().find(|one| one.slot == slot);
        let seen = |slot, to| worker(slot).is_some_and(|one| one.role == to && one.steady);
        if let Some(flip) = self.under_way {
            if seen(flip.worker, flip.advised.to) {
                self.done(flip);
            } else if worker(flip.worker).is_none() || now_ms - flip.at_ms >= settings.patience_ms {
                self.in_vain(now_ms);
            }
        }
        let fresh = |advised: &Advised| now_ms - advised.at_ms < settings.patience_ms;
        self.advised.retain(|_, advised| fresh(advised));
        let mut all = self.advised.iter();
        let other = all.find(|(slot, advised)| seen(**slot, advised.to));
        if let Some((slot, advised)) = other.map(|(slot, advised)| (*slot, *advised)) {
            self.done(self.flipped(slot, advised, now_ms));
        }
        // Another role than that of one that is lent was given to it by somebody else.
        self.lent
            .retain(|slot, _| worker(*slot).is_some_and(|one| one.role == Role::Both));
    }

    /// What is under way counts as never begun. It may be late: where its role is seen
    /// soon it was done after all.
    fn in_vain(&mut self, now_ms: f64) {
        if let Some(flip) = self.under_way.take() {
            let advised = Advised {
                at_ms: now_ms,
                tried: true,
                ..flip.advised
            };
            self.advised.insert(flip.worker, advised);
        }
    }

    fn done(&mut self, flip: Flipped) {
        if flip.advised.to == Role::Both {
            self.lent.insert(flip.worker, flip.advised.from);
        }
        self.last = Some(flip);
        (self.under_way, self.short) = (None, None);
        self.advised.clear();
    }

    fn decide(
        &mut self,
        settings: &PlannerSettings,
        pools: &Pools,
        expected: &Expected<'_>,
        split: Split,
        now: &Outlook,
        now_ms: f64,
    ) -> Result<Flip, Hold> {
        if self.under_way.is_some() {
            self.short = None;
            return Err(Hold::Flipping);
        }
        if !self.watched.knows() {
            return Err(Hold::Learning);
        }
        let Some(to) = now.shortest(settings.relieve_at) else {
            self.short = None;
            return Err(Hold::Enough);
        };
        let since = match self.short {
            Some((role, since)) if role == to => since,
            _ => now_ms,
        };
        self.short = Some((to, since));
        if let Some(last) = &self.last {
            if now_ms - last.at_ms < settings.dwell_ms {
                return Err(Hold::Dwelling);
            }
            let came = Came::of(&self.watched, split);
            if last.advised.relieves != to && last.still_asked(came, settings.margin) {
                // It is confirmed from when that is over: no worker that is away for a
                // moment undoes a flip.
                self.short = Some((to, now_ms));
                return Err(Hold::StillAsked);
            }
        }
        if now_ms - since < settings.confirm_ms {
            return Err(Hold::Confirming);
        }
        let keep = settings.keep.max(1);
        let change = Change::for_pool(pools, &self.lent, to, keep).ok_or(Hold::NobodyToSpare)?;
        let change = self.said_before(pools, change);
        let after = expected.outlook(split.changed(change.from, change.to));
        if after.worst() > now.worst() * (1.0 - settings.gain) {
            return Err(Hold::NoGain);
        }
        Ok(Flip {
            worker: change.worker,
            from: change.from,
            to: change.to,
            relieves: to,
            after,
        })
    }
}

impl Model {
    /// The same change, of the worker of which it was said before: whoever looks next is
    /// told no other one.
    fn said_before(&self, pools: &Pools, change: Change) -> Change {
        let same = |slot: &WorkerSlot| {
            let mut steady = pools.steady();
            let there = steady.any(|one| one.slot == *slot && one.role == change.from);
            let lent = self.lent.contains_key(slot) || change.from != Role::Both;
            there && lent
        };
        let mut said = self.advised.iter();
        let before = said.find(|(slot, advised)| {
            let change_is = (advised.from, advised.to) == (change.from, change.to);
            change_is && !advised.tried && same(slot)
        });
        let worker = before.map_or(change.worker, |(slot, _)| *slot);
        Change { worker, ..change }
    }
}

impl Came {
    fn of(watched: &Watched, split: Split) -> Self {
        let each = |of: f64, stage| of / split.doing(stage).max(1e-3);
        Self {
            prompts: each(watched.prompt_load(), Role::Prefill),
            tokens: each(watched.token_rate(), Role::Decode),
            attended: each(watched.attended_rate(), Role::Decode),
        }
    }
}

impl Flipped {
    /// Whether what comes is about what it was.
    fn still_asked(&self, now: Came, margin: f64) -> bool {
        let then = self.came;
        let still = |now: f64, then: f64| now >= (1.0 - margin) * then;
        let no_more = |now: f64, then: f64| now <= (1.0 + margin) * then;
        match self.advised.relieves {
            Role::Prefill => {
                still(now.prompts, then.prompts)
                    && no_more(now.tokens, then.tokens)
                    && no_more(now.attended, then.attended)
            }
            _ => {
                still(now.tokens, then.tokens)
                    && still(now.attended, then.attended)
                    && no_more(now.prompts, then.prompts)
            }
        }
    }
}

#[cfg(test)]
mod tests;
