//! What workers still owe a generation that ended well.
//!
//! A worker tells what its part took when that ends. Where this router ends the output (a
//! stop string) the parts run on until their worker hears of it: the client's last message
//! waits for their ends, which come with the step that runs, so that its figures are true.
//! Text and tokens do not wait. A worker that says nothing is waited for no longer than
//! [`WITHIN`].

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use kvmesh_session::WorkerIndex;
use smallvec::SmallVec;

use super::{super::timers::TimerKey, Open, State};

/// Longest wait: as long as a worker may be silent before nothing more is placed there.
const WITHIN: Duration = Duration::from_secs(1);

/// The workers that were told to leave a part, and have not said what it took.
#[derive(Default)]
pub(super) struct Owed {
    workers: SmallVec<[WorkerIndex; 2]>,
    until: Option<TimerKey>,
}

impl Open {
    /// It ended well while these had parts of it.
    pub(super) fn owes(self: &Arc<Self>, state: &mut State, workers: SmallVec<[WorkerIndex; 2]>) {
        if workers.is_empty() {
            return;
        }
        let until = self.core.timers.settle_at(Instant::now() + WITHIN, self);
        state.owed = Owed {
            workers,
            until: Some(until),
        };
    }

    /// A worker said what its part took, or will not.
    pub(super) fn settled(&self, state: &mut State, worker: WorkerIndex) {
        state.owed.workers.retain(|owes| *owes != worker);
        if state.owed.workers.is_empty() {
            self.settle(state);
        }
    }

    /// Nothing more is waited for.
    pub(super) fn settle(&self, state: &mut State) {
        if let Some(until) = std::mem::take(&mut state.owed).until {
            self.core.timers.disarm(until);
        }
    }

    /// It was waited for long enough.
    pub(in crate::mesh) fn settle_now(&self) {
        let waker = {
            let mut state = self.lock();
            self.settle(&mut state);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Ready when nobody owes it anything, or another stream reads it.
    pub(in crate::mesh) fn poll_settled(&self, cx: &mut Context<'_>, reader: u32) -> Poll<()> {
        let mut state = self.lock();
        if state.owed.workers.is_empty() || state.reader != reader {
            return Poll::Ready(());
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Whether it has ended, and no worker has anything to say of it.
    pub(in crate::mesh) fn is_over(&self) -> bool {
        let state = self.lock();
        state.machine.ended() && state.owed.workers.is_empty()
    }
}
