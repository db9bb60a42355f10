//! A stream that goes on at another worker, with its KV, while it runs.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvmesh_session::{
    Fence, TransferId, WorkerIndex,
    generation::{Event, Plan},
};
use smallvec::SmallVec;

use super::{Open, Party, State};
use crate::mesh::{
    class_of,
    dispatch::{Booking, Stays},
};

/// Pause after a hand-over that failed; twice as long after each further one to a worker
/// that was tried before, up to 64 times as long.
const PAUSE: Duration = Duration::from_millis(100);
/// How often the pause doubles at most.
const DOUBLED: u32 = 6;

/// A hand-over that is under way.
pub(super) struct Moving {
    /// The attempt under which the target goes on.
    attempt: u32,
    from: WorkerIndex,
    transfer: TransferId,
    pub(super) party: Party,
    pub(super) booking: Booking,
}

/// What became of a stream's hand-overs.
#[derive(Default)]
pub(super) struct Tried {
    failed: u32,
    /// Workers to which they were.
    targets: SmallVec<[WorkerIndex; 2]>,
    again: Option<Instant>,
}

/// Whether a stream can leave its worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::mesh) enum Leaves {
    /// It is on its way.
    UnderWay,
    /// It can: by its class, most urgent first, and its arrival.
    Can(usize, Instant),
    /// It could, and another try comes in a moment: nobody took it the last time.
    Later,
    /// It does not run there, or its prompt is not computed yet.
    Waits,
    /// It stays for good.
    Stays(Stays),
}

impl State {
    /// What a fence's commands go by.
    pub(super) fn moving_as(&self, fence: Fence) -> Option<&Moving> {
        let moving = self.moving.as_deref()?;
        (moving.attempt == fence.attempt).then_some(moving)
    }
}

impl Open {
    /// Whether its stream can leave this worker now.
    pub(in crate::mesh) fn leaves(&self, from: WorkerIndex, now: Instant) -> Leaves {
        let state = self.lock();
        if state.moving.is_some() {
            return Leaves::UnderWay;
        }
        if !state.machine.streams_on(from) {
            return Leaves::Waits;
        }
        if state.machine.alone() {
            return Leaves::Stays(Stays::Alone);
        }
        let failed = state.tried.failed;
        if failed >= self.core.settings.streams.hand_over_tries {
            return Leaves::Stays(Stays::Failed(failed));
        }
        if state.tried.again.is_some_and(|again| again > now) {
            return Leaves::Later;
        }
        Leaves::Can(class_of(self.request.class).index(), self.request.arrived)
    }

    /// Begins to hand the stream over to a target. Where it cannot go any more the
    /// booking is released. Whether it is on its way.
    pub(in crate::mesh) fn hand_over(
        self: &Arc<Self>,
        from: WorkerIndex,
        party: Party,
        booking: Booking,
    ) -> bool {
        let plan = {
            let mut state = self.lock();
            if !state.machine.can_move(from) {
                return false;
            }
            let (to, transfer) = (party.worker, TransferId(rand::random()));
            let attempt = state.machine.next_attempt();
            state.moving = Some(Box::new(Moving {
                attempt,
                from,
                transfer,
                party,
                booking,
            }));
            self.core.counters.hand_overs.begun.add(1);
            self.core.counters.transfers_started.add(1);
            self.log_hand_over(&state, from, to, attempt);
            match state.machine.apply(Event::HandOver { to, transfer }) {
                Ok(actions) => self.perform(&mut state, actions),
                Err(_) => None,
            }
        };
        self.ask(plan);
        true
    }

    /// Workers that could not take the stream over: others are tried before them.
    pub(in crate::mesh) fn failed_targets(&self) -> SmallVec<[WorkerIndex; 2]> {
        self.lock().tried.targets.clone()
    }

    /// Nobody could take the stream over: it is not tried again for a moment.
    pub(in crate::mesh) fn looks_again(&self, now: Instant) {
        self.lock().tried.again = Some(now + PAUSE);
    }

    /// The stream is at its target: that is where its attempt runs, no longer `before`.
    pub(super) fn moved(&self, state: &mut State, before: Fence) {
        let Some(moving) = state.moving.take() else {
            return;
        };
        let Moving {
            attempt: _,
            from,
            transfer,
            party,
            booking,
        } = *moving;
        let to = party.worker;
        state.tried = Tried::default();
        state.figures.decodes_on(to);
        let attempt = state.machine.fence().attempt;
        state.figures.handed_over(before.attempt, attempt);
        self.core.counters.hand_overs.done.add(1);
        self.core.counters.attempts.add(1);
        if let Some(chosen) = &mut state.chosen {
            // A command goes to the target alone: the source's part is over.
            chosen.parties.clear();
            chosen.parties.push(party);
            chosen.plan = Plan::Mesh {
                prefill: from,
                decode: to,
                transfer,
            };
            chosen.booking = booking;
            (chosen.prefix_from, chosen.pulls, chosen.tail) = (None, None, None);
        }
    }

    /// The hand-over is over, and the stream where it was, or nowhere.
    pub(super) fn target_released(&self, state: &mut State) {
        let Some(moving) = state.moving.take() else {
            return;
        };
        if !state.machine.running() {
            return;
        }
        let target = moving.party.worker;
        let tried = &mut state.tried;
        tried.failed += 1;
        if !tried.targets.contains(&target) {
            tried.targets.push(target);
        }
        let others = u32::try_from(tried.targets.len()).unwrap_or(u32::MAX);
        let again = tried.failed.saturating_sub(others).min(DOUBLED);
        tried.again = Some(Instant::now() + PAUSE * 2_u32.pow(again));
        self.core.counters.hand_overs.failed.add(1);
        let fence = state.machine.fence();
        tracing::info!(
            generation = %self.id,
            owner = fence.owner,
            attempt = fence.attempt,
            target = %self.core.table.name(target),
            tries = state.tried.failed,
            "hand-over failed; the stream goes on where it is"
        );
    }
}
