//! Where a running stream can go on: the choice among workers for one that has its KV
//! elsewhere.

use kvmesh_kv_index::WorkerSlot;
use kvmesh_scheduler::{
    Booking, Class, Cluster, HEADROOM, NoPlan, RequestView, Role, Work, WorkerView,
};
use kvmesh_session::WorkerIndex;

use super::Placer;

/// A worker that can take a stream over, with what is booked there.
pub(in crate::mesh) struct Target {
    pub(in crate::mesh) worker: WorkerIndex,
    pub(in crate::mesh) booking: Booking,
}

impl Placer {
    /// The worker at which a stream of `source` costs the others and itself the least,
    /// by the same policy as any placement, but for those that `failed`; it is booked there.
    ///
    /// The policy is asked as for a request that one worker does alone: what a worker
    /// lacks counts as what computing it would take. Moving it takes less, by about as
    /// much everywhere.
    ///
    /// # Errors
    /// Why nobody can take it now.
    pub(in crate::mesh) fn target(
        &mut self,
        source: WorkerIndex,
        failed: &[WorkerIndex],
        request: &RequestView<'_>,
        now_ms: f64,
    ) -> Result<Target, NoPlan> {
        self.roster.refresh(&self.bookings);
        let slot = self.slot(source).ok_or(NoPlan::NoPair)?;
        let from = self.roster.get(slot).ok_or(NoPlan::NoPair)?;
        if !from.abilities.streamed_hand_off {
            return Err(NoPlan::NoPair);
        }
        let failed: Vec<WorkerSlot> = failed.iter().filter_map(|one| self.slot(*one)).collect();
        let takes = |view: &&WorkerView| {
            let (own, other) = (&from.abilities, &view.abilities);
            view.slot != slot
                && !failed.contains(&view.slot)
                && view.role != Role::Prefill
                && other.streamed_hand_off
                && other.pairing == own.pairing
                && other.block_tokens == own.block_tokens
        };
        let others: Vec<WorkerView> = self
            .roster
            .views()
            .iter()
            .filter(takes)
            .cloned()
            // Each is weighed as one that goes on with it alone.
            .map(|view| WorkerView {
                role: Role::Both,
                ..view
            })
            .collect();
        let cluster = Cluster::new(self.router, &others)
            .at(now_ms)
            .with_transfers(&self.transfers);
        let decision = self.policy.choose(&cluster, request)?;
        let slot = decision.plan().decode();
        let worker = self.worker_at(slot).ok_or(NoPlan::NoPair)?;
        let booking = self.book_stream(worker, request.sequence(), request.class);
        let booking = booking.ok_or(NoPlan::NoPair)?;
        Ok(Target { worker, booking })
    }

    /// Books a stream of so many tokens at a worker; `None`: it is not to be chosen from.
    pub(in crate::mesh) fn book_stream(
        &mut self,
        worker: WorkerIndex,
        tokens: u64,
        class: Class,
    ) -> Option<Booking> {
        let slot = self.slot(worker)?;
        let view = self.roster.get(slot)?;
        let mut work = Work {
            decodes: 1,
            decode_context: tokens,
            blocks: view.blocks(tokens + HEADROOM),
            ..Work::default()
        };
        work.classes.decoding[class.index()] = 1;
        Some(self.bookings.book(slot, work))
    }
}
