//! Roles and drains that workers were asked for, and whose loads do not say so yet.
//!
//! Whether a change would leave a role empty is looked at and noted in one go, so that of
//! two at once the second counts the first; with a registry also of two at two routers. A
//! worker that is asked to change does a stage only where it does so before and after.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use kvmesh_registry::{Announced, WorkerChange};
use kvmesh_session::WorkerIndex;
use kvmesh_wire::v1::Role;

use super::{Core, operate::MeshError, queue::lock, table::WorkerEntry};

/// A change that no load has shown for so long since its worker's answer was not made. Loads
/// come four times a second and more.
const SEEN_WITHIN: Duration = Duration::from_secs(10);

/// All changes that were asked for.
#[derive(Default)]
pub(super) struct Asked {
    changes: Mutex<Changes>,
}

#[derive(Default)]
struct Changes {
    next: u64,
    of: BTreeMap<WorkerIndex, Change>,
}

#[derive(Clone, Copy)]
struct Change {
    number: u64,
    /// Process that was asked: another one in its place was not.
    incarnation: u64,
    /// The role after it; `None`: it takes nothing more.
    becomes: Option<Role>,
    /// When it lapses; `None` while its worker is being asked.
    until: Option<Instant>,
}

/// A change that a worker is being asked for. Dropped, it counts for as long as it may yet
/// be seen; so it does where its call is given up half way.
pub(super) struct Asking {
    core: Arc<Core>,
    worker: WorkerIndex,
    number: u64,
    refused: bool,
}

impl Asking {
    /// The worker refused, or was not reached: nothing changes.
    pub(super) fn refused(mut self) {
        self.refused = true;
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        let mut changes = lock(&self.core.asked.changes);
        let change = changes.of.get_mut(&self.worker);
        // A later one of this worker is in its place.
        let Some(change) = change.filter(|change| change.number == self.number) else {
            return;
        };
        match self.refused {
            true => drop(changes.of.remove(&self.worker)),
            false => change.until = Some(Instant::now() + SEEN_WITHIN),
        }
    }
}

fn incarnation(worker: &WorkerEntry) -> u64 {
    worker.record().map_or(0, |record| record.incarnation)
}

fn does(role: Role, stage: Role) -> bool {
    role == stage || role == Role::Both
}

impl Core {
    /// Notes that a worker is asked for a role, or to drain.
    ///
    /// # Errors
    /// [`MeshError::EmptiesRole`] where a role that is served now would not be, unless that
    /// is forced.
    pub(super) fn ask_of(
        self: &Arc<Self>,
        worker: &WorkerEntry,
        becomes: Option<Role>,
        force: bool,
    ) -> Result<Asking, MeshError> {
        let mut changes = lock(&self.asked.changes);
        let now = Instant::now();
        changes
            .of
            .retain(|_, change| change.until.is_none_or(|until| now < until));
        if !force && self.would_empty(worker, becomes, &changes, &[]) {
            return Err(MeshError::EmptiesRole);
        }
        changes.next += 1;
        let number = changes.next;
        let change = Change {
            number,
            incarnation: incarnation(worker),
            becomes,
            until: None,
        };
        changes.of.insert(worker.index, change);
        Ok(Asking {
            core: Arc::clone(self),
            worker: worker.index,
            number,
            refused: false,
        })
    }

    /// Tells the other routers of a change, and counts theirs. Without a registry, or where
    /// it does not answer, what this router knows has to do.
    ///
    /// # Errors
    /// [`MeshError::EmptiesRole`] as [`Core::ask_of`].
    pub(super) async fn announce(
        &self,
        worker: &WorkerEntry,
        becomes: Option<Role>,
        force: bool,
    ) -> Result<Option<Announced>, MeshError> {
        let Some(changes) = &self.changes else {
            return Ok(None);
        };
        let change = WorkerChange {
            worker_id: worker.name(),
            incarnation: incarnation(worker),
            becomes,
        };
        let agrees = |others: &[WorkerChange]| {
            let empties = || {
                let asked = lock(&self.asked.changes);
                self.would_empty(worker, becomes, &asked, others)
            };
            match !force && empties() {
                true => Err(MeshError::EmptiesRole),
                false => Ok(()),
            }
        };
        match changes.announce(&change, agrees).await {
            Ok(agreed) => agreed.map(Some),
            Err(error) => {
                let worker = &change.worker_id;
                tracing::warn!(worker, %error, "a change that other routers do not know of");
                Ok(None)
            }
        }
    }

    /// Whether a role that is served now would not be, were this worker gone
    /// or of another role.
    fn would_empty(
        &self,
        worker: &WorkerEntry,
        becomes: Option<Role>,
        asked: &Changes,
        elsewhere: &[WorkerChange],
    ) -> bool {
        let model = |entry: &WorkerEntry| entry.record().and_then(|r| r.model).map(|m| m.name);
        let own = model(worker);
        let (before, draining) = worker.role();
        if draining {
            return false;
        }
        let others: Vec<_> = {
            let mut all = self.table.all();
            all.retain(|entry| entry.index != worker.index && entry.live() && model(entry) == own);
            all
        };
        let stays = |entry: &WorkerEntry, stage| {
            let (role, draining) = entry.role();
            let (name, process) = (entry.name(), incarnation(entry));
            let here = asked.of.get(&entry.index);
            let here = here.filter(|change| change.incarnation == process);
            let there = elsewhere
                .iter()
                .find(|change| change.worker_id == name && change.incarnation == process);
            let after = [
                here.map(|change| change.becomes),
                there.map(|change| change.becomes),
            ];
            let mut after = after.into_iter().flatten();
            let does_after = after.all(|becomes| becomes.is_some_and(|to| does(to, stage)));
            !draining && does(role, stage) && does_after
        };
        [Role::Prefill, Role::Decode].into_iter().any(|stage| {
            let loses = does(before, stage) && !becomes.is_some_and(|role| does(role, stage));
            loses && !others.iter().any(|entry| stays(entry, stage))
        })
    }
}
