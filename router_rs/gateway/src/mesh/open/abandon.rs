//! The end of a generation whose machine cannot be asked any more.

use kvmesh_session::{WorkerIndex, generation::Outcome};

use super::Open;

impl Open {
    /// Ends it from outside of its machine, which panicked: its client and its
    /// workers hear of it, and what was booked for it is released.
    /// `worker` is the one at which it happened, if it was one.
    pub(in crate::mesh) fn abandon(&self, worker: Option<WorkerIndex>) {
        let (chosen, moving, fence, waker) = {
            let mut state = self.lock();
            if state.outcome.is_none() {
                let placed = state
                    .chosen
                    .as_ref()
                    .and_then(|chosen| chosen.parties.last());
                let lost = worker.or(placed.map(|party| party.worker));
                let outcome = lost.map_or(Outcome::NoPlan, Outcome::WorkerLost);
                self.end(&mut state, outcome);
            }
            let fence = state.machine.fence();
            let moving = state.machine.moving().zip(state.moving.take());
            (state.chosen.take(), moving, fence, state.waker.take())
        };
        if let Some((fence, moving)) = moving {
            moving.party.session.cancel(self.id, fence);
        }
        for party in chosen.iter().flat_map(|chosen| &chosen.parties) {
            party.session.cancel(self.id, fence);
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}
