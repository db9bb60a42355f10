//! The port itself: its socket, its thread, and what its worker calls.

use std::{
    net::{SocketAddr, TcpListener, ToSocketAddrs},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvmesh_wire::v1::{Residue, WorkerPhase, WorkerRecord};
use tokio::sync::watch;
use tonic::Status;

use crate::{
    cache_log::Change,
    error::PortError,
    event::Event,
    health::WorkerHealth,
    report::Report,
    server::serve,
    settings::Settings,
    shared::Shared,
    state::{State, ended},
    tokenizer::TokenizerFiles,
};

/// A worker's gRPC port. Nothing here waits, except where it says so.
pub struct Port {
    shared: Arc<Shared>,
    address: SocketAddr,
    listener: Mutex<Option<TcpListener>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    stop: watch::Sender<bool>,
    serves: watch::Sender<bool>,
}

impl Port {
    /// Binds "host:port"; connections wait until [`Port::serve`].
    ///
    /// # Errors
    /// Where the address cannot be resolved or bound.
    pub fn bind(listen: &str, settings: Settings) -> Result<Self, PortError> {
        let os = |source| PortError::Os {
            what: format!("bind {listen}"),
            source,
        };
        let addresses: Vec<_> = listen.to_socket_addrs().map_err(os)?.collect();
        let listener = TcpListener::bind(&addresses[..]).map_err(os)?;
        listener.set_nonblocking(true).map_err(os)?;
        let address = listener.local_addr().map_err(os)?;
        Ok(Self {
            shared: Arc::new(Shared::new(settings)),
            address,
            listener: Mutex::new(Some(listener)),
            thread: Mutex::new(None),
            stop: watch::Sender::new(false),
            serves: watch::Sender::new(false),
        })
    }

    /// The bound address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Begins to answer, on a thread of its own, while the model is loaded:
    /// health says NOT_SERVING, `GetInfo` what is known by now, and a router
    /// that attaches is told to come back. Not needed before [`Port::serve`].
    ///
    /// # Errors
    /// Where it answers already, was closed, or no thread can be started.
    pub fn load(&self, record: WorkerRecord) -> Result<(), PortError> {
        self.enter(WorkerPhase::Loading, record, None)
    }

    /// The model is there, and its first steps are timed: routers may attach,
    /// and what they place waits. Not needed before [`Port::serve`].
    ///
    /// # Errors
    /// As [`Port::serve`].
    pub fn warm_up(
        &self,
        record: WorkerRecord,
        tokenizer: TokenizerFiles,
    ) -> Result<(), PortError> {
        self.enter(WorkerPhase::WarmingUp, record, Some(tokenizer))
    }

    /// Begins to serve. `record`: what routers are told.
    ///
    /// # Errors
    /// Where it serves already, was closed, or no thread can be started.
    pub fn serve(&self, record: WorkerRecord, tokenizer: TokenizerFiles) -> Result<(), PortError> {
        self.enter(WorkerPhase::Serving, record, Some(tokenizer))?;
        self.serves.send_replace(true);
        Ok(())
    }

    /// Phases only go on. The first one starts the thread.
    fn enter(
        &self,
        phase: WorkerPhase,
        mut record: WorkerRecord,
        tokenizer: Option<TokenizerFiles>,
    ) -> Result<(), PortError> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let started = thread.is_some();
        let settings = self.shared.with(|state| {
            if state.closed || (started && state.phase >= phase) {
                return Err(PortError::Serves);
            }
            if started {
                // SetRole may have come already.
                record.role = state.record.role;
            }
            // A hello said that nothing is known of its steps; now there is a fit.
            let fitted = state.record.step_model.is_none() && record.step_model.is_some();
            state.record = record;
            state.phase = phase;
            state.mark_all();
            if fitted {
                state.greet_anew();
            }
            Ok(state.settings.clone())
        })?;
        if let Some(files) = tokenizer {
            self.shared.set_tokenizer(files);
        }
        if !started {
            *thread = Some(self.start_thread(settings)?);
        }
        Ok(())
    }

    fn start_thread(&self, settings: Settings) -> Result<JoinHandle<()>, PortError> {
        let os = |source| PortError::Os {
            what: "start the port's thread".to_owned(),
            source,
        };
        let listener = self
            .listener
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let listener = listener.ok_or(PortError::Serves)?;
        // One thread serves a worker: what it sends a step is one write.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(os)?;
        let serving = serve(
            Arc::clone(&self.shared),
            listener,
            WorkerHealth(self.serves.subscribe()),
            self.stop.subscribe(),
            settings,
        );
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new()
            .name("kvmesh-port".to_owned())
            .spawn(move || {
                runtime.block_on(serving);
                // Streams that are left go with their runtime.
                drop(runtime);
                shared.with(|state| state.closed = true);
                shared.changed.notify_all();
                shared.snapshots.notify_all();
            })
            .map_err(os)
    }

    // -- the engine's side -------------------------------------------------

    /// A step begins; predicted length in ms.
    pub fn begin_step(&self, predicted_ms: f64) {
        self.shared
            .lock()
            .engine
            .begin_step(predicted_ms, Instant::now());
    }

    /// Hands what the engine says to the sessions that it concerns.
    ///
    /// # Errors
    /// Where columns do not fit each other, or cache events leave a gap.
    pub fn step(&self, report: Report) -> Result<(), PortError> {
        let rows = report
            .parts
            .iter()
            .filter_map(|(_, part)| part.tokens.as_ref());
        for rows in rows {
            if let Some(problem) = rows.problem() {
                return Err(PortError::Columns(problem));
            }
        }
        let ends = report.parts.iter().any(|(_, part)| !part.ends.is_empty());
        self.shared
            .with(|state| state.report(report, Instant::now()))?;
        if ends {
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    /// The engine says nothing more.
    pub fn engine_ended(&self) {
        self.shared.with(|state| state.tell(Event::EngineEnded));
    }

    // -- snapshots ---------------------------------------------------------

    /// Begins a snapshot; the cache is to be read after this. False: nobody
    /// wants it any more.
    #[must_use]
    pub fn begin_snapshot(&self, session: &str) -> bool {
        self.shared.with(|state| {
            let as_of = state.log.last_event();
            let session = state.snapshots(session);
            session.is_some_and(|session| session.lanes.begin_snapshot(as_of))
        })
    }

    /// Adds a part; `None`: there are no more. Waits while the session has
    /// enough. False: the session is gone.
    #[must_use]
    pub fn add_snapshot(&self, session: &str, part: Option<Vec<Change>>) -> bool {
        let mut state = self.shared.lock();
        loop {
            if state.closed {
                return false;
            }
            let Some(open) = state.snapshots(session) else {
                return false;
            };
            let Some(snapshot) = open.lanes.snapshot() else {
                return false;
            };
            if snapshot.has_room() {
                match part {
                    Some(stores) => snapshot.add(stores),
                    None => snapshot.end(),
                }
                break;
            }
            state = self
                .shared
                .snapshots
                .wait_timeout(state, Duration::from_millis(100))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let waker = state.snapshots(session).and_then(|s| s.waker.take());
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// Ends a session because the cache cannot be read.
    pub fn fail_snapshot(&self, session: &str) {
        let status = Status::internal("the cache cannot be read");
        self.shared.with(|state| {
            if state.snapshots(session).is_some()
                && let Some((key, _)) = session.rsplit_once('#')
            {
                state.end(key, ended(status));
            }
        });
    }

    // -- the process's side ------------------------------------------------

    /// Waits for events, `timeout` at most. Empty: none came; `None`: closed.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<Vec<Event>> {
        let waiting = |state: &mut State| !state.has_events() && !state.closed;
        let (mut state, _) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), timeout, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        let events = state.take_events();
        let closed = state.closed;
        drop(state);
        if !events.is_empty() {
            self.shared.room.notify_waiters();
        }
        (!closed || !events.is_empty()).then_some(events)
    }

    /// Answers [`Event::InfoWanted`].
    pub fn answer_info(&self, call: u64, residue: Residue) {
        self.shared.answer(call, residue);
    }

    /// Attempts that have not ended.
    #[must_use]
    pub fn running(&self) -> usize {
        self.shared.lock().running()
    }

    /// The worker is about to stop: takes no new work, health says so.
    pub fn begin_stop(&self) {
        self.serves.send_replace(false);
        self.shared.with(|state| {
            state.phase = WorkerPhase::Stopping;
            state.drain();
        });
    }

    /// Waits until nothing runs. False: it still does.
    #[must_use]
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        let busy = |state: &mut State| state.running() > 0 && !state.closed;
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), timeout, busy)
            .unwrap_or_else(PoisonError::into_inner);
        state.running() == 0
    }

    /// Gives what still runs back to its routers: the grace has ended.
    pub fn give_back(&self, grace: Duration) {
        self.shared
            .with(|state| state.give_back(grace, Instant::now()));
    }

    /// Ends the sessions once their step output has gone, within `linger`, and
    /// the thread. Waits for that; again is allowed and does nothing.
    pub fn close(&self, linger: Duration) {
        self.serves.send_replace(false);
        self.listener
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        self.shared.with(State::end_all);
        self.shared.changed.notify_all();
        self.shared.snapshots.notify_all();
        if let Some(thread) = thread {
            let busy = |state: &mut State| state.streaming() > 0;
            drop(
                self.shared
                    .changed
                    .wait_timeout_while(self.shared.lock(), linger, busy),
            );
            self.stop.send_replace(true);
            // A panic of the thread was already printed.
            let _ = thread.join();
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}
