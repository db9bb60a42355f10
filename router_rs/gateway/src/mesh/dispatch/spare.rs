//! Whether the others can do without a worker whose answers fail.

use std::sync::Arc;

use kvmesh_wire::v1;

use super::super::{Core, table::WorkerEntry};

impl Core {
    /// Whether a worker whose answers fail may be left out: of those that do its
    /// stages at least half are to be left. Where most fail the fault is
    /// elsewhere, and a pool that is emptied serves nobody (DESIGN 5).
    pub(in crate::mesh) fn may_eject(&self, worker: &WorkerEntry) -> bool {
        let model = |entry: &WorkerEntry| entry.record().and_then(|r| r.model).map(|m| m.name);
        let (own, (role, _)) = (model(worker), worker.role());
        let alike = |entry: &&Arc<WorkerEntry>| {
            let (other, draining) = entry.role();
            let same = other == role || other == v1::Role::Both;
            entry.index != worker.index && same && !draining && model(entry) == own
        };
        let all = self.table.all();
        let (mut others, mut works) = (0, 0);
        for entry in all.iter().filter(alike) {
            others += 1;
            works += usize::from(entry.live());
        }
        2 * works > others
    }
}
