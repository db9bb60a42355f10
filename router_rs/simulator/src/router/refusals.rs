//! Who had no room for a request, and when they are asked again.

use kvmesh_kv_index::WorkerSlot;
use kvmesh_scheduler::Load;
use std::collections::BTreeMap;

/// Refusals after which a request waits for room rather than for any report, as in the
/// session (PROTOCOLS 2). A worker may refuse what its reports promise: blocks that the
/// request shares count as evictable, and are no room for the rest of it.
const REFUSALS: u8 = 3;

/// What was refused, by request.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    requests: BTreeMap<u32, Refused>,
}

#[derive(Debug, Default)]
struct Refused {
    /// Since somebody took it.
    times: u8,
    by: Vec<(WorkerSlot, Again)>,
}

/// When a worker is asked again.
#[derive(Debug, Clone, Copy)]
enum Again {
    /// Once it reports.
    Reported,
    /// Once it reports more room than this, tokens.
    Room(u64),
}

impl Refusals {
    /// Those that are not to be asked.
    pub(super) fn workers(&self, request: u32) -> Vec<WorkerSlot> {
        let refused = self.requests.get(&request).map(|refused| &refused.by);
        let by = refused.into_iter().flatten();
        by.map(|(worker, _)| *worker).collect()
    }

    /// A worker that said `load` has no room.
    pub(super) fn add(&mut self, request: u32, worker: WorkerSlot, load: &Load) {
        let refused = self.requests.entry(request).or_default();
        refused.times = refused.times.saturating_add(1);
        let again = if refused.times > REFUSALS {
            Again::Room(room(load))
        } else {
            Again::Reported
        };
        refused.by.push((worker, again));
    }

    /// Somebody else is asked: who refused before may be asked after them.
    pub(super) fn placed(&mut self, request: u32) {
        if let Some(refused) = self.requests.get_mut(&request) {
            refused
                .by
                .retain(|(_, again)| matches!(again, Again::Room(_)));
        }
    }

    /// A worker has room after all.
    pub(super) fn taken(&mut self, request: u32) {
        self.requests.remove(&request);
    }

    /// A report came.
    pub(super) fn reported(&mut self, worker: WorkerSlot, load: &Load) {
        for refused in self.requests.values_mut() {
            refused.by.retain(|(by, again)| {
                *by != worker || matches!(again, Again::Room(known) if room(load) <= *known)
            });
        }
    }
}

/// Tokens that a worker has room for.
fn room(load: &Load) -> u64 {
    load.kv.free + load.kv.evictable
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvmesh_scheduler::KvRoom;

    const WORKER: WorkerSlot = WorkerSlot(4);

    fn says(free: u64) -> Load {
        Load {
            kv: KvRoom {
                free,
                evictable: 100,
                ..KvRoom::default()
            },
            ..Load::default()
        }
    }

    /// A replay in which nothing but computing takes time asks for ever otherwise: the
    /// worker reports at once that it is as it was.
    #[test]
    fn after_three_refusals_a_report_without_more_room_changes_nothing() {
        let mut refusals = Refusals::default();
        for _ in 0..3 {
            refusals.add(9, WORKER, &says(50));
            assert_eq!(refusals.workers(9), [WORKER]);
            refusals.reported(WORKER, &says(50));
            assert!(refusals.workers(9).is_empty());
        }
        refusals.add(9, WORKER, &says(50));
        refusals.placed(9);
        refusals.reported(WORKER, &says(50));
        assert_eq!(refusals.workers(9), [WORKER]);
        refusals.reported(WORKER, &says(51));
        assert!(refusals.workers(9).is_empty());
    }

    #[test]
    fn who_is_taken_may_be_refused_three_times_again() {
        let mut refusals = Refusals::default();
        for _ in 0..2 {
            for _ in 0..3 {
                refusals.add(9, WORKER, &says(50));
                refusals.reported(WORKER, &says(50));
            }
            assert!(refusals.workers(9).is_empty());
            refusals.taken(9);
        }
    }
}
