//! A running stream on its way to another worker, with its KV (PROTOCOLS 2, Drain).
//!
//! ```text
//!              Reserved             handed_off, or the receiver's tokens
//!  Placed ─────────────▶ told ─────────────────────────────────────────▶ it is the attempt
//!     │ refused, lost,     │ transfer failed, receiver lost                 in force
//!     ▼ no answer          ▼
//!   over: the stream goes on where it is
//! ```
//!
//! Until one of the two says so the source's attempt is in force: what it makes counts.
//! The receiver has an attempt number of its own from the start. Whoever speaks first
//! of the commit decides; the other's word is stale then. A source that is lost while it
//! hands over leaves that to the receiver, which got the commit or will say that the
//! transfer failed.

use super::{
    Action, Actions, Generation, Loss, Outcome, PlannedHandOff, State, Taken, Timer, TransferState,
    attempt::Attempt,
    part::{At, Part, Was},
};
use crate::{
    Fence, Stage, TransferId, Violation, WorkerIndex,
    parse::{Answer, End, Refusal},
};

/// A hand-over that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Move {
    /// The attempt under which the receiver goes on.
    pub(super) fence: Fence,
    transfer: TransferId,
    border: u32,
    pub(super) receiver: Part,
    /// The source was told; it may commit at any time.
    told: bool,
}

impl Move {
    fn answer(&self) -> Timer {
        Timer::Answer {
            attempt: self.fence.attempt,
            stage: Stage::Decode,
        }
    }

    /// Leaves the receiver.
    pub(super) fn close(self, actions: &mut Actions) {
        let (unanswered, open) = (self.receiver.is_unanswered(), self.receiver.is_open());
        if unanswered {
            actions.push(Action::Disarm(self.answer()));
        }
        if open {
            actions.push(Action::Cancel {
                to: self.receiver.worker(),
                fence: self.fence,
            });
        }
        actions.push(Action::ReleaseTarget);
    }

    fn tell(&self, source: WorkerIndex, fence: Fence) -> Action {
        Action::HandOver {
            to: source,
            fence,
            next_attempt: self.fence.attempt,
            transfer: self.transfer,
            next_index: self.border,
        }
    }
}

impl Generation {
    /// Whether its stream can be handed over by this worker now: it decodes there, and
    /// nothing of its attempt is still to come from elsewhere.
    #[must_use]
    pub fn can_move(&self, from: WorkerIndex) -> bool {
        self.moving.is_none() && !self.alone && self.streams_on(from)
    }

    /// Whether it decodes on this worker, and nothing of its attempt is still to come from
    /// elsewhere.
    #[must_use]
    pub fn streams_on(&self, worker: WorkerIndex) -> bool {
        let State::Running(attempt) = &self.state else {
            return false;
        };
        !self.complete() && attempt.streams_on(worker)
    }

    /// The attempt under which its stream goes on elsewhere, while it is on its way.
    #[must_use]
    pub fn moving(&self) -> Option<Fence> {
        self.moving.as_ref().map(|moving| moving.fence)
    }

    pub(super) fn is_move(&self, fence: Fence) -> bool {
        self.moving().is_some_and(|of| of == fence)
    }

    pub(super) fn transfer_of_move(&self) -> Option<TransferState> {
        self.moving.as_ref().map(|moving| match moving.told {
            true => TransferState::Flowing,
            false => TransferState::Placed,
        })
    }

    /// Begins to hand the stream over.
    pub(super) fn hand_over(
        &mut self,
        to: WorkerIndex,
        transfer: TransferId,
        actions: &mut Actions,
    ) {
        let State::Running(attempt) = &self.state else {
            return;
        };
        let source = attempt.decodes_on();
        if to == source || !self.can_move(source) {
            actions.push(Action::ReleaseTarget);
            return;
        }
        if attempt.gone().is_some() {
            // It waited for what has come long since.
            actions.push(Action::Disarm(Timer::Orphaned {
                attempt: self.fence.attempt,
            }));
        }
        self.last_attempt += 1;
        let moving = Move {
            fence: self.highest(),
            transfer,
            border: self.next_index,
            receiver: Part::placed(to, Stage::Decode, self.next_index),
            told: false,
        };
        actions.push(Action::Place {
            to,
            fence: moving.fence,
            stage: Stage::Decode,
            hand_off: PlannedHandOff::Mesh {
                transfer,
                sender: source,
            },
        });
        actions.push(Action::Arm(moving.answer()));
        self.moving = Some(moving);
    }

    /// The receiver answered its Place.
    pub(super) fn move_opened(
        &mut self,
        from: WorkerIndex,
        stage: Stage,
        answer: &Answer,
        actions: &mut Actions,
    ) -> Result<(), Violation> {
        let State::Running(attempt) = &mut self.state else {
            return Ok(());
        };
        let Some(moving) = &mut self.moving else {
            return Ok(());
        };
        moving.expect(from, stage)?;
        if !moving.receiver.answered("an answer", answer)? {
            return Ok(());
        }
        actions.push(Action::Disarm(moving.answer()));
        match answer {
            Answer::Reserved { .. } => {
                moving.told = true;
                attempt.may_hand_off();
                actions.push(moving.tell(attempt.decodes_on(), self.fence));
            }
            Answer::Refused(Refusal::TakenOver) => self.end(Outcome::TakenOver, actions),
            Answer::Refused(_) => self.stay(actions),
        }
        Ok(())
    }

    /// The receiver's tokens: the stream is there.
    pub(super) fn move_tokens(
        &mut self,
        from: WorkerIndex,
        first_index: u32,
        count: u32,
    ) -> Result<Taken, Violation> {
        let most = self.max_tokens;
        let Some(moving) = &mut self.moving else {
            return Ok(Taken::Stale);
        };
        moving.expect(from, Stage::Decode)?;
        // Before the stream counts as moved: a violation leaves all as it was.
        if first_index.saturating_add(count) > most {
            return Err(Violation::TooManyTokens(most));
        }
        let (before, seen) = moving.receiver.tokens(first_index, count)?;
        self.take_over(At::Ended);
        self.taken(before, seen)
    }

    /// The receiver ended before the stream was there: it goes on where it is, unless
    /// its worker says that it has committed.
    pub(super) fn move_ended(
        &mut self,
        from: WorkerIndex,
        stage: Stage,
        end: &End,
        actions: &mut Actions,
    ) -> Result<(), Violation> {
        let Some(moving) = &mut self.moving else {
            return Ok(());
        };
        moving.expect(from, stage)?;
        moving.receiver.ended()?;
        match end {
            End::Returned(Refusal::TakenOver) => self.end(Outcome::TakenOver, actions),
            _ => self.stay(actions),
        }
        Ok(())
    }

    /// The source said that it has committed.
    pub(super) fn committed(&mut self, actions: &mut Actions) {
        if self.moving.as_ref().is_some_and(|moving| moving.told) {
            let from = self.fence;
            self.take_over(At::Ended);
            actions.push(Action::Moved { from });
        } else {
            // To one that had failed by then.
            self.failed(None, actions);
        }
    }

    /// The receiver's session is lost. False: it is another worker.
    pub(super) fn receiver_lost(
        &mut self,
        worker: WorkerIndex,
        loss: Loss,
        actions: &mut Actions,
    ) -> bool {
        let Some(moving) = self
            .moving
            .as_mut()
            .filter(|moving| moving.receiver.worker() == worker)
        else {
            return false;
        };
        let was = moving.receiver.lose();
        if matches!(was, Was::Placed(_)) {
            actions.push(Action::Disarm(moving.answer()));
        }
        if loss == Loss::Silent {
            actions.push(Action::Cancel {
                to: worker,
                fence: moving.fence,
            });
        }
        self.stay(actions);
        true
    }

    /// The source's session is lost while it may have committed. False: it has not.
    pub(super) fn source_lost(&mut self, loss: Loss, actions: &mut Actions) -> bool {
        let told = self.moving.as_ref().is_some_and(|moving| moving.told);
        // One that is silent holds its half of the transfer up as well.
        if !told || loss == Loss::Silent {
            return false;
        }
        let from = self.fence;
        self.take_over(At::Gone);
        actions.push(Action::Moved { from });
        actions.push(Action::Arm(Timer::Orphaned {
            attempt: self.fence.attempt,
        }));
        true
    }

    /// The receiver has not answered in time. False: another wait is over.
    pub(super) fn move_unanswered(&mut self, number: u32, actions: &mut Actions) -> bool {
        let Some(moving) = self
            .moving
            .as_mut()
            .filter(|moving| moving.fence.attempt == number && moving.receiver.is_unanswered())
        else {
            return false;
        };
        moving.receiver.give_up();
        let (to, fence) = (moving.receiver.worker(), moving.fence);
        actions.push(Action::Cancel { to, fence });
        self.stay(actions);
        true
    }

    /// The worker that hands over is back: it may not have heard of it.
    pub(super) fn tell_again(&self, source: WorkerIndex, actions: &mut Actions) {
        if let (State::Running(attempt), Some(moving)) = (&self.state, &self.moving)
            && moving.told
            && attempt.decodes_on() == source
        {
            actions.push(moving.tell(source, self.fence));
        }
    }

    /// The stream stays where it is.
    fn stay(&mut self, actions: &mut Actions) {
        self.moving = None;
        actions.push(Action::ReleaseTarget);
    }

    /// The receiver's attempt is the one in force.
    fn take_over(&mut self, source: At) {
        if let State::Running(attempt) = &self.state
            && let Some(moving) = self.moving.take()
        {
            self.fence = moving.fence;
            let from = attempt.decodes_on();
            let moved = Attempt::moved(
                moving.border,
                moving.transfer,
                (from, source),
                moving.receiver,
            );
            self.state = State::Running(moved);
        }
    }
}

impl Move {
    fn expect(&self, from: WorkerIndex, stage: Stage) -> Result<(), Violation> {
        if from != self.receiver.worker() {
            return Err(Violation::UnknownAttempt(self.fence));
        }
        if stage != Stage::Decode {
            return Err(Violation::OutOfTurn {
                what: "a frame",
                state: "another stage",
            });
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "moving_tests.rs"]
mod tests;
