//! One task a worker: its connection, its session, its streams.
//!
//! The task reads Attach and never waits there for anything else: rows go
//! under the lock of their generation, loads to the scheduler, cache events to
//! the index. Commands come over one bounded queue; a queue that is full means
//! a transport that does not drain, and the session is closed.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, Mutex, PoisonError},
    task::Waker,
    time::{Duration, Instant},
};

use kvmesh_rpc::v1::worker_client::WorkerClient;
use kvmesh_session::{
    Command, Fence, GenerationId, Link, PROTOCOL_VERSION, Violation,
    generation::{Event as GenerationEvent, Loss},
    link::{self, Action, Event, State},
    parse::{self, Answer, Inbound, LoadReport, StepFrame},
};
use kvmesh_wire::v1;
use prost::Message as _;
use rand::RngExt as _;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

use super::{Core, figures::ms, open::Open, placer::Standing, table::WorkerEntry};

/// Commands that may wait for one worker's transport.
const COMMAND_QUEUE: usize = 4_096;
/// First wait before a worker is dialled again, and the longest.
const REDIAL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// How often a session lets go of generations that have ended.
const SWEEP: Duration = Duration::from_secs(1);

/// A command on its way, and the generation that it places.
pub(super) struct Outgoing {
    pub(super) command: Command,
    pub(super) open: Option<Arc<Open>>,
}

/// The sending half of one live session. It ends with the session: a new one
/// has a new handle.
pub(super) struct SessionHandle {
    sender: Mutex<Sender>,
    closed: CancellationToken,
}

struct Sender {
    next: u64,
    queue: mpsc::Sender<(u64, Outgoing)>,
}

impl SessionHandle {
    fn new() -> (Arc<Self>, mpsc::Receiver<(u64, Outgoing)>) {
        let (queue, commands) = mpsc::channel(COMMAND_QUEUE);
        let sender = Mutex::new(Sender { next: 1, queue });
        (
            Arc::new(Self {
                sender,
                closed: CancellationToken::new(),
            }),
            commands,
        )
    }

    /// Queues a command and gives its number; `None` where the session has
    /// ended or does not drain.
    pub(super) fn send(&self, outgoing: Outgoing) -> Option<u64> {
        if self.closed.is_cancelled() {
            return None;
        }
        // The number is drawn and the command queued under one lock, so that
        // numbers rise in the order of sending.
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        let number = sender.next;
        if sender.queue.try_send((number, outgoing)).is_err() {
            self.closed.cancel();
            return None;
        }
        sender.next += 1;
        Some(number)
    }
}

/// Generation ids are random bits that this router drew: they are their own
/// hash.
#[derive(Default)]
pub(super) struct OwnBits(u64);

impl Hasher for OwnBits {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    // The length prefix of an array's hash.
    fn write_usize(&mut self, _: usize) {}
}

/// Generations by id.
pub(super) type ById<T> = HashMap<GenerationId, T, BuildHasherDefault<OwnBits>>;

/// Why a session's transport ended.
enum Ended {
    /// The router is shutting down or the worker was taken off the table.
    Stopped,
    /// The connection is gone.
    Transport(String),
    /// The worker broke the protocol.
    Violation(Violation),
}

/// An open stream with a worker.
struct Transport {
    inbound: Streaming<v1::WorkerFrame>,
    outbound: mpsc::Sender<v1::RouterFrame>,
}

/// A generation placed on this worker, under its newest attempt here.
struct Held {
    fence: Fence,
    open: Arc<Open>,
}

/// The task of one worker.
pub(super) struct Session {
    core: Arc<Core>,
    worker: Arc<WorkerEntry>,
    link: Link,
    open: ById<Held>,
    suspect_at: Option<Instant>,
    lost_at: Option<Instant>,
    redial: Duration,
    wake: Vec<Waker>,
}

impl Session {
    pub(super) fn new(core: Arc<Core>, worker: Arc<WorkerEntry>) -> Self {
        let link = Link::new(worker.expected_id.clone());
        Self {
            core,
            worker,
            link,
            open: HashMap::default(),
            suspect_at: None,
            lost_at: None,
            redial: REDIAL.0,
            wake: Vec::new(),
        }
    }

    /// Keeps the session up until it is stopped.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        loop {
            self.feed(Event::Dial);
            let ended = tokio::select! {
                () = stop.cancelled() => Ended::Stopped,
                ended = self.connect_and_serve() => ended,
            };
            self.worker.detach();
            match &ended {
                Ended::Stopped => {
                    self.feed(Event::Broken);
                    return;
                }
                Ended::Transport(why) => {
                    tracing::info!(worker = %self.worker.name(), %why, "session ended");
                    self.worker.set_detail(why.clone());
                }
                Ended::Violation(violation) => {
                    self.core.counters.violations.add(1);
                    tracing::warn!(worker = %self.worker.name(), %violation, "session closed");
                    self.worker.set_detail(violation.to_string());
                }
            }
            self.feed(Event::Broken);
            // Full jitter: routers that lost the same worker come back apart.
            let wait = rand::rng().random_range(REDIAL.0 / 2..=self.redial);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
                () = self.worker.redial.notified() => {}
            }
        }
    }

    /// Feeds the link where nothing can be violated.
    fn feed(&mut self, event: Event<'_>) {
        if let Ok(actions) = self.link.apply(event) {
            self.perform(actions);
        }
    }

    async fn connect_and_serve(&mut self) -> Ended {
        let greeting = Duration::from_millis(link::GREETING_MS);
        let mut transport = match timeout(greeting, self.greet()).await {
            Ok(Ok(transport)) => transport,
            Ok(Err(ended)) => return ended,
            Err(_) => {
                return Ended::Transport("no hello within its time".to_owned());
            }
        };
        let (handle, mut commands) = SessionHandle::new();
        self.worker.attach(Arc::clone(&handle));
        self.publish();
        let ended = self.serve(&mut transport, &handle, &mut commands).await;
        handle.closed.cancel();
        ended
    }

    /// Opens connection and stream, and takes the worker's hello.
    async fn greet(&mut self) -> Result<Transport, Ended> {
        let transport_error = |error: &dyn std::error::Error| {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            Ended::Transport(text)
        };
        let channel = connect(&self.worker.address(), self.core.settings.keep_alive)
            .await
            .map_err(|error| transport_error(&error))?;
        let (outbound, frames) = mpsc::channel(COMMAND_QUEUE);
        let actions = self.link.apply(Event::Opened).map_err(Ended::Violation)?;
        for action in &actions {
            if let Action::SendHello {
                known_incarnation,
                known_event,
            } = action
            {
                let hello = self.hello_frame(*known_incarnation, *known_event);
                // The queue is new and empty.
                let _ = outbound.try_send(hello);
            }
        }
        let mut inbound = WorkerClient::new(channel)
            .attach(ReceiverStream::new(frames))
            .await
            .map_err(|status| Ended::Transport(status.message().to_owned()))?
            .into_inner();
        let first = next_frame(&mut inbound).await?;
        let hello = parse::hello(first).map_err(Ended::Violation)?;
        let table = &self.core.table;
        if table.drop_double(&self.worker, &hello.record.worker_id) {
            // The entry of the registry keeps its session, or dials again.
            self.worker.stop.cancel();
            return Err(Ended::Stopped);
        }
        let actions = self
            .link
            .apply(Event::Hello(&hello))
            .map_err(Ended::Violation)?;
        if let State::Refused(mismatch) = self.link.state() {
            let why = mismatch.to_string();
            self.perform(actions);
            return Err(Ended::Transport(why));
        }
        self.worker.greeted(&hello);
        self.core.worker_greeted(&self.worker, &hello);
        self.perform(actions);
        self.redial = REDIAL.0;
        Ok(Transport { inbound, outbound })
    }

    fn hello_frame(&self, known_incarnation: u64, known_event: u64) -> v1::RouterFrame {
        let settings = &self.core.settings;
        let hello = v1::RouterHello {
            version: Some(v1::ProtocolVersion {
                major: PROTOCOL_VERSION.0,
                minor: PROTOCOL_VERSION.1,
            }),
            router_id: settings.router_id.clone(),
            router_incarnation: settings.incarnation,
            known_worker_incarnation: known_incarnation,
            known_event,
            // A lost session ends its streams: nothing is reattached yet.
            reattach: Vec::new(),
        };
        v1::RouterFrame {
            number: 0,
            frame: Some(v1::router_frame::Frame::Hello(hello)),
        }
    }

    async fn serve(
        &mut self,
        transport: &mut Transport,
        handle: &SessionHandle,
        commands: &mut mpsc::Receiver<(u64, Outgoing)>,
    ) -> Ended {
        let mut sweep = tokio::time::interval(SWEEP);
        let alarm = tokio::time::sleep(Duration::from_secs(1));
        tokio::pin!(alarm);
        loop {
            tokio::select! {
                frame = next_frame(&mut transport.inbound) => {
                    let frame = match frame {
                        Ok(frame) => frame,
                        Err(ended) => return ended,
                    };
                    if let Err(violation) = self.frame(frame) {
                        return Ended::Violation(violation);
                    }
                }
                Some((number, outgoing)) = commands.recv() => {
                    if !self.command(number, outgoing, transport) {
                        return Ended::Transport("commands are not drained".to_owned());
                    }
                }
                () = handle.closed.cancelled() => {
                    return Ended::Transport("commands are not drained".to_owned());
                }
                () = &mut alarm => alarm.as_mut().reset(self.alarms().into()),
                _ = sweep.tick() => self.open.retain(|_, held| !held.open.ended()),
            }
        }
    }

    /// Fires what is due and gives the next instant to look again. The waits
    /// move with every frame; the alarm only looks.
    fn alarms(&mut self) -> Instant {
        let now = Instant::now();
        if self.suspect_at.take_if(|at| *at <= now).is_some() {
            self.feed(Event::Fired(link::Timer::Suspect));
        }
        if self.lost_at.take_if(|at| *at <= now).is_some() {
            self.feed(Event::Fired(link::Timer::Lost));
        }
        let next = [self.suspect_at, self.lost_at].into_iter().flatten().min();
        next.unwrap_or(now + Duration::from_secs(1))
    }

    fn command(&mut self, number: u64, outgoing: Outgoing, transport: &Transport) -> bool {
        let Outgoing { command, open } = outgoing;
        if let (
            Command::Place {
                generation, fence, ..
            },
            Some(open),
        ) = (&command, open)
        {
            self.open.insert(
                *generation,
                Held {
                    fence: *fence,
                    open,
                },
            );
            self.feed(Event::Placed);
        }
        let counted = self.link.number();
        debug_assert_eq!(counted, number, "one queue, one count");
        transport
            .outbound
            .try_send(command.into_frame(number))
            .is_ok()
    }

    fn frame(&mut self, frame: v1::WorkerFrame) -> Result<(), Violation> {
        let counters = &self.core.counters;
        let bytes = frame.encoded_len() as u64;
        let now = Instant::now();
        self.worker.heard(now);
        match parse::worker_frame(frame)? {
            Inbound::Step(step) => {
                counters.step_frames.add(1);
                counters.step_bytes.add(bytes);
                let actions = self.link.apply(Event::Frame(step.load.as_ref()))?;
                self.perform(actions);
                self.step(&step, now)?;
                self.ends(*step)
            }
            Inbound::Load(load) => {
                counters.load_frames.add(1);
                counters.load_bytes.add(bytes);
                let actions = self.link.apply(Event::Frame(Some(&load)))?;
                self.perform(actions);
                self.load(&load);
                Ok(())
            }
            Inbound::Cache(events) => {
                counters.cache_frames.add(1);
                counters.cache_bytes.add(bytes);
                let actions = self.link.apply(Event::Frame(None))?;
                self.perform(actions);
                if self.link.indexed()
                    && let Some(event) = self.core.cache_events(&self.worker, &events)
                {
                    self.link.saw_event(event);
                }
                Ok(())
            }
            Inbound::Unknown => Ok(()),
        }
    }

    /// Openings and tokens of a step.
    fn step(&mut self, step: &StepFrame, now: Instant) -> Result<(), Violation> {
        let index = self.worker.index;
        for opening in &step.openings {
            self.feed(Event::Answered);
            let ends = matches!(opening.answer, Answer::Refused(_));
            if ends {
                self.core.counters.refusals.add(1);
            }
            let Some(open) = self.held(&opening.generation, opening.fence, ends) else {
                self.core.counters.stale_frames.add(1);
                continue;
            };
            open.try_apply(GenerationEvent::Opening {
                from: index,
                fence: opening.fence,
                stage: opening.stage,
                answer: opening.answer.clone(),
            })?;
        }
        let mut new = 0;
        let mut stale = 0;
        let mut violation = None;
        for row in step.rows.iter() {
            let Some(held) = self.open.get(&row.generation) else {
                stale += 1;
                continue;
            };
            match held.open.tokens(index, &row, now, &mut self.wake) {
                Ok(Some(count)) => new += count as u64,
                Ok(None) => stale += 1,
                Err(broken) => {
                    violation = Some(broken);
                    break;
                }
            }
        }
        self.core.counters.tokens.add(new);
        self.core.counters.undelivered_ids.add(new);
        if stale > 0 {
            self.core.counters.stale_frames.add(stale);
        }
        // After the counts: a stream that is woken takes from them.
        for waker in self.wake.drain(..) {
            waker.wake();
        }
        violation.map_or(Ok(()), Err)
    }

    /// The generation that a frame speaks of. With `ends` it is let go of,
    /// unless a newer attempt of it is here.
    fn held(&mut self, id: &GenerationId, fence: Fence, ends: bool) -> Option<Arc<Open>> {
        let held = self.open.get(id)?;
        if ends && held.fence <= fence {
            return self.open.remove(id).map(|held| held.open);
        }
        Some(Arc::clone(&held.open))
    }

    /// Ends of a step, and what it took.
    fn ends(&mut self, step: StepFrame) -> Result<(), Violation> {
        for end in step.ends {
            self.feed(Event::Answered);
            match self.held(&end.generation, end.fence, true) {
                Some(open) => open.stage_end(self.worker.index, end)?,
                None => self.core.counters.stale_frames.add(1),
            }
        }
        if let Some(sample) = &step.sample {
            self.core.step_sample(&self.worker, sample);
        }
        if let Some(load) = &step.load {
            self.load(load);
        }
        Ok(())
    }

    fn load(&mut self, report: &LoadReport) {
        self.worker.loaded(report);
        self.core.worker_loaded(&self.worker, report);
    }

    fn perform(&mut self, actions: link::Actions) {
        for action in actions {
            match action {
                Action::Arm(link::Timer::Suspect, after) => {
                    self.suspect_at = Some(Instant::now() + Duration::from_millis(after));
                }
                Action::Arm(link::Timer::Lost, after) => {
                    self.lost_at = Some(Instant::now() + Duration::from_millis(after));
                }
                Action::Disarm(link::Timer::Suspect) => self.suspect_at = None,
                Action::Disarm(link::Timer::Lost) => self.lost_at = None,
                Action::ArmRedial(tries) => {
                    self.redial = (REDIAL.0 * 2_u32.pow(tries.min(8))).min(REDIAL.1);
                }
                Action::Lose(loss) => self.lose(loss),
                Action::ForgetCache => self.core.forget_cache(&self.worker),
                Action::IndexOff(scheme) => self.worker.index_off(scheme),
                Action::StateChanged => self.publish(),
                // Dialling, greeting and closing are the steps of `run`.
                Action::Dial
                | Action::SendHello { .. }
                | Action::Close
                | Action::Arm(..)
                | Action::Disarm(_) => {}
            }
        }
    }

    fn lose(&mut self, loss: Loss) {
        if !self.open.is_empty() {
            let streams = self.open.len();
            let name = self.worker.name();
            tracing::warn!(worker = %name, ?loss, streams, "worker lost");
        }
        let worker = self.worker.index;
        // Taken out first: a generation that is planned anew may come back.
        for held in std::mem::take(&mut self.open).into_values() {
            held.open
                .apply(GenerationEvent::SessionLost { worker, loss });
        }
    }

    fn publish(&self) {
        self.worker.set_state(self.link.state().clone());
        let standing = match self.link.state() {
            _ if self.link.placeable() => Standing::Ready,
            State::Suspect(_) | State::HalfOpen { .. } => Standing::Suspect,
            _ => Standing::Absent,
        };
        self.core.worker_state(&self.worker, standing);
    }
}

async fn next_frame(inbound: &mut Streaming<v1::WorkerFrame>) -> Result<v1::WorkerFrame, Ended> {
    match inbound.message().await {
        Ok(Some(frame)) => Ok(frame),
        Ok(None) => Err(Ended::Transport("closed by the worker".to_owned())),
        Err(status) => Err(Ended::Transport(status.message().to_owned())),
    }
}

/// Opens a connection to a worker. Nagle's algorithm is off: a frame that
/// waits for an acknowledgement costs 40 ms.
pub(super) async fn connect(
    address: &str,
    keep_alive: Duration,
) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from_shared(format!("http://{address}"))?
        .tcp_nodelay(true)
        .connect_timeout(Duration::from_millis(link::GREETING_MS))
        .http2_keep_alive_interval(keep_alive)
        .keep_alive_while_idle(true)
        .keep_alive_timeout(keep_alive)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .connect()
        .await
}

/// Milliseconds since an instant, for figures.
pub(super) fn ms_since(at: Instant) -> f64 {
    ms(at.elapsed())
}
