//! One open generation: its machine, its output, and who waits for it.
//!
//! Two tasks meet here: a worker's session pushes token ids, a client's stream
//! takes them. Between them is one short std mutex and one waker, no channel.
//! Nothing awaits under the lock.
//!
//! Lock order: a generation's lock may be held while the scheduler's, a
//! timer's or a command queue's is taken, never the other way round.

mod abandon;
mod attempts;
mod carry;
mod claimed;
mod client;
mod log;
mod moving;
mod overload;
mod owed;
mod reattach;
mod traced;

pub(super) use claimed::Claimed;
pub(super) use moving::Leaves;
pub(crate) use traced::Traced;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::{Duration, Instant},
};

use kvmesh_scheduler::Place;
use kvmesh_session::{
    Generation, GenerationId, Taken, Violation, WorkerIndex,
    generation::{Actions, Event, Outcome, Plan, Policy, Timer, TransferState},
    parse::{End, Lacks, Row, StageEnd},
};
use kvmesh_wire::v1;
use smallvec::SmallVec;

use super::{
    Core,
    admit::Urgency,
    counters::AttemptCounts,
    dispatch::Booking,
    figures::{Figures, ms},
    given_up::GivenUp,
    placer::Tail,
    recover::Retry,
    session::SessionHandle,
    timers::TimerKey,
};
use crate::{access::Visit, request::AdmittedRequest};
use carry::PutOff;
use moving::{Moving, Tried};
use owed::Owed;

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
    /// From arrival to the virtual deadline as which it goes, ms: its turn among
    /// tenants may let it go as a more urgent one.
    pub(super) urgency_ms: f64,
    pub(super) predicted_start_ms: f64,
    /// What the choice predicts of the first token.
    pub(super) predicted: v1::PhaseTimes,
    /// A prefix goes from the first to the second worker.
    pub(super) pulls: Option<(WorkerIndex, WorkerIndex)>,
    /// What is left to move from the first to the second when prefill ends.
    pub(super) tail: Option<(WorkerIndex, WorkerIndex, Tail)>,
    /// What the choice took.
    pub(super) decide: Duration,
    /// Its place among the later attempts, until it brings a token.
    pub(super) retry: Option<Retry>,
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
    /// What admission predicted of the time until its prompt starts, ms.
    pub(super) wait_ms: f64,
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
    /// Attempt that is over while the generation is not; 0 for none.
    over: u32,
    /// Log-probabilities of `output[taken..]`, where they were asked for.
    logprobs: Vec<v1::TokenLogprobs>,
    waker: Option<Waker>,
    outcome: Option<Outcome>,
    // Boxed: a token's way touches this struct, but not these.
    chosen: Option<Box<Chosen>>,
    /// The hand-over that is under way.
    moving: Option<Box<Moving>>,
    tried: Tried,
    /// Its next attempt is put off, until it has its plan.
    put_off: Option<PutOff>,
    /// Where it waits for a plan, until it has one.
    stands: Option<Place>,
    placed: Option<Box<v1::Placed>>,
    armed: SmallVec<[(Timer, TimerKey); 3]>,
    /// When the client last took something, or had nothing to take.
    progress: Instant,
    figures: Figures,
    /// When the last token came before a failure, until one comes after it.
    moved: Option<Instant>,
    /// An attempt of it ended otherwise than by a worker's refusal.
    failed_over: bool,
    /// What an engine said that it lacks for it.
    lacks: Option<Box<Lacks>>,
    /// Number of the stream that reads it: a later one takes it from those before.
    reader: u32,
    /// Said when the client of that stream is given up.
    given_up: GivenUp,
    /// Since when no stream reads it, and what its tenant's limit counts of it.
    left: Option<Instant>,
    visit: Option<Visit>,
    /// Its workers are not told that it is over: others may resume it.
    stays: bool,
    /// What its end waits for.
    owed: Owed,
}

/// What a client's stream takes at once.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) placed: Option<v1::Placed>,
    pub(super) ids: Vec<u32>,
    pub(super) logprobs: Vec<v1::TokenLogprobs>,
    pub(super) outcome: Option<Outcome>,
}

/// What tokens of a frame have others do, once all of them are taken.
#[derive(Default)]
pub(super) struct Brought {
    /// Those that read these streams.
    pub(super) wake: Vec<Waker>,
    /// Whether the worker has computed a prompt.
    pub(super) computed: bool,
}

impl Open {
    /// Opens a generation; it asks for its first plan at once.
    pub(super) fn start(
        core: Arc<Core>,
        chain: Vec<u64>,
        request: AdmittedRequest,
        admitted: Urgency,
        id: GenerationId,
    ) -> Arc<Self> {
        let deadline = request.deadline;
        let output = request.output_ids.clone();
        let (machine, actions) = Generation::start_from(
            FIRST_OWNER,
            u32::try_from(output.len()).unwrap_or(u32::MAX),
            request.max_tokens,
            deadline.is_some(),
            Policy::default(),
        );
        Self::begin(core, chain, request, admitted, id, |state| {
            state.machine = machine;
            state.taken = output.len();
            state.output = output;
            actions
        })
    }

    /// Opens one that is as `first` says, which gives what is to be done first.
    fn begin(
        core: Arc<Core>,
        chain: Vec<u64>,
        request: AdmittedRequest,
        admitted: Urgency,
        id: GenerationId,
        first: impl FnOnce(&mut State) -> Actions,
    ) -> Arc<Self> {
        let now = Instant::now();
        let mut state = State {
            // Until `first` has said which.
            machine: Generation::start(FIRST_OWNER, 1, false, Policy::default()).0,
            taken: 0,
            output: Vec::new(),
            started: 0,
            over: 0,
            logprobs: Vec::new(),
            waker: None,
            outcome: None,
            chosen: None,
            moving: None,
            tried: Tried::default(),
            put_off: None,
            stands: None,
            placed: None,
            armed: SmallVec::new(),
            progress: now,
            figures: Figures::default(),
            moved: None,
            failed_over: false,
            lacks: None,
            reader: 0,
            given_up: GivenUp::default(),
            left: None,
            visit: None,
            stays: false,
            owed: Owed::default(),
        };
        let actions = first(&mut state);
        let open = Arc::new(Self {
            id,
            request,
            core,
            urgency_ms: admitted.urgency_ms,
            work_ms: admitted.work_ms,
            wait_ms: admitted.wait_ms,
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
        let gone = match event {
            Event::SessionLost { worker, .. } => Some(worker),
            _ => None,
        };
        let (plan, waker, left) = {
            let mut state = self.lock();
            let actions = state.machine.apply(event)?;
            let plan = self.perform(&mut state, actions);
            if let Some(worker) = gone {
                self.settled(&mut state, worker);
            }
            (
                plan,
                if state.outcome.is_some() {
                    state.waker.take()
                } else {
                    None
                },
                match state.machine.ended() {
                    true => state.stands.take(),
                    false => None,
                },
            )
        };
        if let Some(place) = left {
            self.core.leaves(&place);
        }
        self.ask(plan);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// Takes a row of tokens that a step brought: the path of every token. Returns
    /// how many are new, or `None` for a stale row.
    pub(super) fn tokens(
        &self,
        (from, step): (WorkerIndex, u64),
        row: &Row<'_>,
        now: Instant,
        brought: &mut Brought,
    ) -> Result<Option<usize>, Violation> {
        let mut state = self.lock();
        let count = u32::try_from(row.ids.len()).unwrap_or(u32::MAX);
        let before = state.machine.fence();
        let taken = state
            .machine
            .tokens(from, row.fence, row.first_index, count)?;
        if state.machine.fence() != before {
            self.moved(&mut state, before);
        }
        let skip = match taken {
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
            if let Some(chosen) = &mut state.chosen {
                brought.computed |= chosen.booking.started(from, step);
                chosen.retry = None;
            }
            if let Some(since) = state.moved.take() {
                let gap = now.saturating_duration_since(since);
                self.core.counters.moved(gap);
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
        brought.wake.extend(state.waker.take());
        Ok(Some(new.len()))
    }

    /// A worker refuses it: its engine lacks something.
    pub(super) fn engine_lacks(&self, lacks: &Lacks) {
        self.lock().lacks = Some(Box::new(lacks.clone()));
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
                if end.fence.attempt > 1 {
                    let computed = u64::from(end.timings.computed_tokens);
                    self.core.counters.recomputed_tokens.add(computed);
                }
                self.core
                    .counters
                    .transferred_bytes
                    .add(end.timings.transferred_bytes);
                state
                    .figures
                    .stage_ended(end.stage, end.fence.attempt, &end.timings);
                self.settled(&mut state, from);
            }
            let prefilled = end.stage == kvmesh_session::Stage::Prefill;
            if prefilled && matches!(end.end, End::HandedOff { .. }) {
                state.figures.handed_off(Instant::now());
            }
            if end.fence == state.machine.fence() {
                self.learn_transfer(&state, &end);
            }
        }
        if let Some(ms) = end.timings.urgent_start_ms {
            let took = Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default();
            self.core.urgent_start.observe(took);
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

    /// Whether the machine has ended.
    pub(super) fn ended(&self) -> bool {
        self.lock().machine.ended()
    }

    /// Adds the attempt that runs, and its transfer, to `counts`.
    pub(super) fn count(&self, counts: &mut AttemptCounts) {
        let state = self.lock();
        counts.open += u64::from(state.machine.running());
        match state.machine.transfer() {
            Some(TransferState::Placed) => counts.placed += 1,
            Some(TransferState::Reserved) => counts.reserved += 1,
            Some(TransferState::Flowing) => counts.flowing += 1,
            Some(TransferState::Committed) => counts.committed += 1,
            None => {}
        }
    }

    /// Chain values of the prompt.
    pub(super) fn chain(&self) -> &[u64] {
        &self.chain
    }

    /// Number that the next attempt gets.
    pub(super) fn next_attempt(&self) -> u32 {
        self.lock().machine.next_attempt()
    }

    /// Whether it was begun before: it goes before new work of its class, and
    /// where nobody takes it up a worker was lost to it. Refused is not begun.
    pub(super) fn continues(&self) -> bool {
        self.was_begun(&self.lock())
    }

    fn was_begun(&self, state: &State) -> bool {
        state.failed_over || state.machine.next_index() as usize > self.request.output_ids.len()
    }

    /// Prompt and output so far.
    pub(super) fn sequence(&self) -> Vec<u32> {
        let state = self.lock();
        [&self.request.prompt_ids[..], &state.output[..]].concat()
    }

    /// Output ids so far, counted.
    pub(super) fn next_index(&self) -> u32 {
        self.lock().machine.next_index()
    }

    /// Attempts so far.
    pub(super) fn attempts(&self) -> u32 {
        self.lock().machine.fence().attempt
    }
}
