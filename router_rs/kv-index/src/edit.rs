//! Changes of the index's content, made at once or kept for later.

use crate::change::Steps;
use crate::core::{Core, Tail};
use crate::left_right::{Kept, Pass};
use crate::run::SEGMENT;
use crate::worker::{CacheChange, Tier, WorkerSlot};
use smallvec::SmallVec;
use std::cell::RefCell;

/// Values that a change has at most that may be put off: 64 events of 32 blocks,
/// some 0.2 ms at 10 M values a second. Above it, and where it walks over all runs,
/// it is heavy.
const LIGHT: usize = 2_048;

/// Changes of workers' caches.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Batch<'a> {
    /// Of one worker.
    One(usize, &'a [CacheChange<'a>]),
    /// Each with its worker.
    Many(&'a [(WorkerSlot, CacheChange<'a>)]),
}

impl<'a> Batch<'a> {
    pub(crate) fn get(&self, at: usize) -> Option<(usize, CacheChange<'a>)> {
        match self {
            Self::One(worker, changes) => Some((*worker, *changes.get(at)?)),
            Self::Many(changes) => changes.get(at).map(|(slot, change)| (slot.at(), *change)),
        }
    }

    fn is_heavy(self) -> bool {
        let values = self.each().map(|(_, change)| match change {
            CacheChange::Stored { chain, .. }
            | CacheChange::StoredAfter { chain, .. }
            | CacheChange::Removed { chain, .. } => chain.len(),
            // Walks over all runs.
            CacheChange::Cleared => LIGHT + 1,
        });
        values.sum::<usize>() > LIGHT
    }

    pub(crate) fn each(self) -> impl Iterator<Item = (usize, CacheChange<'a>)> {
        (0..).map_while(move |at| self.get(at))
    }
}

/// A change of one copy, with what it needs borrowed.
#[derive(Debug)]
pub(crate) enum Edit<'a> {
    /// A worker comes, with its block size in units.
    Add(usize, usize),
    /// A worker goes.
    Drop(usize),
    /// Caches change; what that came to in the first copy.
    Apply(Batch<'a>, RefCell<Steps>),
    /// What a worker holds becomes this.
    Replace(usize, &'a [(u64, Tier)]),
    /// Ends of runs go, to make room.
    Forget(&'a [Tail]),
}

impl<'a> Edit<'a> {
    pub(crate) fn apply(batch: Batch<'a>) -> Self {
        Self::Apply(batch, RefCell::default())
    }

    pub(crate) fn make(&self, core: &mut Core, pass: Pass) {
        core.begin(pass);
        match *self {
            Edit::Add(worker, units) => core.add_worker(worker, units),
            Edit::Drop(worker) => core.remove_worker(worker),
            Edit::Apply(batch, ref steps) => match pass {
                Pass::First => *steps.borrow_mut() = core.apply(batch),
                Pass::Second => core.follow(batch, &steps.borrow()),
            },
            Edit::Replace(worker, blocks) => core.replace(worker, blocks),
            Edit::Forget(tails) => core.forget(tails),
        }
        core.end();
    }

    /// The same to be made later, with what it came to where one copy has it;
    /// none where it is heavy.
    pub(crate) fn keep(&self) -> Option<KeptEdit> {
        Some(match *self {
            Edit::Add(worker, units) => KeptEdit::Add(worker, units),
            // They walk over all runs.
            Edit::Drop(_) | Edit::Replace(..) => return None,
            Edit::Apply(batch, _) if batch.is_heavy() => return None,
            Edit::Apply(batch, ref steps) => {
                let mut values = Vec::new();
                let parts = batch
                    .each()
                    .map(|(worker, change)| (worker, Part::of(&change, &mut values)))
                    .collect();
                KeptEdit::Apply(parts, values, steps.take())
            }
            Edit::Forget(tails) => KeptEdit::Forget(tails.to_vec()),
        })
    }
}

/// A [`CacheChange`] without its chain.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    Stored(Option<u64>, Tier, usize),
    Removed(Tier, usize),
    Cleared,
}

impl Part {
    fn of(change: &CacheChange<'_>, values: &mut Vec<u64>) -> Self {
        let (part, chain) = match *change {
            CacheChange::Stored { chain, tier } => (Self::Stored(None, tier, chain.len()), chain),
            CacheChange::StoredAfter {
                parent,
                chain,
                tier,
            } => (Self::Stored(Some(parent), tier, chain.len()), chain),
            CacheChange::Removed { chain, tier } => (Self::Removed(tier, chain.len()), chain),
            CacheChange::Cleared => (Self::Cleared, [].as_slice()),
        };
        values.extend_from_slice(chain);
        part
    }

    /// The change again; takes its chain off the front of `values`.
    fn change<'a>(self, values: &mut &'a [u64]) -> CacheChange<'a> {
        let length = match self {
            Self::Stored(_, _, length) | Self::Removed(_, length) => length,
            Self::Cleared => 0,
        };
        let (chain, rest) = values.split_at(length);
        *values = rest;
        match self {
            Self::Stored(None, tier, _) => CacheChange::Stored { chain, tier },
            Self::Stored(Some(parent), tier, _) => CacheChange::StoredAfter {
                parent,
                chain,
                tier,
            },
            Self::Removed(tier, _) => CacheChange::Removed { chain, tier },
            Self::Cleared => CacheChange::Cleared,
        }
    }
}

/// An [`Edit`] that waits until a copy is free.
#[derive(Debug)]
pub(crate) enum KeptEdit {
    Add(usize, usize),
    Apply(SmallVec<[(usize, Part); 1]>, Vec<u64>, Steps),
    Forget(Vec<Tail>),
}

impl Kept<Core> for KeptEdit {
    fn make(&mut self, core: &mut Core, pass: Pass) {
        core.begin(pass);
        match self {
            Self::Add(worker, units) => core.add_worker(*worker, *units),
            Self::Apply(parts, values, steps) => {
                let mut values = values.as_slice();
                let changes: SmallVec<[_; 1]> = parts
                    .iter()
                    .map(|(worker, part)| (WorkerSlot(*worker as u32), part.change(&mut values)))
                    .collect();
                match pass {
                    Pass::First => *steps = core.apply(Batch::Many(&changes)),
                    Pass::Second => core.follow(Batch::Many(&changes), steps),
                }
            }
            Self::Forget(tails) => core.forget(tails),
        }
        core.end();
    }

    /// Values, and some for what goes with them.
    fn weight(&self) -> usize {
        match self {
            Self::Apply(parts, values, _) => 16 + 4 * parts.len() + values.len(),
            Self::Forget(tails) => 16 + SEGMENT * tails.len(),
            Self::Add(..) => 16,
        }
    }
}
