//! A generation one of whose workers was away for a moment.

use std::sync::Arc;

use kvmesh_session::{
    Fence, WorkerIndex,
    generation::{Event, Loss},
};

use super::Open;
use crate::mesh::session::SessionHandle;

impl Open {
    /// The attempt that is wanted of a worker, and the first index.
    pub(in crate::mesh) fn reattach(&self, worker: WorkerIndex) -> Option<(Fence, u32)> {
        self.lock().machine.reattach(worker)
    }

    /// The worker is back and has the attempt still.
    pub(in crate::mesh) fn reattached(
        self: &Arc<Self>,
        worker: WorkerIndex,
        session: &Arc<SessionHandle>,
        fence: Fence,
    ) {
        {
            let mut state = self.lock();
            let state = &mut *state;
            let wanted = state.machine.reattach(worker);
            if wanted.is_some_and(|(of, _)| of == fence) {
                let chosen = state.chosen.iter_mut();
                let parties = chosen.flat_map(|chosen| chosen.parties.iter_mut());
                let target = state.moving.iter_mut().map(|moving| &mut moving.party);
                for party in parties.chain(target) {
                    if party.worker == worker {
                        party.session = Arc::clone(session);
                    }
                }
                // Of an attempt that is wanted no plan is asked for.
                if let Ok(actions) = state.machine.apply(Event::Reattached { worker, fence }) {
                    self.perform(state, actions);
                }
                self.core.counters.reattached.add(1);
                return;
            }
        }
        session.cancel(self.id, fence);
    }

    /// The worker is back and knows nothing of the attempt.
    pub(in crate::mesh) fn forgotten(self: &Arc<Self>, worker: WorkerIndex, fence: Fence) {
        if self.reattach(worker).is_some_and(|(of, _)| of == fence) {
            let loss = Loss::Broken;
            self.apply(Event::SessionLost { worker, loss });
        }
    }
}
