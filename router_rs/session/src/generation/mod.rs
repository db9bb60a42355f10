//! One request's way over its attempts.
//!
//! ```text
//!            plan                     Reserved, tokens, hand-off
//!  start ──▶ Planning ──────────────▶ Running ─────────────────────▶ Ended
//!              ▲   │                    │  │                           ▲
//!              │   └── stopped ─────────│──┼── finished, stopped, ─────┤
//!              │       no plan          │  │   failed for good         │
//!              └── refused, returned, ──┘  └── worker lost ────────────┘
//!                  transfer failed,            (or Planning again, where
//!                  failed but retryable         the policy says so)
//! ```
//!
//! An attempt (see the module `attempt`) starts from exactly the tokens delivered so
//! far. Whatever ends it, the machine either ends or asks for a new plan; what
//! then starts anew is the continuation: the prompt and the output up to
//! [`Generation::next_index`]. Nothing else moves.
//!
//! A stream that runs can pass to another worker with its KV (see the module `moving`);
//! the attempt in force is then the one that it passed to.
//!
//! Promise: indices contiguous, each once; exactly one [`Action::End`]; every
//! Place answered, or cancelled, or its session lost; no command to a worker
//! whose part has ended.

mod answers;
mod attempt;
mod claimed;
mod moving;
mod part;
mod terms;

use smallvec::SmallVec;

use crate::{
    Fence, Stage, Violation, WorkerIndex,
    parse::{End, Failure, FinishReason, Refusal},
};

use attempt::{Attempt, Unclaimed};
use moving::Move;
pub use terms::{
    Action, Actions, Cause, Event, Loss, Outcome, Plan, PlanRequest, PlannedHandOff, Policy, Stop,
    Taken, Timer, TransferState,
};

/// New tokens on a worker after which its death is not laid at a request's door
/// (DESIGN 5).
const CLEARED_TOKENS: u32 = 32;

const LENGTH: Outcome = Outcome::Finished {
    reason: FinishReason::Length,
    stop_token: None,
};

/// One request's state. See the module's text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Generation {
    policy: Policy,
    /// Of the attempt in force.
    fence: Fence,
    /// Owner number under which attempts are placed.
    owner: u32,
    /// Highest number that an attempt was given.
    last_attempt: u32,
    next_index: u32,
    max_tokens: u32,
    refusals: u8,
    failures: u8,
    /// Deaths of workers that count against it, and those while it ran alone.
    deaths: u8,
    deaths_alone: u8,
    /// Whether the attempt shares its steps with nobody.
    alone: bool,
    deadline: bool,
    excluded: SmallVec<[(WorkerIndex, Refusal); 2]>,
    state: State,
    /// The hand-over that is under way. Only while it runs.
    moving: Option<Move>,
    /// A prefill that was cancelled with the generation, and may have handed off before
    /// it heard of that.
    unclaimed: Option<Unclaimed>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Planning,
    Running(Attempt),
    Ended,
}

impl Generation {
    /// A generation of `max_tokens` tokens at most, owned under number `owner`.
    /// `deadline` says whether the client gave one.
    #[must_use]
    pub fn start(owner: u32, max_tokens: u32, deadline: bool, policy: Policy) -> (Self, Actions) {
        Self::start_from(owner, 0, max_tokens, deadline, policy)
    }

    /// The same for an output of which the client has the first `next_index`
    /// tokens: the first attempt starts behind them.
    #[must_use]
    pub fn start_from(
        owner: u32,
        next_index: u32,
        max_tokens: u32,
        deadline: bool,
        policy: Policy,
    ) -> (Self, Actions) {
        let fence = Fence { owner, attempt: 0 };
        let (mut generation, mut actions) =
            Self::planning(fence, next_index, max_tokens, deadline, policy);
        generation.plan(Cause::Start, &mut actions);
        (generation, actions)
    }

    /// One that knows of attempts up to this one, and has yet to ask for a plan.
    fn planning(
        fence: Fence,
        next_index: u32,
        max_tokens: u32,
        deadline: bool,
        policy: Policy,
    ) -> (Self, Actions) {
        let generation = Self {
            policy,
            fence,
            owner: fence.owner,
            last_attempt: fence.attempt,
            next_index,
            max_tokens,
            refusals: 0,
            failures: 0,
            deaths: 0,
            deaths_alone: 0,
            alone: false,
            deadline,
            excluded: SmallVec::new(),
            state: State::Planning,
            moving: None,
            unclaimed: None,
        };
        let mut actions = Actions::new();
        if deadline {
            actions.push(Action::Arm(Timer::Deadline));
        }
        (generation, actions)
    }

    /// Index of the next token that the client lacks: the border from which a
    /// new attempt starts.
    #[must_use]
    pub fn next_index(&self) -> u32 {
        self.next_index
    }

    /// Most output tokens.
    #[must_use]
    pub fn max_tokens(&self) -> u32 {
        self.max_tokens
    }

    /// The attempt in force; attempt 0 before the first.
    #[must_use]
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// Number that the next attempt gets.
    #[must_use]
    pub fn next_attempt(&self) -> u32 {
        self.last_attempt + 1
    }

    /// Whether its attempt is to share its steps with nobody: workers died
    /// that ran it (DESIGN 5).
    #[must_use]
    pub fn alone(&self) -> bool {
        self.alone
    }

    /// What to ask a worker for whose session broke: the attempt, and the first
    /// index that it has not brought. `None`: nothing of it is wanted there.
    #[must_use]
    pub fn reattach(&self, worker: WorkerIndex) -> Option<(Fence, u32)> {
        let State::Running(attempt) = &self.state else {
            return None;
        };
        if let Some(next) = attempt.open_from(worker) {
            return Some((self.fence, next));
        }
        let moving = self.moving.as_ref()?;
        let receiver = &moving.receiver;
        let wanted = receiver.worker() == worker && receiver.is_open();
        wanted.then(|| (moving.fence, receiver.next()))
    }

    /// Whether it has ended.
    #[must_use]
    pub fn ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// Whether an attempt runs.
    #[must_use]
    pub fn running(&self) -> bool {
        matches!(self.state, State::Running(_))
    }

    /// The state of the running attempt's mesh transfer, until it is over.
    #[must_use]
    pub fn transfer(&self) -> Option<TransferState> {
        match &self.state {
            State::Running(attempt) => attempt.transfer().or_else(|| self.transfer_of_move()),
            State::Planning | State::Ended => None,
        }
    }

    /// Whether a worker takes part in the attempt that runs.
    #[must_use]
    pub fn involves(&self, worker: WorkerIndex) -> bool {
        let receiver = self.moving.as_ref().map(|moving| moving.receiver.worker());
        matches!(&self.state, State::Running(attempt) if attempt.side_of(worker).is_some())
            || receiver == Some(worker)
    }

    /// Takes a row of `count` tokens from `first_index` on. This is the path of
    /// every token: no action, no allocation.
    ///
    /// # Errors
    /// A [`Violation`] closes the session that brought the row.
    pub fn tokens(
        &mut self,
        from: WorkerIndex,
        fence: Fence,
        first_index: u32,
        count: u32,
    ) -> Result<Taken, Violation> {
        let State::Running(attempt) = &mut self.state else {
            return self.stale(fence);
        };
        if fence != self.fence {
            return match self.is_move(fence) {
                true => self.move_tokens(from, first_index, count),
                false => self.stale(fence),
            };
        }
        let emits = attempt.emits(from);
        let (_, part) = attempt
            .side_mut(from)
            .ok_or(Violation::UnknownAttempt(fence))?;
        if part.is_gone() {
            return Ok(Taken::Stale);
        }
        let (before, seen) = part.tokens(first_index, count)?;
        if !emits {
            return Ok(Taken::Nothing);
        }
        self.taken(before, seen)
    }

    /// What is new of tokens from index `before` up to `seen`.
    fn taken(&mut self, before: u32, seen: u32) -> Result<Taken, Violation> {
        if seen > self.max_tokens {
            return Err(Violation::TooManyTokens(self.max_tokens));
        }
        if seen <= self.next_index {
            return Ok(Taken::Nothing);
        }
        let skip = self.next_index - before;
        self.next_index = seen;
        Ok(Taken::New { skip })
    }

    /// Takes an event and says what to do.
    ///
    /// # Errors
    /// A [`Violation`] closes the session that brought the event; the machine
    /// is as before, and hears of the session's end as of any other.
    pub fn apply(&mut self, event: Event) -> Result<Actions, Violation> {
        let mut actions = Actions::new();
        match event {
            Event::Planned(plan) => self.planned(plan, &mut actions),
            Event::NoPlan => self.no_plan(&mut actions),
            Event::Opening {
                from,
                fence,
                stage,
                answer,
            } => {
                if self.is_move(fence) {
                    self.move_opened(from, stage, &answer, &mut actions)?;
                    return Ok(actions);
                }
                if !self.is_current(fence)? {
                    return Ok(actions);
                }
                self.opening(from, fence, stage, answer, &mut actions)?;
            }
            Event::StageEnd {
                from,
                fence,
                stage,
                end,
            } => {
                if self.is_move(fence) {
                    self.move_ended(from, stage, &end, &mut actions)?;
                    return Ok(actions);
                }
                if !self.is_current(fence)? {
                    self.ended_late(from, fence, stage, end, &mut actions);
                    return Ok(actions);
                }
                self.stage_end(from, fence, stage, end, &mut actions)?;
            }
            Event::HandOver { to, transfer } => self.hand_over(to, transfer, &mut actions),
            Event::SessionLost { worker, loss } => self.session_lost(worker, loss, &mut actions),
            Event::Reattached { worker, fence } => self.reattached(worker, fence, &mut actions),
            Event::Stop(stop) => {
                let outcome = match stop {
                    Stop::StopString => Outcome::Finished {
                        reason: FinishReason::Stop,
                        stop_token: None,
                    },
                    other => Outcome::Stopped(other),
                };
                self.end(outcome, &mut actions);
            }
            Event::Complete { stop_token } => {
                let reason = FinishReason::Stop;
                let stop_token = Some(stop_token);
                self.end(Outcome::Finished { reason, stop_token }, &mut actions);
            }
            Event::Fired(timer) => self.fired(timer, &mut actions),
        }
        Ok(actions)
    }

    /// The highest fence that was given.
    fn highest(&self) -> Fence {
        Fence {
            owner: self.owner,
            attempt: self.last_attempt,
        }
    }

    fn stale(&self, fence: Fence) -> Result<Taken, Violation> {
        if fence > self.highest() {
            Err(Violation::UnknownAttempt(fence))
        } else {
            Ok(Taken::Stale)
        }
    }

    fn is_current(&self, fence: Fence) -> Result<bool, Violation> {
        if fence > self.highest() {
            return Err(Violation::UnknownAttempt(fence));
        }
        Ok(fence == self.fence && matches!(self.state, State::Running(_)))
    }

    fn planned(&mut self, plan: Plan, actions: &mut Actions) {
        // A plan for a generation that ended meanwhile is no error: the driver
        // releases its booking with everything else.
        if !matches!(self.state, State::Planning) {
            return;
        }
        self.last_attempt += 1;
        self.fence = self.highest();
        self.alone = self.deaths >= self.policy.deaths;
        let mut attempt = Attempt::new(plan, self.next_index);
        let first = attempt.first_side();
        self.state = State::Running({
            attempt.place(first, self.fence, self.next_index, actions);
            attempt
        });
    }

    fn no_plan(&mut self, actions: &mut Actions) {
        if matches!(self.state, State::Planning) {
            let unsupported = self
                .excluded
                .iter()
                .any(|(_, why)| *why == Refusal::Unsupported);
            let outcome = if unsupported {
                Outcome::Unsupported
            } else {
                Outcome::NoPlan
            };
            self.end(outcome, actions);
        }
    }

    fn refused(&mut self, worker: WorkerIndex, why: Refusal, actions: &mut Actions) {
        self.abandon(actions);
        self.exclude(worker, why);
        self.refusals = self.refusals.saturating_add(1);
        let wait = self.refusals > self.policy.refusals;
        if wait {
            self.refusals = 0;
            self.forget_refusals();
        }
        self.ask(Cause::Refused(why), wait, actions);
    }

    fn exclude(&mut self, worker: WorkerIndex, why: Refusal) {
        if !self.excluded.iter().any(|(known, _)| *known == worker) {
            self.excluded.push((worker, why));
        }
    }

    /// What an engine cannot do it cannot do later either; all else may change.
    fn forget_refusals(&mut self) {
        self.excluded
            .retain(|(_, why)| *why == Refusal::Unsupported);
    }

    fn failed(&mut self, failure: Option<Failure>, actions: &mut Actions) {
        self.failures = self.failures.saturating_add(1);
        match failure {
            Some(failure) if !failure.retryable => self.end(Outcome::Failed(failure), actions),
            _ if self.failures >= self.policy.failures => self.end(Outcome::Exhausted, actions),
            _ => {
                self.abandon(actions);
                self.plan(Cause::Failed, actions);
            }
        }
    }

    fn complete(&self) -> bool {
        self.next_index >= self.max_tokens
    }

    fn lost(&mut self, worker: WorkerIndex, loss: Loss, actions: &mut Actions) {
        if self.complete() {
            return self.end(LENGTH, actions);
        }
        self.failures = self.failures.saturating_add(1);
        if self.deaths_alone >= self.policy.deaths_alone {
            self.end(Outcome::Poisoned, actions);
        } else if self.policy.survive_loss && self.failures < self.policy.failures {
            if self.deaths_alone > 0 {
                // A death alone is tried on another worker before it counts.
                self.exclude(worker, Refusal::Unanswered);
            }
            self.abandon(actions);
            self.plan(Cause::Lost(loss), actions);
        } else {
            self.end(Outcome::WorkerLost(worker), actions);
        }
    }

    fn plan(&mut self, cause: Cause, actions: &mut Actions) {
        self.ask(cause, false, actions);
    }

    /// Asks for a plan, unless nothing is left to be done: the last token may
    /// be here while the word that it was the last is lost.
    fn ask(&mut self, cause: Cause, wait_for_room: bool, actions: &mut Actions) {
        if self.complete() {
            return self.end(LENGTH, actions);
        }
        let excluded = self.excluded.clone();
        actions.push(Action::Plan(PlanRequest {
            excluded,
            cause,
            wait_for_room,
            failures: self.failures,
        }));
    }

    /// Leaves the attempt: every part that is still open is cancelled.
    fn abandon(&mut self, actions: &mut Actions) {
        if let Some(moving) = self.moving.take() {
            moving.close(actions);
        }
        if let State::Running(attempt) = std::mem::replace(&mut self.state, State::Planning) {
            self.unclaimed = attempt.unclaimed();
            attempt.close(self.fence, actions);
            actions.push(Action::Release);
        }
    }

    /// A stage of an attempt that is over has ended.
    fn ended_late(
        &mut self,
        from: WorkerIndex,
        fence: Fence,
        stage: Stage,
        end: End,
        actions: &mut Actions,
    ) {
        // Where another attempt runs, the worker that was to decode takes no earlier one.
        if !self.ended() || fence != self.fence || stage != Stage::Prefill {
            return;
        }
        let of_worker = |unclaimed: &mut Unclaimed| unclaimed.prefill == from;
        if let Some(Unclaimed { decode: on, .. }) = self.unclaimed.take_if(of_worker)
            && let End::HandedOff {
                engine: Some(hand_off),
            } = end
        {
            actions.push(Action::DropHandOff {
                on,
                fence,
                hand_off,
            });
        }
    }

    fn end(&mut self, outcome: Outcome, actions: &mut Actions) {
        if self.ended() {
            return;
        }
        self.abandon(actions);
        if outcome == Outcome::TakenOver {
            // It is the other router's.
            self.unclaimed = None;
        }
        if self.deadline {
            actions.push(Action::Disarm(Timer::Deadline));
        }
        self.state = State::Ended;
        actions.push(Action::End(outcome));
    }
}

#[cfg(test)]
mod tests;
