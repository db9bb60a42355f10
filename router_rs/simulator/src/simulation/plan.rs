//! The pool controller looks, and roles change.

use super::Simulation;
use crate::events::Event;
use kvmesh_scheduler::planner::{Demand, Flip, Outlook};

impl Simulation<'_> {
    /// The next look, as long as requests come: after the last one no role
    /// need change.
    pub(super) fn look_later(&mut self) {
        if let Some(numbers) = &self.settings.planner
            && self.next < self.trace.requests.len()
        {
            let after_ms = numbers.every_ms();
            self.later(after_ms, Event::Look);
        }
    }

    /// It sees what the first router sees, and what came to all of them.
    pub(super) fn look(&mut self) {
        self.look_later();
        let demands = self.routers.iter().map(|router| router.demand());
        let demand = demands.fold(Demand::default(), Demand::plus);
        let (Some(planner), Some(first)) = (&mut self.planner, self.routers.first_mut()) else {
            return;
        };
        let advice = planner.look(&[first.pools(demand)], self.now_ms);
        for flip in advice.iter().filter_map(|one| one.flip.as_ref().ok()) {
            planner.began(flip.worker, flip.to, self.now_ms);
        }
        for one in advice {
            if let Ok(flip) = one.flip {
                self.flip(&flip, &one.now);
            }
        }
    }

    /// Routers know at once, as where a worker is told by an operator: what it
    /// has it ends in its old role.
    fn flip(&mut self, flip: &Flip, before: &Outlook) {
        self.recorder.flips(self.now_ms, flip, before);
        self.workers[flip.worker.0 as usize].engine.role = flip.to;
        for router in 0..self.routers.len() {
            self.routers[router].flipped(flip.worker, flip.to);
            self.serve_queue(router);
        }
    }
}
