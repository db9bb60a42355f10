//! One open generation: its machine, its output, and who waits for it.
//!
//! Two tasks meet here: a worker's session pushes token ids, a client's stream
//! takes them. Between them is one short std mutex and one waker, no channel.
//! Nothing awaits under the lock.
//!
//! Lock order: a generation's lock may be held while the scheduler's, a
//! timer's or a command queue's is taken, never the other way round.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use kvmesh_session::{
    Command, Generation, GenerationId, HandOff, Placement, Taken, Violation, WorkerIndex,
    generation::{
        Action, Actions, Event, Loss, Outcome, Plan, PlanRequest, PlannedHandOff, Policy, Stop,
        Timer,
    },
    parse::{End, FinishReason, Row, StageEnd},
};
use kvmesh_wire::v1;
use smallvec::SmallVec;

use super::{
    Core,
    continuation::continuation,
    dispatch::Booking,
    figures::{Figures, ms},
    placer::Tail,
    queue::Admitted,
    session::{Outgoing, SessionHandle},
    timers::TimerKey,
};
use crate::{error::RequestError, request::AdmittedRequest};

/// Owner number of a generation that began at this router. Another router that
/// takes it over raises it.
const FIRST_OWNER: u32 = 1;

/// A worker's part in a plan: what is needed to speak to it.
#[derive(Clone)]
pub(super) struct Party {
    /// Number of the worker.
    pub(super) worker: WorkerIndex,
    /// The session as it was when the plan was made. If it has ended since, a
    /// command to it fails, and that is the session's loss.
    pub(super) session: Arc<SessionHandle>,
}

/// A plan that the scheduler chose, with what it takes to carry it out.
pub(super) struct Chosen {
    pub(super) plan: Plan,
    pub(super) parties: SmallVec<[Party; 2]>,
    pub(super) booking: Booking,
    pub(super) cached_tokens: u32,
    pub(super) pulled_tokens: u32,
    pub(super) prefix_from: Option<v1::PrefixSource>,
    pub(super) predicted_start_ms: f64,
    /// What the choice predicts of the first token.
    pub(super) predicted: v1::PhaseTimes,
    /// A prefix goes from the first to the second worker.
    pub(super) pulls: Option<(WorkerIndex, WorkerIndex)>,
    /// What is left to move from the first to the second when prefill ends.
    pub(super) tail: Option<(WorkerIndex, WorkerIndex, Tail)>,
    /// What the choice took.
    pub(super) decide: Duration,
}

/// An open generation.
pub(super) struct Open {
    pub(super) id: GenerationId,
    pub(super) request: AdmittedRequest,
    pub(super) core: Arc<Core>,
    /// From arrival to virtual deadline, ms: the key of every queue.
    pub(super) urgency_ms: f64,
    /// Predicted work of the prompt at arrival, ms.
    pub(super) work_ms: f64,
    /// Chain values of the prompt.
    chain: Vec<u64>,
    state: Mutex<State>,
}

struct State {
    machine: Generation,
    /// All output ids. From `taken` on the client lacks them.
    output: Vec<u32>,
    taken: usize,
    /// Attempt that brought the last token.
    started: u32,
    /// Log-probabilities of `output[taken..]`, where they were asked for.
    logprobs: Vec<v1::TokenLogprobs>,
    waker: Option<Waker>,
    outcome: Option<Outcome>,
    // Boxed: a token's way touches this struct, but not these.
    chosen: Option<Box<Chosen>>,
    placed: Option<Box<v1::Placed>>,
    armed: SmallVec<[(Timer, TimerKey); 3]>,
    /// When the client last took something, or had nothing to take.
    progress: Instant,
    figures: Figures,
}

/// What a client's stream takes at once.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) placed: Option<v1::Placed>,
    pub(super) ids: Vec<u32>,
    pub(super) logprobs: Vec<v1::TokenLogprobs>,
    pub(super) outcome: Option<(Outcome, u32)>,
}

impl Open {
    /// Opens a generation; it asks for its first plan at once.
    pub(super) fn start(
        core: Arc<Core>,
        chain: Vec<u64>,
        request: AdmittedRequest,
        admitted: Admitted,
        id: GenerationId,
    ) -> Arc<Self> {
        let deadline = request.deadline;
        let (machine, actions) = Generation::start(
            FIRST_OWNER,
            request.max_tokens,
            deadline.is_some(),
            Policy::default(),
        );
        let now = Instant::now();
        let state = State {
            machine,
            output: Vec::new(),
            taken: 0,
            started: 0,
            logprobs: Vec::new(),
            waker: None,
            outcome: None,
            chosen: None,
            placed: None,
            armed: SmallVec::new(),
            progress: now,
            figures: Figures::default(),
        };
        let open = Arc::new(Self {
            id,
            request,
            core,
            urgency_ms: admitted.urgency_ms,
            work_ms: admitted.work_ms,
            chain,
            state: Mutex::new(state),
        });
        open.core.register(&open);
        let plan = {
            let mut state = open.lock();
            open.perform(&mut state, actions)
        };
        open.ask(plan);
        open
    }

    // A panic under this lock is a bug of ours in straight-line code; the
    // stream then ends by its own checks rather than by poisoning others.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Feeds an event that cannot break the protocol.
    pub(super) fn apply(self: &Arc<Self>, event: Event) {
        if let Err(violation) = self.try_apply(event) {
            tracing::error!(generation = %self.id, %violation, "event out of turn");
        }
    }

    /// Feeds an event of a session.
    pub(super) fn try_apply(self: &Arc<Self>, event: Event) -> Result<(), Violation> {
        let (plan, waker) = {
            let mut state = self.lock();
            let actions = state.machine.apply(event)?;
            let plan = self.perform(&mut state, actions);
            (
                plan,
                if state.outcome.is_some() {
                    state.waker.take()
                } else {
                    None
                },
            )
        };
        self.ask(plan);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// Takes a row of tokens: the path of every token. Returns how many are
    /// new, or `None` for a stale row; the waker goes to `wake`.
    pub(super) fn tokens(
        &self,
        from: WorkerIndex,
        row: &Row<'_>,
        now: Instant,
        wake: &mut Vec<Waker>,
    ) -> Result<Option<usize>, Violation> {
        let mut state = self.lock();
        let count = u32::try_from(row.ids.len()).unwrap_or(u32::MAX);
        let skip = match state
            .machine
            .tokens(from, row.fence, row.first_index, count)?
        {
            Taken::New { skip } => skip as usize,
            Taken::Nothing => return Ok(Some(0)),
            Taken::Stale => return Ok(None),
        };
        let new = row.ids.get(skip..).unwrap_or_default();
        if state.taken == state.output.len() {
            state.progress = now;
        }
        let attempt = state.machine.fence().attempt;
        if state.started != attempt {
            state.started = attempt;
            if let Some(chosen) = &state.chosen {
                chosen.booking.started();
            }
        }
        state.output.extend_from_slice(new);
        if self.request.logprobs.is_some() {
            let missing = v1::TokenLogprobs::default();
            let given = row.logprobs.iter().chain(std::iter::repeat(&missing));
            state
                .logprobs
                .extend(given.skip(skip).take(new.len()).cloned());
        }
        state.figures.tokens_arrived(now);
        wake.extend(state.waker.take());
        Ok(Some(new.len()))
    }

    /// Takes the end of a stage.
    pub(super) fn stage_end(
        self: &Arc<Self>,
        from: WorkerIndex,
        end: StageEnd,
    ) -> Result<(), Violation> {
        {
            let mut state = self.lock();
            if end.fence <= state.machine.fence() {
                self.core
                    .counters
                    .transferred_bytes
                    .add(end.timings.transferred_bytes);
                state
                    .figures
                    .stage_ended(end.stage, end.fence.attempt, &end.timings);
            }
            if matches!(end.end, End::HandedOff { .. }) {
                state.figures.handed_off(Instant::now());
            }
            if end.fence == state.machine.fence() {
                self.learn_transfer(&state, &end);
            }
        }
        if matches!(end.end, End::TransferFailed) {
            self.core.counters.transfers_failed.add(1);
        }
        let StageEnd {
            fence, stage, end, ..
        } = end;
        self.try_apply(Event::StageEnd {
            from,
            fence,
            stage,
            end,
        })
    }

    /// What a stage says of how long KV takes from one worker to another.
    fn learn_transfer(&self, state: &State, end: &StageEnd) {
        let Some(chosen) = &state.chosen else {
            return;
        };
        let told = &end.timings;
        let mut placer = self.core.dispatcher.placer();
        if end.stage != kvmesh_session::Stage::Decode {
            if let Some((source, target)) = chosen.pulls
                && told.pulled_tokens > 0
            {
                let (bytes, took) = (told.transferred_bytes, told.transfer_ms);
                placer.transferred(source, target, bytes, took);
            }
        } else if let Some((source, target, tail)) = chosen.tail
            && let Some(took) = state.figures.tail()
        {
            // What is seen ends with a decode step.
            let took = (ms(took) - tail.step_ms).max(0.05);
            placer.transferred(source, target, tail.bytes, took);
        }
    }

    /// Carries a plan out.
    pub(super) fn planned(self: &Arc<Self>, chosen: Chosen) {
        let plan = {
            let mut state = self.lock();
            if state.machine.ended() {
                return;
            }
            let event = Event::Planned(chosen.plan);
            state.placed = self
                .request
                .placements
                .then(|| Box::new(self.placed_message(&state, &chosen)));
            let attempt = state.machine.fence().attempt + 1;
            state
                .figures
                .dispatched(Instant::now(), chosen.decide, attempt, chosen.predicted);
            self.core.counters.decided(&chosen.plan, chosen.decide);
            if matches!(chosen.plan, Plan::Mesh { .. }) {
                self.core.counters.transfers_started.add(1);
            }
            self.core.counters.attempts.add(1);
            state.chosen = Some(Box::new(chosen));
            let waker = state.placed.is_some().then(|| state.waker.take()).flatten();
            let plan = match state.machine.apply(event) {
                Ok(actions) => self.perform(&mut state, actions),
                Err(_) => None,
            };
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
            plan
        };
        self.ask(plan);
    }

    fn placed_message(&self, state: &State, chosen: &Chosen) -> v1::Placed {
        let name = |worker| match self.request.admin {
            true => self.core.table.name(worker),
            false => String::new(),
        };
        let (prefill, decode) = match chosen.plan {
            Plan::Whole { on } => (String::new(), name(on)),
            Plan::Mesh {
                prefill, decode, ..
            }
            | Plan::Engine {
                prefill, decode, ..
            } => (name(prefill), name(decode)),
        };
        v1::Placed {
            attempt: state.machine.fence().attempt + 1,
            cached_tokens: chosen.cached_tokens,
            pulled_tokens: chosen.pulled_tokens,
            prefill_worker: prefill,
            decode_worker: decode,
        }
    }

    fn ask(self: &Arc<Self>, plan: Option<PlanRequest>) {
        if let Some(request) = plan {
            if let Some(stop_token) = self.stop_token() {
                return self.apply(Event::Complete { stop_token });
            }
            self.core.plan(self, &request);
        }
    }

    /// The stop token that the output ends with, if it does: the word that it
    /// was the last may be lost.
    fn stop_token(&self) -> Option<u32> {
        let state = self.lock();
        let last = *state.output.last()?;
        let honoured = state.output.len() >= self.request.min_tokens as usize;
        (honoured && self.request.stop_token_ids.contains(&last)).then_some(last)
    }

    /// Carries actions out; a request for a plan is returned, since the
    /// scheduler is asked without this lock.
    fn perform(self: &Arc<Self>, state: &mut State, actions: Actions) -> Option<PlanRequest> {
        let mut plan = None;
        let mut queue: SmallVec<[Actions; 2]> = SmallVec::new();
        queue.push(actions);
        while let Some(actions) = queue.pop() {
            for action in actions {
                match action {
                    Action::Plan(request) => plan = Some(request),
                    Action::Release => state.chosen = None,
                    Action::Arm(timer) => self.arm(state, timer),
                    Action::Disarm(timer) => self.disarm(state, timer),
                    Action::End(outcome) => self.end(state, outcome),
                    Action::Place {
                        to,
                        fence,
                        stage,
                        hand_off,
                    } => {
                        let placement = self.placement(state, stage, hand_off);
                        let command = Command::Place {
                            generation: self.id,
                            fence,
                            placement,
                        };
                        if !self.send(state, to, command) {
                            let event = Event::SessionLost {
                                worker: to,
                                loss: Loss::Broken,
                            };
                            queue.extend(state.machine.apply(event).ok());
                        }
                    }
                    Action::Cancel { to, fence } => {
                        let command = Command::Cancel {
                            generation: self.id,
                            fence,
                        };
                        self.send(state, to, command);
                    }
                }
            }
        }
        plan
    }

    fn send(self: &Arc<Self>, state: &State, to: WorkerIndex, command: Command) -> bool {
        let Some(chosen) = &state.chosen else {
            return false;
        };
        let Some(party) = chosen.parties.iter().find(|party| party.worker == to) else {
            return false;
        };
        let place = matches!(command, Command::Place { .. });
        let open = place.then(|| Arc::clone(self));
        let Some(number) = party.session.send(Outgoing { command, open }) else {
            return false;
        };
        if place {
            self.core.counters.placements.add(1);
            chosen.booking.placed(to, number);
        }
        true
    }

    fn placement(
        &self,
        state: &State,
        stage: kvmesh_session::Stage,
        hand_off: PlannedHandOff,
    ) -> Box<Placement> {
        let hand_off = match hand_off {
            PlannedHandOff::None => None,
            PlannedHandOff::Engine(payload) => Some(HandOff::Engine(payload)),
            PlannedHandOff::Mesh { transfer, sender } => {
                let (sender, incarnation, address) = self.core.table.sender(sender);
                Some(HandOff::Mesh {
                    transfer,
                    sender,
                    incarnation,
                    address,
                })
            }
        };
        let chosen = state.chosen.as_ref();
        Box::new(Placement {
            continuation: continuation(
                &self.request,
                &state.output,
                self.urgency_ms,
                Instant::now(),
            ),
            stage,
            hand_off,
            prefix_from: chosen.and_then(|chosen| chosen.prefix_from.clone()),
            traceparent: self.request.traceparent.clone(),
            tracestate: self.request.tracestate.clone(),
            request_id: self.request.request_id.clone(),
            predicted_start_ms: chosen.map_or(0.0, |chosen| chosen.predicted_start_ms),
            trace: self.request.trace,
        })
    }

    fn arm(self: &Arc<Self>, state: &mut State, timer: Timer) {
        let settings = &self.core.settings;
        let after = |bound: Duration| Some(Instant::now() + bound);
        let at = match timer {
            Timer::Deadline => self.request.deadline,
            Timer::Answer { .. } => after(settings.answer_timeout),
            Timer::Orphaned { .. } => after(settings.orphan_timeout),
        };
        if let Some(at) = at {
            state
                .armed
                .push((timer, self.core.timers.arm(at, self, timer)));
        }
    }

    fn disarm(&self, state: &mut State, timer: Timer) {
        if let Some(at) = state.armed.iter().position(|(armed, _)| *armed == timer) {
            let (_, key) = state.armed.swap_remove(at);
            self.core.timers.disarm(key);
        }
    }

    fn end(&self, state: &mut State, outcome: Outcome) {
        for (_, key) in state.armed.drain(..) {
            self.core.timers.disarm(key);
        }
        let counters = &self.core.counters;
        match &outcome {
            Outcome::Finished { .. } => {
                counters.finished.add(1);
                let made = state.machine.next_index();
                self.core.dispatcher.learn_output(&self.request, made);
            }
            Outcome::Stopped(Stop::ClientGone) => counters.cancelled.add(1),
            Outcome::Stopped(Stop::SlowClient) => {
                counters.slow_clients.add(1);
                counters.failed.add(1);
            }
            _ => counters.failed.add(1),
        }
        state.figures.ended(Instant::now());
        state.outcome = Some(outcome);
    }

    /// Puts what the client has not got yet into `batch`, which is empty;
    /// registers the waker where there is nothing.
    pub(super) fn poll_take(&self, cx: &mut Context<'_>, batch: &mut Batch) -> Poll<()> {
        let mut state = self.lock();
        let pending = state.output.len() - state.taken;
        if pending == 0 && state.placed.is_none() && state.outcome.is_none() {
            match &mut state.waker {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        }
        batch.placed = state.placed.take().map(|placed| *placed);
        batch.ids.extend_from_slice(&state.output[state.taken..]);
        batch.logprobs.append(&mut state.logprobs);
        if let Some(outcome) = &state.outcome {
            batch.outcome = Some((outcome.clone(), state.machine.next_index()));
        }
        state.taken = state.output.len();
        if pending > 0 {
            let now = Instant::now();
            state.progress = now;
            state.figures.tokens_taken(now);
        }
        drop(state);
        self.core.counters.undelivered_ids.sub(pending as u64);
        Poll::Ready(())
    }

    /// Whether the machine has ended.
    pub(super) fn ended(&self) -> bool {
        self.lock().machine.ended()
    }

    /// Whether it waits with ids that nobody took since `since`, or holds more
    /// than `most` of them.
    pub(super) fn starved(&self, since: Instant, most: usize) -> bool {
        let state = self.lock();
        let pending = state.output.len() - state.taken;
        pending > 0 && (state.progress <= since || pending > most)
    }

    /// Drops what a client did not read, and ends the stream for it.
    pub(super) fn give_up_on_client(self: &Arc<Self>) {
        self.apply(Event::Stop(Stop::SlowClient));
        let (pending, waker) = {
            let mut state = self.lock();
            let pending = state.output.len() - state.taken;
            let taken = state.taken;
            state.output.truncate(taken);
            state.logprobs = Vec::new();
            // Also where the output was complete: the client never got it.
            state.outcome = Some(Outcome::Stopped(Stop::SlowClient));
            (pending, state.waker.take())
        };
        self.core.counters.undelivered_ids.sub(pending as u64);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The client's stream is gone.
    pub(super) fn close(self: &Arc<Self>) {
        self.apply(Event::Stop(Stop::ClientGone));
        let pending = {
            let mut state = self.lock();
            let pending = state.output.len() - state.taken;
            state.taken = state.output.len();
            pending
        };
        self.core.counters.undelivered_ids.sub(pending as u64);
        self.core.unregister(self.id);
    }

    /// The last message of a stream that ended well. `output_tokens` is what
    /// the client got.
    pub(super) fn finished(
        &self,
        reason: FinishReason,
        stop_token: Option<u32>,
        output_tokens: u32,
    ) -> v1::Finished {
        let state = self.lock();
        let prompt = u32::try_from(self.request.prompt_ids.len()).unwrap_or(u32::MAX);
        v1::Finished {
            reason: match reason {
                FinishReason::Stop => v1::FinishReason::Stop.into(),
                FinishReason::Length => v1::FinishReason::Length.into(),
            },
            usage: Some(
                state
                    .figures
                    .usage(prompt, output_tokens, state.machine.fence().attempt),
            ),
            timings: Some(state.figures.timings(&self.request)),
            stop_token_id: stop_token,
            trace: if self.request.trace {
                state.figures.trace()
            } else {
                Vec::new()
            },
            ..v1::Finished::default()
        }
    }

    /// What was predicted of the attempt that brought the first token, and what
    /// it took; counted as it is told.
    pub(super) fn measured(&self) -> Option<(u32, v1::PhaseTimes)> {
        let (attempt, predicted, actual) = self.lock().figures.prediction()?;
        self.core.counters.predicted(&predicted, &actual);
        Some((attempt, actual))
    }

    /// The first message of a stream.
    pub(super) fn accepted(&self) -> v1::Accepted {
        let request = &self.request;
        v1::Accepted {
            generation_id: self.id.to_string(),
            seed: request.sampling.seed,
            prompt_tokens: u32::try_from(request.prompt_ids.len()).unwrap_or(u32::MAX),
            max_tokens: request.max_tokens,
            model: request.model.clone(),
        }
    }

    /// A stop string of the request, by its number.
    pub(super) fn stop_string(&self, index: usize) -> String {
        let stops = self.request.text.as_ref().map(|text| text.stops.as_slice());
        stops
            .and_then(|stops| stops.get(index))
            .cloned()
            .unwrap_or_default()
    }

    /// What the client is told of an end that is no success.
    pub(super) fn error(&self, outcome: &Outcome, next_index: u32) -> RequestError {
        match outcome {
            Outcome::Stopped(Stop::ClientGone | Stop::StopString) | Outcome::Finished { .. } => {
                RequestError::Cancelled
            }
            Outcome::Stopped(Stop::SlowClient) => RequestError::SlowClient { next_index },
            Outcome::Stopped(Stop::Shutdown) => RequestError::ShuttingDown { next_index },
            Outcome::Stopped(Stop::Overloaded) => RequestError::Overloaded {
                reason: "no worker had room in time",
                retry_after: Duration::from_secs(1),
            },
            Outcome::DeadlineExceeded => RequestError::DeadlineExceeded { next_index },
            Outcome::NoPlan => RequestError::NoWorker(self.request.model.clone()),
            Outcome::Unsupported => {
                RequestError::Unsupported(format!("by the engine of {}", self.request.model))
            }
            Outcome::TakenOver => RequestError::TakenOver { next_index },
            Outcome::WorkerLost(_) => {
                let reason = "the worker was lost".to_owned();
                RequestError::WorkerLost { reason, next_index }
            }
            Outcome::Exhausted => {
                let reason = "too many attempts failed".to_owned();
                RequestError::WorkerLost { reason, next_index }
            }
            Outcome::Failed(failure) => RequestError::WorkerFailed {
                code: failure.code,
                reason: failure.reason.clone(),
                message: failure.message.clone(),
                next_index,
            },
        }
    }

    /// Chain values of the prompt.
    pub(super) fn chain(&self) -> &[u64] {
        &self.chain
    }

    /// Number of the attempt in force; 0 before the first.
    pub(super) fn attempt(&self) -> u32 {
        self.lock().machine.fence().attempt
    }

    /// Output ids so far, counted.
    pub(super) fn next_index(&self) -> u32 {
        self.lock().machine.next_index()
    }
}
