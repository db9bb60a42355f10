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
//!     └──────── dwelling (dwell_ms) ◀────── flipping: until the role is seen,
//!                                           or patience_ms
//! ```
//!
//! Where a pool has nobody to spare, its worker with the least to do becomes
//! one for both: so a pool of one worker is helped, too, and no role is ever
//! left empty. Such a worker is lent: it goes back, or on, as its pools need
//! it. One that was made `both` by somebody else never changes its role.
//!
//! Why it does not swing: a flip is undone only when what *comes* has changed
//! (prompt work or output tokens a second, neither of which depends on where
//! workers stand) by [`PlannerSettings::margin`] since.

mod outlook;
mod pools;

pub use outlook::Outlook;
pub use pools::{Demand, PoolWorker, Pools};

use crate::deadline::ClassTargets;
use crate::worker::Role;
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
    /// What is measured counts by e^-1 after so many ms.
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
    /// The role that is short, and since when, ms.
    short: Option<(Role, f64)>,
    last: Option<Flipped>,
    /// Workers that were made `both` here, and the roles they had.
    lent: BTreeMap<WorkerSlot, Role>,
}

/// The last flip.
#[derive(Debug, Clone, Copy)]
struct Flipped {
    worker: WorkerSlot,
    to: Role,
    relieves: Role,
    at_ms: f64,
    under_way: bool,
    /// What came then: prompt work, and output tokens, a ms.
    prompt_load: f64,
    token_rate: f64,
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
}

impl Model {
    fn look(&mut self, settings: &PlannerSettings, pools: &Pools, now_ms: f64) -> Advice {
        self.watched.take(pools, settings.memory_ms, now_ms);
        self.notice_role(settings, pools, now_ms);
        self.notice_lent(pools);
        let watched = self.watched;
        let expected = Expected::of(&watched, pools, settings);
        let split = Split::of(pools);
        let now = expected.outlook(split);
        let flip = self.decide(settings, pools, &expected, split, &now, now_ms);
        if let Ok(flip) = &flip {
            self.short = None;
            if flip.to == Role::Both {
                self.lent.insert(flip.worker, flip.from);
            }
            self.last = Some(Flipped {
                worker: flip.worker,
                to: flip.to,
                relieves: flip.relieves,
                at_ms: now_ms,
                under_way: true,
                prompt_load: self.watched.prompt_load(),
                token_rate: self.watched.token_rate(),
            });
        }
        Advice {
            model: Arc::clone(&pools.model),
            now,
            flip,
        }
    }

    /// Whether the last flip is done: its worker stands in the role, or is
    /// gone, or nobody does it.
    fn notice_role(&mut self, settings: &PlannerSettings, pools: &Pools, now_ms: f64) {
        let Some(last) = self.last.as_mut().filter(|last| last.under_way) else {
            return;
        };
        let worker = pools.workers.iter().find(|one| one.slot == last.worker);
        let done = worker.is_none_or(|one| one.role == last.to && one.steady);
        last.under_way = !done && now_ms - last.at_ms < settings.patience_ms;
    }

    /// Forgets that a worker was lent when somebody gave it another role, or
    /// did not make it `both` while that was the last that was asked for.
    fn notice_lent(&mut self, pools: &Pools) {
        let asked = self.last.filter(|last| last.to == Role::Both);
        self.lent.retain(|slot, home| {
            let worker = pools.workers.iter().find(|one| one.slot == *slot);
            worker.is_some_and(|one| {
                let to_come = asked.is_some_and(|last| last.worker == *slot);
                one.role == Role::Both || (one.role == *home && to_come)
            })
        });
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
        if self.last.is_some_and(|last| last.under_way) {
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
            if last.relieves != to && last.still_asked(&self.watched, settings.margin) {
                return Err(Hold::StillAsked);
            }
        }
        if now_ms - since < settings.confirm_ms {
            return Err(Hold::Confirming);
        }
        let keep = settings.keep.max(1);
        let change = given_back(pools, &self.lent, to, keep)
            .or_else(|| spare(pools, to, keep))
            .or_else(|| lend(pools, to))
            .ok_or(Hold::NobodyToSpare)?;
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

impl Flipped {
    /// Whether what comes is about what it was.
    fn still_asked(&self, watched: &Watched, margin: f64) -> bool {
        let (prompts, tokens) = (watched.prompt_load(), watched.token_rate());
        let (less, more) = (1.0 - margin, 1.0 + margin);
        match self.relieves {
            Role::Prefill => prompts >= less * self.prompt_load && tokens <= more * self.token_rate,
            _ => tokens >= less * self.token_rate && prompts <= more * self.prompt_load,
        }
    }
}

/// A worker, and the role it would have.
#[derive(Debug, Clone, Copy)]
struct Change {
    worker: WorkerSlot,
    from: Role,
    to: Role,
}

/// The pool that gives where this one is short.
fn giver(to: Role) -> Role {
    match to {
        Role::Prefill => Role::Decode,
        _ => Role::Prefill,
    }
}

/// The worker with the least to do of some that serve.
fn least<'a>(workers: impl Iterator<Item = &'a PoolWorker>) -> Option<&'a PoolWorker> {
    workers.min_by(|a, b| {
        let work = a.work().total_cmp(&b.work());
        work.then_with(|| a.slot.0.cmp(&b.slot.0))
    })
}

/// A lent worker that has this role alone from now on, if enough others do what
/// it stops doing.
fn given_back(
    pools: &Pools,
    lent: &BTreeMap<WorkerSlot, Role>,
    to: Role,
    keep: usize,
) -> Option<Change> {
    let is_lent =
        |worker: &&PoolWorker| worker.role == Role::Both && lent.contains_key(&worker.slot);
    let worker = least(pools.steady().filter(is_lent))?;
    let others = pools.steady().filter(|other| {
        other.slot != worker.slot && (other.role == giver(to) || other.role == Role::Both)
    });
    (others.count() >= keep).then_some(Change {
        worker: worker.slot,
        from: Role::Both,
        to,
    })
}

/// A worker of the other pool, if that keeps enough without it.
fn spare(pools: &Pools, to: Role, keep: usize) -> Option<Change> {
    let from = giver(to);
    let there = || pools.steady().filter(move |worker| worker.role == from);
    let worker = least(there()).filter(|_| there().count() > keep)?;
    Some(Change {
        worker: worker.slot,
        from,
        to,
    })
}

/// A worker of the other pool that is shared from now on.
fn lend(pools: &Pools, to: Role) -> Option<Change> {
    let from = giver(to);
    let worker = least(pools.steady().filter(|worker| worker.role == from))?;
    Some(Change {
        worker: worker.slot,
        from,
        to: Role::Both,
    })
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
