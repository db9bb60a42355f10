//! One Attach stream: commands in, a frame a step out.

mod claims;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt;
use kvmesh_wire::v1::{
    CacheEvents, Cancelled, Claim, EngineHandOff, Find, Found, HandOver, HandedOff, Load,
    LoadShare, Opening, Place, Refused, RequestClass, Reserved, RouterFrame, RouterHello, Stage,
    StageEnd, StepOutput, StepSample, TransferFailed, WorkerFrame, WorkerHello, hand_off::Kind,
    opening, router_frame, stage_end::End, worker_frame,
};
use tokio::{
    sync::{broadcast, mpsc},
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::{
    faults::FaultPlan,
    hand_off,
    request::{Phase, Rows, Running},
    state::{BLOCK_TOKENS, State, protocol_version, step_model},
};

/// Load frames come at least so often (PROTOCOLS 1).
const LOAD_EVERY: Duration = Duration::from_millis(250);
/// Changes of load are gathered for so long.
const LOAD_COALESCED: Duration = Duration::from_millis(5);
/// Rows in a frame: some 30 bytes each, so well under 64 KiB.
const ROWS_PER_FRAME: usize = 1_000;
/// Commands taken before a step has its turn.
const COMMANDS_PER_ROUND: usize = 256;

/// What a session sends to.
pub(super) type Outbound = mpsc::Sender<Result<WorkerFrame, Status>>;

/// Whether the session goes on.
type Step = Result<(), Closed>;

/// The router is gone, or the session was ended from here.
#[derive(Debug)]
struct Closed;

/// A pull that ended.
struct Pulled {
    generation: Bytes,
    attempt: u32,
    outcome: Result<(), String>,
}

struct Session {
    state: Arc<State>,
    out: Outbound,
    end: CancellationToken,
    running: Vec<Running>,
    /// Answers for the next frame.
    openings: Vec<Opening>,
    ends: Vec<StageEnd>,
    found: Vec<Found>,
    /// Not answered yet.
    finds: Vec<Find>,
    claims: Vec<Claim>,
    rows: Rows,
    pulls: JoinSet<Pulled>,
    cache: broadcast::Receiver<CacheEvents>,
    last_command: u64,
    next_step: Instant,
    load_sent: Instant,
    load_changed: bool,
    /// The last load that was true when it was sent.
    true_load: Option<Load>,
}

/// Runs one session to its end.
pub(super) async fn run(state: Arc<State>, mut inbound: Streaming<RouterFrame>, out: Outbound) {
    let hello = match inbound.next().await {
        Some(Ok(RouterFrame {
            frame: Some(router_frame::Frame::Hello(hello)),
            ..
        })) => hello,
        _ => {
            let status = Status::invalid_argument("the first frame must be hello");
            let _ = out.send(Err(status)).await;
            return;
        }
    };
    let major = hello.version.map_or(0, |version| version.major);
    if major != 1 {
        let status = Status::failed_precondition("protocol version");
        let _ = out.send(Err(status)).await;
        return;
    }
    let (number, end) = state.open_session(&hello.router_id);
    state.counters.sessions.add(1);
    let now = Instant::now();
    let mut session = Session {
        state: Arc::clone(&state),
        out: out.clone(),
        end,
        running: Vec::new(),
        openings: Vec::new(),
        ends: Vec::new(),
        found: Vec::new(),
        finds: Vec::new(),
        claims: Vec::new(),
        rows: Rows::default(),
        pulls: JoinSet::new(),
        cache: state.cache.subscribe(),
        last_command: 0,
        next_step: now,
        load_sent: now,
        load_changed: true,
        true_load: None,
    };
    // Any end but the router's own is told as a status.
    if session.serve(&hello, &mut inbound).await.is_err() {
        let _ = out.try_send(Err(Status::unavailable("the session was ended")));
    }
    state.counters.dropped.add(session.running.len() as u64);
    state.counters.sessions.sub(1);
    state.close_session(&hello.router_id, number);
}

impl Session {
    async fn serve(&mut self, hello: &RouterHello, inbound: &mut Streaming<RouterFrame>) -> Step {
        self.send_hello(hello).await?;
        self.send_load().await?;
        loop {
            let due = self.wake();
            let steps_now = due <= Instant::now();
            let end = self.end.clone();
            tokio::select! {
                biased;
                () = end.cancelled() => return Err(Closed),
                frame = inbound.next() => {
                    if !self.take(frame) {
                        return Ok(());
                    }
                    for _ in 0..COMMANDS_PER_ROUND {
                        let Some(frame) = inbound.next().now_or_never() else { break };
                        if !self.take(frame) {
                            return Ok(());
                        }
                    }
                }
                Ok(events) = self.cache.recv() => {
                    self.send(worker_frame::Frame::Cache(events)).await?;
                }
                Some(Ok(pulled)) = self.pulls.join_next() => self.received(pulled),
                // Others of this thread have their turn between steps.
                () = tokio::task::yield_now(), if steps_now => {}
                () = sleep_until(due), if !steps_now => {}
            }
            self.answer_finds();
            self.answer_claims().await?;
            self.start_ready();
            // First tokens are of a step, too.
            let number = match self.rows.is_empty() {
                true => 0,
                false => self.state.begin_step(),
            };
            self.flush(number, true, None).await?;
            if self.decoding() > 0 && !self.stuck() && Instant::now() >= self.next_step {
                self.step().await?;
            }
            if Instant::now() >= self.load_due() {
                self.send_load().await?;
            }
        }
    }

    fn stuck(&self) -> bool {
        self.state.faults.plan().stuck
    }

    fn decoding(&self) -> usize {
        let plan = self.state.faults.plan();
        let decodes =
            |request: &&Running| request.phase() == Phase::Decoding && !request.held(&plan);
        self.running.iter().filter(decodes).count()
    }

    /// When there is something to do without a command.
    fn wake(&self) -> Instant {
        let mut due = self.load_due();
        if !self.stuck() {
            // What is held is looked at with each load.
            let plan = self.state.faults.plan();
            for request in self.running.iter().filter(|request| !request.held(&plan)) {
                match request.phase() {
                    Phase::Waiting(ready) => due = due.min(ready),
                    Phase::Decoding => due = due.min(self.next_step),
                    Phase::Receiving => {}
                }
            }
        }
        due
    }

    fn load_due(&self) -> Instant {
        self.load_sent
            + if self.load_changed {
                LOAD_COALESCED
            } else {
                LOAD_EVERY
            }
    }

    /// Takes one command. False: the router is gone.
    fn take(&mut self, frame: Option<Result<RouterFrame, Status>>) -> bool {
        let Some(Ok(frame)) = frame else {
            return false;
        };
        self.last_command = frame.number;
        self.load_changed = true;
        match frame.frame {
            Some(router_frame::Frame::Place(place)) => self.place(place),
            Some(router_frame::Frame::Cancel(cancel)) => {
                let (owner, attempt) = (cancel.owner, cancel.attempt);
                let (late, untold) = {
                    let plan = self.state.faults.plan();
                    (plan.late_cancels, plan.untold_cancels)
                };
                while let Some(at) = self.running.iter().position(|request| {
                    request.generation == cancel.generation
                        && (request.owner, request.attempt) <= (owner, attempt)
                        && !(late && request.stage == Stage::Prefill)
                }) {
                    let request = self.running.swap_remove(at);
                    self.state.counters.cancelled.add(1);
                    if !untold {
                        self.ends.push(request.end(End::Cancelled(Cancelled {})));
                    }
                }
            }
            Some(router_frame::Frame::Find(find)) => self.finds.push(find),
            Some(router_frame::Frame::Claim(claim)) => {
                self.state.counters.claims.add(1);
                self.claims.push(claim);
            }
            Some(router_frame::Frame::HandOver(hand_over)) => self.hand_over(&hand_over),
            // Frames of a newer minor version are ignored.
            _ => {}
        }
        true
    }

    /// Hands a stream over at once: there is no KV to move. The receiver, which knows
    /// each token, says again what this worker has said from its border on.
    fn hand_over(&mut self, asked: &HandOver) {
        let Some(Kind::Mesh(mesh)) = asked.hand_off.clone().and_then(|h| h.kind) else {
            return;
        };
        let stream = self.running.iter().position(|request| {
            request.generation == asked.generation
                && (request.owner, request.attempt) == (asked.owner, asked.attempt)
                && request.phase() == Phase::Decoding
        });
        match stream {
            Some(at) if !self.state.faults.plan().keep_streams => {
                self.load_changed = true;
                let mut request = self.running.swap_remove(at);
                request.mesh = Some(mesh);
                let end = hand_off_end(&self.state, &request, 0);
                self.ends.push(request.end(end));
            }
            _ => self.state.offers.abort_if_open(&mesh.transfer_id),
        }
    }

    fn place(&mut self, place: Place) {
        self.state.note_place(&place);
        let opening = Opening {
            generation: place.generation.clone(),
            owner: place.owner,
            attempt: place.attempt,
            stage: place.stage,
            answer: None,
        };
        let (refusal, field, silent) = {
            let mut plan = self.state.faults.plan();
            let refuses = plan.refuse_next > 0;
            plan.refuse_next = plan.refuse_next.saturating_sub(1);
            let silent = !refuses && plan.skip_openings > 0;
            plan.skip_openings -= u32::from(silent);
            let field = refuses.then(|| plan.refuse_field.clone());
            (refuses.then_some(plan.refuse_reason), field, silent)
        };
        let accepted = match refusal {
            Some(reason) => Err((reason, "asked to refuse".to_owned())),
            None => Running::accept(&self.state, place),
        };
        let answer = match accepted {
            Ok(request) => {
                let reserved = Reserved {
                    tokens_held: 0,
                    tokens_reserved: (request.blocks * BLOCK_TOKENS) as u32,
                };
                self.start_pull(&request);
                self.running.push(request);
                opening::Answer::Reserved(reserved)
            }
            Err((reason, message)) => {
                self.state.counters.refused.add(1);
                opening::Answer::Refused(Refused {
                    reason: reason as i32,
                    message,
                    field: field.unwrap_or_default(),
                })
            }
        };
        if !silent {
            self.openings.push(Opening {
                answer: Some(answer),
                ..opening
            });
        }
    }

    fn start_pull(&mut self, request: &Running) {
        let (Phase::Receiving, Some(mesh)) = (request.phase(), request.mesh.clone()) else {
            return;
        };
        let (generation, attempt) = (request.generation.clone(), request.attempt);
        let fails = self.state.faults.plan().fail_pulls;
        self.pulls.spawn(async move {
            let outcome = match fails {
                true => Err("asked to fail".to_owned()),
                false => hand_off::pull(&mesh.sender_address, &mesh.transfer_id).await,
            };
            Pulled {
                generation,
                attempt,
                outcome,
            }
        });
    }

    fn received(&mut self, pulled: Pulled) {
        let Some(at) = self.running.iter().position(|request| {
            request.generation == pulled.generation
                && request.attempt == pulled.attempt
                && request.phase() == Phase::Receiving
        }) else {
            return;
        };
        self.load_changed = true;
        match pulled.outcome {
            Ok(()) => self.begin(at),
            Err(message) => {
                let request = self.running.swap_remove(at);
                self.state.counters.failed.add(1);
                let end = End::TransferFailed(TransferFailed { message });
                self.ends.push(request.end(end));
            }
        }
    }

    /// Starts what has waited long enough.
    fn start_ready(&mut self) {
        if self.stuck() {
            return;
        }
        let now = Instant::now();
        let ready = |request: &Running, plan: &FaultPlan| {
            matches!(request.phase(), Phase::Waiting(ready) if ready <= now) && !request.held(plan)
        };
        loop {
            let plan = self.state.faults.get();
            let Some(at) = self
                .running
                .iter()
                .position(|request| ready(request, &plan))
            else {
                break;
            };
            self.begin(at);
        }
    }

    /// The prompt's KV is here: brings the first token, or hands off.
    fn begin(&mut self, at: usize) {
        self.load_changed = true;
        let idle = self.decoding() == 0;
        let request = &mut self.running[at];
        request.start(Instant::now());
        let prefill = request.stage == Stage::Prefill;
        let emits = !prefill || self.state.config.prefill_emits_first_token;
        let end = if emits {
            let mut plan = self.state.faults.plan();
            request.advance(&mut self.rows, &mut plan)
        } else {
            None
        };
        let end = match end {
            None if prefill => Some(hand_off_end(&self.state, request, u32::from(emits))),
            end => end,
        };
        if let Some(end) = end {
            let request = self.running.swap_remove(at);
            self.ends.push(request.end(end));
        } else if idle {
            // An idle engine begins its steps when work comes.
            self.next_step = Instant::now() + self.state.config.step;
        }
    }

    async fn step(&mut self) -> Step {
        let began = Instant::now();
        let number = self.state.begin_step();
        self.next_step = (self.next_step + self.state.config.step).max(began);
        let mut sample = StepSample::default();
        let mut at = 0;
        while at < self.running.len() && sample.decode_batch < self.state.config.max_batch {
            let request = &mut self.running[at];
            let end = {
                let mut plan = self.state.faults.plan();
                if request.phase() != Phase::Decoding || request.held(&plan) {
                    at += 1;
                    continue;
                }
                sample.decode_batch += 1;
                sample.decode_context += request.context();
                request.advance(&mut self.rows, &mut plan)
            };
            if let Some(end) = end {
                let request = self.running.swap_remove(at);
                self.ends.push(request.end(end));
                self.load_changed = true;
            } else {
                at += 1;
            }
            if self.rows.len() >= ROWS_PER_FRAME {
                self.flush(number, false, None).await?;
            }
        }
        let took = began.elapsed().max(self.state.config.step);
        let said = self.state.faults.plan().say_step.unwrap_or(took);
        sample.duration_us = said.as_micros() as u64;
        self.flush(number, true, Some(sample)).await?;
        self.die_if_due();
        Ok(())
    }

    fn die_if_due(&self) {
        let due = self.state.faults.plan().die_after_tokens;
        if due.is_some_and(|due| self.state.counters.tokens.get() >= due) {
            self.state.die();
        }
    }

    /// Sends what has gathered. Nothing, if that is nothing.
    async fn flush(&mut self, step: u64, last: bool, sample: Option<StepSample>) -> Step {
        let answers = self.openings.len() + self.ends.len() + self.found.len();
        if answers == 0 && self.rows.is_empty() && sample.is_none() {
            return Ok(());
        }
        let mut frame = StepOutput {
            step,
            last,
            openings: std::mem::take(&mut self.openings),
            tokens: (!self.rows.is_empty()).then(|| self.rows.take()),
            ends: std::mem::take(&mut self.ends),
            found: std::mem::take(&mut self.found),
            sample,
            load: None,
        };
        if last && Instant::now() >= self.load_due() {
            frame.load = Some(self.next_load());
        }
        self.send(worker_frame::Frame::Step(frame)).await
    }

    async fn send_hello(&mut self, _hello: &RouterHello) -> Step {
        let hello = WorkerHello {
            version: Some(protocol_version(&self.state.config)),
            record: Some(self.state.record.clone()),
            last_event: 0,
            resume_event: 1,
            step_model: Some(step_model(&self.state.config)),
            reattached: Vec::new(),
        };
        self.send(worker_frame::Frame::Hello(hello)).await
    }

    async fn send_load(&mut self) -> Step {
        let load = self.next_load();
        self.send(worker_frame::Frame::Load(load)).await
    }

    fn next_load(&mut self) -> Load {
        self.load_sent = Instant::now();
        self.load_changed = false;
        if let Some(old) = &self.true_load
            && self.state.faults.plan().old_loads
        {
            return *old;
        }
        let load = self.state.load(self.last_command, self.own());
        self.true_load = Some(load);
        load
    }

    fn own(&self) -> LoadShare {
        let mut own = LoadShare::default();
        for request in &self.running {
            let of_class = match request.class {
                RequestClass::Interactive => &mut own.interactive,
                RequestClass::Batch => &mut own.batch,
                RequestClass::Standard | RequestClass::Unspecified => &mut own.standard,
            }
            .get_or_insert_default();
            match request.phase() {
                Phase::Waiting(_) => {
                    let tokens = u64::from(request.prompt_tokens());
                    own.queued += 1;
                    own.queued_prefill_tokens += tokens;
                    of_class.waiting += 1;
                    of_class.waiting_tokens += tokens;
                }
                Phase::Receiving => {
                    own.receiving += 1;
                    of_class.decoding += 1;
                }
                Phase::Decoding => {
                    own.decoding += 1;
                    own.decode_context += request.context();
                    of_class.decoding += 1;
                }
            }
        }
        own
    }

    async fn send(&mut self, frame: worker_frame::Frame) -> Step {
        let frame = WorkerFrame { frame: Some(frame) };
        tokio::select! {
            () = self.end.cancelled() => Err(Closed),
            sent = self.out.send(Ok(frame)) => sent.map_err(|_| Closed),
        }
    }
}

fn hand_off_end(state: &State, request: &Running, tokens_committed: u32) -> End {
    let engine = match &request.mesh {
        Some(mesh) => {
            state.offers.commit(&mesh.transfer_id);
            None
        }
        None => Some(EngineHandOff {
            connector: state.config.engine_connector.clone(),
            payload: request.generation.clone(),
        }),
    };
    state.counters.handed_off.add(1);
    End::HandedOff(HandedOff {
        engine,
        tokens_committed,
    })
}
