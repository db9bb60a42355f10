//! Those that wait in a router.

use super::{Asked, Router, TRIED_AT_ONCE};
use kvmesh_kv_index::WorkerSlot;
use kvmesh_scheduler::{Booking, Role, Ticket};
use std::collections::BTreeSet;

/// Between two looks at all that wait, ms.
const PASS_MS: f64 = 5.0;

impl Router {
    /// Whether a report of a worker may let somebody go: it would start a
    /// prompt soon, or somebody waits for room. With many workers somebody
    /// reports all the time: those who mean to go elsewhere are tried every
    /// [`PASS_MS`] only.
    pub(crate) fn may_take(&self, worker: usize, now_ms: f64) -> bool {
        if self.queue.is_empty() {
            return false;
        }
        let Some(view) = self.roster.get(WorkerSlot(worker as u32)) else {
            return false;
        };
        let (own, others) = (&view.load.own, &view.load.others);
        let queued = own.queued_prefill_tokens + others.queued_prefill_tokens;
        let running = own.running_prefill_tokens + others.running_prefill_tokens;
        let least_ms = (queued + running) as f64 * view.step.b_ms;
        let ahead_ms = self.dispatch_ahead_ms.max(self.step_ms[worker]);
        let may = self.lacks_room || view.role != Role::Decode && least_ms <= ahead_ms;
        let intends = |booked: &Vec<(usize, Booking)>| booked.iter().any(|(on, _)| *on == worker);
        may && (now_ms >= self.next_pass_ms || self.intended.values().any(intends))
    }

    /// Whether somebody waits for room.
    pub(crate) fn lacks_room(&mut self, lacks: bool) {
        self.lacks_room = lacks;
    }

    /// What waits and is to be tried now, most urgent first. Places are kept.
    pub(crate) fn take_first(&mut self, now_ms: f64) -> Vec<(Ticket, Asked)> {
        self.next_pass_ms = now_ms + PASS_MS;
        let first = self.queue.order(TRIED_AT_ONCE);
        if self.intended.len() > TRIED_AT_ONCE {
            // Those that were overtaken by many will choose again.
            let near = self.queue.iter().take(TRIED_AT_ONCE);
            let near: BTreeSet<u32> = near.map(|(_, asked)| asked.request).collect();
            self.intended.retain(|request, _| near.contains(request));
        }
        let taken = |ticket| Some((ticket, self.queue.take(ticket)?));
        first.into_iter().filter_map(taken).collect()
    }

    /// One that was tried waits on.
    pub(crate) fn put_back(&mut self, ticket: Ticket, asked: Asked) {
        self.queue.put_back(ticket, asked);
    }

    /// One that was tried is placed.
    pub(crate) fn served(&mut self, ticket: Ticket) {
        self.queue.serve(ticket);
    }
}
