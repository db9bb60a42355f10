//! Which worker changes its role where a pool is short.

use super::{PoolWorker, Pools};
use crate::worker::Role;
use kvmesh_kv_index::WorkerSlot;
use std::collections::BTreeMap;

/// A worker, and the role it would have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    pub(super) worker: WorkerSlot,
    pub(super) from: Role,
    pub(super) to: Role,
}

impl Change {
    /// The one to make where this pool is short: a lent worker first, then one that its
    /// pool can spare, then one to share. `keep`: workers that each pool keeps.
    pub(super) fn for_pool(
        pools: &Pools,
        lent: &BTreeMap<WorkerSlot, Role>,
        to: Role,
        keep: usize,
    ) -> Option<Self> {
        given_back(pools, lent, to, keep)
            .or_else(|| spare(pools, to, keep))
            .or_else(|| lend(pools, to))
    }
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
