//! One task a worker: its connection, its session, its streams.
//!
//! The task reads Attach and never waits there for anything else: rows go
//! under the lock of their generation, loads to the scheduler, cache events to
//! the index. Commands come over one bounded queue. A burst of placements waits in
//! the router's queue once some are in this one; only cancels that nobody reads can
//! fill it, and then the session is closed.

mod alarms;
mod frames;
mod handle;
mod leaving;
mod reattach;
mod supervise;
mod transport;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use kvmesh_session::{
    Command, Fence, GenerationId, Link,
    generation::Loss,
    link::{self, Action, Event, State},
};
use kvmesh_wire::v1;
use rand::RngExt as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    Core,
    figures::ms,
    open::{Brought, Open},
    placer::Standing,
    table::WorkerEntry,
};
use alarms::Alarms;
pub(super) use handle::{ById, Outgoing, SessionHandle};
use leaving::Leaving;
use reattach::at;
use supervise::lost;
pub(crate) use supervise::text_of;
pub(super) use transport::connect;
use transport::{Ended, Transport, next_frame};

/// Placements that may wait for one worker's session: those after them wait in
/// the router's queue, where their order can still change.
const PLACEMENTS_QUEUED: usize = 1_024;
/// Commands that may wait for it. A client that goes away cancels all its
/// streams at once, so that there is room for a cancel of each.
const COMMAND_QUEUE: usize = 65_536;
/// Frames that may wait for its connection to be written.
const OUTBOUND_QUEUE: usize = 1_024;
/// Longest wait before a worker whose session has just broken is dialled again.
const REDIAL_AT_ONCE: Duration = Duration::from_millis(20);
/// First wait before a worker is dialled again, and the longest.
const REDIAL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// How often a session lets go of generations that have ended.
const SWEEP: Duration = Duration::from_secs(1);

/// A generation placed on this worker, under its newest attempt here.
struct Held {
    fence: Fence,
    /// Number of the command of this connection that placed it; 0 where none did.
    command: u64,
    open: Arc<Open>,
}

/// The commands of the session that is open, both ends.
type Queue = Option<(Arc<SessionHandle>, mpsc::Receiver<(u64, Outgoing)>)>;

/// The task of one worker.
pub(super) struct Session {
    core: Arc<Core>,
    worker: Arc<WorkerEntry>,
    link: Link,
    open: ById<Held>,
    alarms: Alarms,
    /// When what runs there is lost unless the worker is back.
    reattach_at: Option<Instant>,
    /// What the last hello named of what runs there.
    named: Vec<(GenerationId, Fence)>,
    /// What the worker still has of it.
    kept: Vec<(GenerationId, Fence)>,
    redial: Duration,
    /// Set while the worker is left by its streams.
    leaving: Option<Leaving>,
    brought: Brought,
    /// How often the task panicked.
    panics: u32,
}

/// Longest pause before a worker is dialled again after so many tries in vain.
fn redial_after(tries: u32) -> Duration {
    (REDIAL.0 * 2_u32.pow(tries.min(8))).min(REDIAL.1)
}

/// A worker's link before its first hello.
fn new_link(core: &Core, worker: &WorkerEntry) -> Link {
    let grace = core.settings.reattach_grace.as_millis();
    Link::new(worker.expected_id.clone()).with_grace(u64::try_from(grace).unwrap_or(u64::MAX))
}

impl Session {
    pub(super) fn new(core: Arc<Core>, worker: Arc<WorkerEntry>) -> Self {
        Self {
            link: new_link(&core, &worker),
            core,
            worker,
            open: HashMap::default(),
            alarms: Alarms::new(Instant::now()),
            reattach_at: None,
            named: Vec::new(),
            kept: Vec::new(),
            redial: REDIAL.0,
            leaving: None,
            brought: Brought::default(),
            panics: 0,
        }
    }

    /// Keeps the session up until it is stopped.
    async fn run(&mut self, stop: &CancellationToken, queue: &mut Queue) {
        loop {
            let ended = tokio::select! {
                () = stop.cancelled() => Ended::Stopped,
                ended = self.connect_and_serve(queue) => ended,
            };
            self.worker.detach();
            self.end_queue(queue);
            match &ended {
                Ended::Stopped => {
                    self.feed(Event::Violated);
                    self.feed(Event::Fired(link::Timer::Reattach));
                    return;
                }
                Ended::Transport(why) | Ended::Refused(why) => {
                    tracing::info!(worker = %self.worker.name(), %why, "session ended");
                    self.worker.set_detail(why.clone());
                }
                Ended::Violation(violation) => {
                    self.core.counters.violations.add(1);
                    tracing::warn!(worker = %self.worker.name(), %violation, "session closed");
                    self.worker.set_detail(violation.to_string());
                }
            }
            self.feed(match &ended {
                Ended::Violation(_) => Event::Violated,
                _ => Event::Broken,
            });
            let refused = matches!(ended, Ended::Refused(_));
            self.worker.unreached(refused);
            if refused {
                self.feed(Event::Refused);
            }
            if !self.link.away() && self.core.table.drop_gone(&self.worker) {
                // Its key went before its session did.
                self.core.worker_gone(&self.worker);
                self.core.forget_models();
                return;
            }
            if !self.pause(stop).await {
                self.feed(Event::Fired(link::Timer::Reattach));
                return;
            }
        }
    }

    /// Waits before the worker is dialled again. False: it is not to be.
    async fn pause(&mut self, stop: &CancellationToken) -> bool {
        // Full jitter: routers that lost the same worker come back apart.
        let range = match self.link.away() && self.redial <= REDIAL.0 * 2 {
            true => Duration::ZERO..=REDIAL_AT_ONCE,
            false => REDIAL.0 / 2..=self.redial,
        };
        let wait = rand::rng().random_range(range);
        let until = Instant::now() + wait;
        loop {
            let grace = self.reattach_at;
            tokio::select! {
                () = stop.cancelled() => return false,
                () = tokio::time::sleep_until(until.into()) => return true,
                () = self.worker.redial.notified() => return true,
                () = at(grace) => self.grace_is_over(),
            }
        }
    }

    /// Feeds the link where nothing can be violated.
    fn feed(&mut self, event: Event<'_>) {
        if let Ok(actions) = self.link.apply(event) {
            self.perform(actions);
        }
    }

    async fn connect_and_serve(&mut self, queue: &mut Queue) -> Ended {
        let mut transport = match self.greet().await {
            Ok(transport) => transport,
            Err(ended) => return ended,
        };
        let (handle, commands) = SessionHandle::new();
        let (handle, commands) = queue.insert((handle, commands));
        self.worker.attach(Arc::clone(handle));
        self.publish();
        self.take_back(handle);
        self.serve(&mut transport, handle, commands).await
    }

    async fn serve(
        &mut self,
        transport: &mut Transport,
        handle: &SessionHandle,
        commands: &mut mpsc::Receiver<(u64, Outgoing)>,
    ) -> Ended {
        let Transport {
            inbound, outbound, ..
        } = transport;
        let mut sweep = tokio::time::interval(SWEEP);
        self.alarms.begin(Instant::now());
        let alarm = tokio::time::sleep_until(self.alarms.due().into());
        tokio::pin!(alarm);
        loop {
            tokio::select! {
                frame = next_frame(inbound) => {
                    let frame = match frame {
                        Ok(frame) => frame,
                        Err(ended) => return ended,
                    };
                    if let Err(violation) = self.frame(frame) {
                        return Ended::Violation(violation);
                    }
                }
                next = next_command(outbound, commands) => {
                    let Some((room, number, outgoing)) = next else {
                        return Ended::Transport("closed under its commands".to_owned());
                    };
                    room.send(self.command(number, outgoing));
                }
                () = handle.closed.cancelled() => {
                    return Ended::Transport("commands are not drained".to_owned());
                }
                () = &mut alarm => {
                    self.look();
                    alarm.as_mut().reset(self.alarms.due().into());
                }
                _ = sweep.tick() => self.sweep(),
            }
        }
    }

    /// Fires what is due. The waits move with every frame; the alarm only looks.
    fn look(&mut self) {
        let look = self.alarms.look(Instant::now());
        if let Some(late) = look.forgiven {
            let worker = self.worker.name();
            tracing::info!(%worker, ?late, "this router stood still: its worker gets the time");
        }
        for timer in look.fired {
            self.feed(Event::Fired(timer));
        }
    }

    /// Lets go of what has ended.
    fn sweep(&mut self) {
        let mut probe_is_over = None;
        self.open.retain(|_, held| {
            let over = held.open.is_over();
            if over && self.link.is_probe(held.command) {
                probe_is_over = Some(held.command);
            }
            !over
        });
        if let Some(number) = probe_is_over {
            self.feed(Event::Undecided(number));
        }
        // A request that was chosen as the probe and did not leave: the next one may.
        if *self.link.state() == (State::HalfOpen { probe: None }) {
            self.publish();
        }
    }

    fn command(&mut self, number: u64, outgoing: Outgoing) -> v1::RouterFrame {
        let Outgoing { command, open } = outgoing;
        let counted = self.link.number();
        debug_assert_eq!(counted, number, "one queue, one count");
        match (&command, open) {
            (
                Command::Place {
                    generation, fence, ..
                },
                Some(open),
            ) => {
                let held = Held {
                    fence: *fence,
                    command: number,
                    open,
                };
                self.open.insert(*generation, held);
                self.feed(Event::Placed(number));
            }
            // Nothing more need come of it.
            (Command::Cancel { generation, fence }, _) => {
                let held = self.open.get(generation);
                if let Some(held) = held.filter(|held| held.fence <= *fence) {
                    self.feed(Event::Undecided(held.command));
                }
            }
            _ => {}
        }
        command.into_frame(number)
    }

    fn perform(&mut self, actions: link::Actions) {
        for action in actions {
            match action {
                Action::Arm(timer @ (link::Timer::Suspect | link::Timer::Lost), after) => {
                    let after = Duration::from_millis(after);
                    self.alarms.arm(timer, Instant::now(), after);
                }
                Action::Arm(timer @ link::Timer::Probe, after) => {
                    let (name, after) = (self.worker.name(), Duration::from_millis(after));
                    tracing::warn!(worker = %name, ?after, "worker ejected: its answers fail");
                    self.core.counters.ejections.add(1);
                    self.alarms.arm(timer, Instant::now(), after);
                }
                Action::Arm(link::Timer::Reattach, after) => {
                    self.reattach_at = Some(Instant::now() + Duration::from_millis(after));
                }
                Action::Disarm(link::Timer::Reattach) => self.reattach_at = None,
                Action::Disarm(timer) => self.alarms.disarm(timer),
                Action::ArmRedial(tries) => {
                    self.redial = redial_after(tries);
                }
                Action::Lose(loss) => self.lose(loss),
                Action::ForgetCache => self.core.forget_cache(&self.worker),
                Action::IndexOff(why) => self.worker.index_off(why),
                Action::StateChanged => self.publish(),
                // What the hello brought is taken once there is a handle.
                Action::Reattach => {}
                // Dialling, greeting and closing are the steps of `run`.
                Action::Dial | Action::SendHello { .. } | Action::Close | Action::Arm(..) => {}
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
            lost(&held.open, worker, loss);
        }
    }

    fn publish(&self) {
        let state = self.link.state().clone();
        if self.worker.set_state(state.clone()) {
            log_state(&self.worker.name(), &state);
        }
        let standing = match self.link.state() {
            State::HalfOpen { probe: None } => Standing::Probation,
            _ if self.link.placeable() => Standing::Ready,
            State::Suspect(_) | State::Ejected | State::HalfOpen { .. } => Standing::Suspect,
            _ => Standing::Absent,
        };
        self.core.worker_state(&self.worker, standing);
    }
}

/// A worker's changes that cost it placements or streams are for the log; ends of
/// sessions and ejections have lines of their own.
fn log_state(worker: &str, state: &State) {
    match state {
        State::Suspect(why) => tracing::warn!(event = "worker_suspect", worker, ?why),
        State::Lost(why) => tracing::warn!(event = "worker_lost", worker, ?why),
        State::HalfOpen { probe: None } => tracing::info!(event = "worker_half_open", worker),
        State::Live => tracing::info!(event = "worker_live", worker),
        _ => {}
    }
}

/// Milliseconds since an instant, for figures.
pub(super) fn ms_since(at: Instant) -> f64 {
    ms(at.elapsed())
}

/// The next command, with room for its frame: a burst waits here, where the
/// worker reads no faster. `None` where either side is closed.
async fn next_command<'a>(
    outbound: &'a mpsc::Sender<v1::RouterFrame>,
    commands: &mut mpsc::Receiver<(u64, Outgoing)>,
) -> Option<(mpsc::Permit<'a, v1::RouterFrame>, u64, Outgoing)> {
    let room = outbound.reserve().await.ok()?;
    let (number, outgoing) = commands.recv().await?;
    Some((room, number, outgoing))
}
