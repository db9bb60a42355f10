//! What workers say of an attempt, what is heard of their sessions, and waits that are
//! over.

use super::{
    Action, Actions, CLEARED_TOKENS, Cause, Generation, Loss, Outcome, State, Timer,
    attempt::{Attempt, Side},
    part::Was,
};
use crate::{
    Fence, Stage, Violation, WorkerIndex,
    parse::{Answer, End, Refusal},
};

impl Generation {
    /// What a worker speaks of; `None`: its part is none of the attempt in force, or gone.
    fn part_of(
        &mut self,
        from: WorkerIndex,
        fence: Fence,
        stage: Stage,
    ) -> Result<Option<(&mut Attempt, Side)>, Violation> {
        let State::Running(attempt) = &mut self.state else {
            return Ok(None);
        };
        let side = attempt.expect(from, fence, stage)?;
        let gone = attempt.part_mut(side).is_gone();
        Ok((!gone).then_some((attempt, side)))
    }

    pub(super) fn opening(
        &mut self,
        from: WorkerIndex,
        fence: Fence,
        stage: Stage,
        answer: Answer,
        actions: &mut Actions,
    ) -> Result<(), Violation> {
        let next_index = self.next_index;
        let Some((attempt, side)) = self.part_of(from, fence, stage)? else {
            return Ok(());
        };
        if !attempt.part_mut(side).answered("an answer", &answer)? {
            return Ok(());
        }
        actions.push(Action::Disarm(Timer::Answer {
            attempt: fence.attempt,
            stage,
        }));
        match answer {
            Answer::Reserved { .. } => {
                if let Some(next) = attempt.after_reserved(side) {
                    attempt.place(next, fence, next_index, actions);
                } else {
                    self.refusals = 0;
                    self.forget_refusals();
                }
            }
            Answer::Refused(Refusal::TakenOver) => self.end(Outcome::TakenOver, actions),
            Answer::Refused(why) => self.refused(from, why, actions),
        }
        Ok(())
    }

    pub(super) fn stage_end(
        &mut self,
        from: WorkerIndex,
        fence: Fence,
        stage: Stage,
        end: End,
        actions: &mut Actions,
    ) -> Result<(), Violation> {
        let next_index = self.next_index;
        let Some((attempt, side)) = self.part_of(from, fence, stage)? else {
            return Ok(());
        };
        attempt.check_end(side, &end)?;
        attempt.part_mut(side).ended()?;
        match end {
            End::Finished { reason, stop_token } => {
                self.end(Outcome::Finished { reason, stop_token }, actions);
            }
            End::HandedOff { .. } if side == Side::Decode => self.committed(actions),
            End::HandedOff { engine } => {
                if let Some(next) = attempt.after_handed_off(engine) {
                    attempt.place(next, fence, next_index, actions);
                }
            }
            End::Returned(Refusal::TakenOver) => self.end(Outcome::TakenOver, actions),
            End::Returned(_) => {
                self.abandon(actions);
                self.forget_refusals();
                self.ask(Cause::Returned, true, actions);
            }
            End::TransferFailed | End::Cancelled => self.failed(None, actions),
            End::Failed(failure) => self.failed(Some(failure), actions),
        }
        Ok(())
    }

    pub(super) fn session_lost(&mut self, worker: WorkerIndex, loss: Loss, actions: &mut Actions) {
        if self.receiver_lost(worker, loss, actions) {
            return;
        }
        let State::Running(attempt) = &mut self.state else {
            return;
        };
        let Some((side, part)) = attempt.side_mut(worker) else {
            return;
        };
        let new_tokens = part.made();
        let was = part.lose();
        let fence = self.fence;
        match was {
            Was::Ended => {}
            Was::Unsent => self.refused(worker, Refusal::Unanswered, actions),
            Was::Placed(stage) => {
                let timer = Timer::Answer {
                    attempt: fence.attempt,
                    stage,
                };
                actions.push(Action::Disarm(timer));
                if loss == Loss::Silent {
                    actions.push(Action::Cancel { to: worker, fence });
                }
                self.refused(worker, Refusal::Unanswered, actions);
            }
            Was::Reserved => {
                if loss == Loss::Silent {
                    actions.push(Action::Cancel { to: worker, fence });
                }
                if loss == Loss::Died && attempt.computed_on(side) && new_tokens < CLEARED_TOKENS {
                    let deaths = match self.alone {
                        true => &mut self.deaths_alone,
                        false => &mut self.deaths,
                    };
                    *deaths = deaths.saturating_add(1);
                }
                if side == Side::Decode && self.source_lost(loss, actions) {
                    return;
                }
                let State::Running(attempt) = &self.state else {
                    return;
                };
                if !attempt.goes_on_without(side, loss) {
                    self.lost(worker, loss, actions);
                } else if !attempt.decodes() {
                    actions.push(Action::Arm(Timer::Orphaned {
                        attempt: fence.attempt,
                    }));
                }
            }
        }
    }

    pub(super) fn reattached(&mut self, worker: WorkerIndex, fence: Fence, actions: &mut Actions) {
        if let State::Running(attempt) = &mut self.state
            && fence == self.fence
            && attempt.open_from(worker).is_some()
            && let Some((_, part)) = attempt.side_mut(worker)
        {
            part.says_again();
            self.tell_again(worker, actions);
        } else if let Some(moving) = &mut self.moving
            && moving.fence == fence
            && moving.receiver.worker() == worker
            && moving.receiver.is_open()
        {
            moving.receiver.says_again();
        } else {
            // It was left while its worker was away.
            actions.push(Action::Cancel { to: worker, fence });
        }
    }

    pub(super) fn fired(&mut self, timer: Timer, actions: &mut Actions) {
        match timer {
            Timer::Deadline => self.end(Outcome::DeadlineExceeded, actions),
            Timer::Answer {
                attempt: number,
                stage,
            } => {
                if self.move_unanswered(number, actions) {
                    return;
                }
                let fence = self.fence;
                let State::Running(attempt) = &mut self.state else {
                    return;
                };
                if number != fence.attempt {
                    return;
                }
                let Some((worker, part)) = attempt.unanswered(stage) else {
                    return;
                };
                part.give_up();
                actions.push(Action::Cancel { to: worker, fence });
                self.refused(worker, Refusal::Unanswered, actions);
            }
            Timer::Orphaned { attempt: number } => {
                let State::Running(attempt) = &self.state else {
                    return;
                };
                if number == self.fence.attempt
                    && !attempt.decodes()
                    && let Some(worker) = attempt.gone()
                {
                    self.lost(worker, Loss::Broken, actions);
                }
            }
        }
    }
}
