//! One task a worker: its connection, its session, its streams.
//!
//! The task reads Attach and never waits there for anything else: rows go
//! under the lock of their generation, loads to the scheduler, cache events to
//! the index. Commands come over one bounded queue; a queue that is full means
//! a transport that does not drain, and the session is closed.

mod frames;
mod handle;
mod transport;

use std::{
    collections::HashMap,
    sync::Arc,
    task::Waker,
    time::{Duration, Instant},
};

use kvmesh_session::{
    Command, Fence, Link,
    generation::{Event as GenerationEvent, Loss},
    link::{self, Action, Event, State},
};
use rand::RngExt as _;
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{Core, figures::ms, open::Open, placer::Standing, table::WorkerEntry};
pub(super) use handle::{ById, Outgoing, SessionHandle};
pub(super) use transport::connect;
use transport::{Ended, Transport, next_frame};

/// Commands that may wait for one worker's transport.
const COMMAND_QUEUE: usize = 4_096;
/// First wait before a worker is dialled again, and the longest.
const REDIAL: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// How often a session lets go of generations that have ended.
const SWEEP: Duration = Duration::from_secs(1);

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
            if self.core.table.drop_gone(&self.worker) {
                // Its key went before its session did.
                self.core.worker_gone(&self.worker);
                return;
            }
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
                Action::IndexOff(why) => self.worker.index_off(why),
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

/// Milliseconds since an instant, for figures.
pub(super) fn ms_since(at: Instant) -> f64 {
    ms(at.elapsed())
}
