//! Changes of the index's content, made at once or kept for later.

use crate::change::Steps;
use crate::core::{Core, Tail};
use crate::left_right::{Kept, Pass};
use crate::worker::{CacheChange, Tier};
use smallvec::SmallVec;
use std::cell::RefCell;

/// A change of one copy, with what it needs borrowed.
#[derive(Debug)]
pub(crate) enum Edit<'a> {
    /// A worker comes, with its block size in units.
    Add(usize, usize),
    /// A worker goes.
    Drop(usize),
    /// A worker's cache changes; what that came to in the first copy.
    Apply(usize, &'a [CacheChange<'a>], RefCell<Steps>),
    /// What a worker holds becomes this.
    Replace(usize, &'a [(u64, Tier)]),
    /// Ends of runs go, to make room.
    Forget(&'a [Tail]),
}

impl<'a> Edit<'a> {
    pub(crate) fn apply(worker: usize, changes: &'a [CacheChange<'a>]) -> Self {
        Self::Apply(worker, changes, RefCell::default())
    }

    pub(crate) fn make(&self, core: &mut Core, pass: Pass) {
        core.begin(pass);
        match *self {
            Edit::Add(worker, units) => core.add_worker(worker, units),
            Edit::Drop(worker) => core.remove_worker(worker),
            Edit::Apply(worker, changes, ref steps) => match pass {
                Pass::First => *steps.borrow_mut() = core.apply(worker, changes),
                Pass::Second => core.follow(worker, changes, &steps.borrow()),
            },
            Edit::Replace(worker, blocks) => core.replace(worker, blocks),
            Edit::Forget(tails) => core.forget(tails),
        }
        core.end();
    }

    pub(crate) fn keep(&self) -> KeptEdit {
        match *self {
            Edit::Add(worker, units) => KeptEdit::Add(worker, units),
            Edit::Drop(worker) => KeptEdit::Drop(worker),
            Edit::Apply(worker, changes, _) => {
                let mut values = Vec::new();
                let parts = changes
                    .iter()
                    .map(|change| Part::of(change, &mut values))
                    .collect();
                KeptEdit::Apply(worker, parts, values)
            }
            Edit::Replace(worker, blocks) => KeptEdit::Replace(worker, blocks.to_vec()),
            Edit::Forget(tails) => KeptEdit::Forget(tails.to_vec()),
        }
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
    Drop(usize),
    Apply(usize, SmallVec<[Part; 2]>, Vec<u64>),
    Replace(usize, Vec<(u64, Tier)>),
    Forget(Vec<Tail>),
}

impl Kept<Core> for KeptEdit {
    fn make(&self, core: &mut Core, pass: Pass) {
        core.begin(pass);
        match self {
            Self::Add(worker, units) => core.add_worker(*worker, *units),
            Self::Drop(worker) => core.remove_worker(*worker),
            Self::Apply(worker, parts, values) => {
                let mut values = values.as_slice();
                for part in parts {
                    let _ = core.apply(*worker, &[part.change(&mut values)]);
                }
            }
            Self::Replace(worker, blocks) => core.replace(*worker, blocks),
            Self::Forget(tails) => core.forget(tails),
        }
        core.end();
    }

    /// Values, and some for what goes with them.
    fn weight(&self) -> usize {
        match self {
            Self::Apply(_, parts, values) => 16 + 4 * parts.len() + values.len(),
            Self::Replace(_, blocks) => 16 + 2 * blocks.len(),
            _ => 16,
        }
    }
}
