//! A worker without an engine: it speaks the whole protocol of
//! `kvmesh.v1.Worker`, its tokens are a pure function of prompt and position,
//! and it can be told to misbehave.
//!
//! It runs on a thread and runtime of its own, so that it can be frozen and
//! killed as a process would be, and so that it is usable from any test.

mod config;
mod direct;
mod faults;
mod hand_off;
mod http;
mod request;
mod service;
mod session;
mod state;

use std::{
    future::Future,
    io,
    net::{SocketAddr, TcpListener as StdListener},
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::Duration,
};

pub use config::MockConfig;
pub use faults::{FaultPlan, Faults};
use kvmesh_rpc::v1::{inference_server::InferenceServer, worker_server::WorkerServer};
use kvmesh_wire::v1::{CacheEvents, Place, Role, WorkerRecord};
pub use state::MockCounters;
use state::State;
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet};
use tonic::transport::{Server, server::TcpIncoming};

use crate::tokens::TokenFunction;

/// Longest Place taken.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// A mock worker that serves. Dropping it ends it at once.
#[derive(Debug)]
pub struct MockWorker {
    addr: SocketAddr,
    http_addr: Option<SocketAddr>,
    state: Arc<State>,
    freeze: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl MockWorker {
    /// Binds and serves.
    ///
    /// # Errors
    /// Where an address cannot be bound or a thread not be started.
    pub fn start(config: MockConfig) -> io::Result<Self> {
        let listener = StdListener::bind(config.listen)?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let transfers = StdListener::bind(SocketAddr::new(addr.ip(), 0))?;
        transfers.set_nonblocking(true)?;
        let transfer_addr = transfers.local_addr()?.to_string();
        let http = match config.http {
            false => None,
            true => Some(StdListener::bind(SocketAddr::new(addr.ip(), 0))?),
        };
        let http_addr = http.as_ref().map(StdListener::local_addr).transpose()?;
        let state = Arc::new(State::new(config, addr.to_string(), transfer_addr));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (freeze, freezes) = mpsc::channel(1);
        let serving = serve(Arc::clone(&state), (listener, transfers, http), freezes);
        let thread = std::thread::Builder::new()
            .name("mock-worker".to_owned())
            .spawn(move || {
                if let Err(error) = runtime.block_on(serving) {
                    tracing::error!(%error, "mock worker ended");
                }
                // Dropping the runtime drops its tasks and closes their
                // sockets, as the end of a process would.
            })?;
        Ok(Self {
            addr,
            http_addr,
            state,
            freeze,
            thread: Some(thread),
        })
    }

    /// Where gRPC is served.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where the direct case is served over HTTP/1.1, if it is.
    #[must_use]
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http_addr
    }

    /// What the worker says of itself in hello and etcd.
    #[must_use]
    pub fn record(&self) -> &WorkerRecord {
        &self.state.record
    }

    /// Its worker id.
    #[must_use]
    pub fn worker_id(&self) -> &str {
        &self.state.record.worker_id
    }

    /// The function that its tokens come from.
    #[must_use]
    pub fn tokens(&self) -> &TokenFunction {
        &self.state.tokens
    }

    /// What it does wrong; may be changed at any time.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        &self.state.faults
    }

    /// What it has done and holds.
    #[must_use]
    pub fn counters(&self) -> MockCounters {
        MockCounters::read(&self.state)
    }

    /// The last placement that it was asked for: its stage, its names, its
    /// tenant, the context that came with it, whether spans are wanted, what another
    /// router needs of it and how urgent it is, nothing else.
    #[must_use]
    pub fn last_place(&self) -> Option<Place> {
        self.state.last_place()
    }

    /// Routers with an open session, sorted.
    #[must_use]
    pub fn routers(&self) -> Vec<String> {
        self.state.routers()
    }

    /// Changes the role told in Load.
    pub fn set_role(&self, role: Role) {
        self.state.set_role(role);
    }

    /// What placements from now on put out, up to an end-of-text token; `None`: what the
    /// function of its tokens names.
    ///
    /// # Panics
    /// Where the vocabulary is not one that this crate makes.
    pub fn say(&self, text: Option<&str>) {
        let vocabulary = self.state.tokens.vocabulary();
        self.state.say(text.map(|text| vocabulary.spell(text)));
    }

    /// Takes no new work, or takes it again.
    pub fn set_draining(&self, draining: bool) {
        self.state.set_draining(draining);
    }

    /// Sends a frame of the cache lane to every router with an open session.
    pub fn send_cache(&self, events: CacheEvents) {
        // No session: nobody to tell.
        let _ = self.state.cache.send(events);
    }

    /// Stops the worker's thread where it is: connections stay open and
    /// nothing moves on them, as under SIGSTOP. Undone by [`Self::thaw`].
    pub fn freeze(&self) {
        self.state.faults.set_frozen(true);
        // A full channel means that a freeze is on its way already.
        let _ = self.freeze.try_send(());
    }

    /// Lets a frozen worker go on.
    pub fn thaw(&self) {
        self.state.faults.set_frozen(false);
    }

    /// Ends all sessions with UNAVAILABLE; the worker goes on serving.
    pub fn break_sessions(&self) {
        self.state.break_sessions();
    }

    /// Closes all sockets at once, as kill -9 would. Waits until that is done.
    pub fn kill(&mut self) {
        self.thaw();
        self.state.die();
        self.join();
    }

    /// Whether the worker has died, by [`Self::kill`] or by a fault.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.state.died.load(Ordering::Relaxed)
    }

    /// Waits until the worker has ended.
    pub fn ended(&self) -> impl Future<Output = ()> + use<> {
        self.state.stop.clone().cancelled_owned()
    }

    /// Waits until `reached` holds of the counters, at most `limit`. Gives the
    /// last counters read: the caller asserts on them.
    pub async fn wait_for(
        &self,
        limit: Duration,
        reached: impl Fn(&MockCounters) -> bool,
    ) -> MockCounters {
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let counters = self.counters();
            if reached(&counters) || tokio::time::Instant::now() >= deadline {
                return counters;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic of the worker's thread was already printed.
            let _ = thread.join();
        }
    }
}

impl Drop for MockWorker {
    fn drop(&mut self) {
        self.thaw();
        self.state.stop.cancel();
        self.join();
    }
}

async fn serve(
    state: Arc<State>,
    (listener, transfers, http): (StdListener, StdListener, Option<StdListener>),
    mut freezes: mpsc::Receiver<()>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let listener = TcpListener::from_std(listener)?;
    let transfers = TcpListener::from_std(transfers)?;
    let mut tasks = JoinSet::new();
    tasks.spawn(hand_off::serve(transfers, Arc::clone(&state)));
    if let Some(http) = http {
        http.set_nonblocking(true)?;
        tasks.spawn(http::serve(
            TcpListener::from_std(http)?,
            Arc::clone(&state),
        ));
    }
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let worker = WorkerServer::new(service::WorkerService(Arc::clone(&state)))
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let direct = InferenceServer::new(direct::DirectService(Arc::clone(&state)))
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let server = Server::builder()
        .initial_stream_window_size(Some(4 << 20))
        .initial_connection_window_size(Some(16 << 20))
        .add_service(worker)
        .add_service(direct)
        .serve_with_incoming(incoming);
    tokio::pin!(server);
    loop {
        tokio::select! {
            () = state.stop.cancelled() => return Ok(()),
            served = &mut server => return Ok(served?),
            Some(()) = freezes.recv() => {
                // Blocks this thread on purpose, and with it every task.
                state.faults.block_while_frozen();
            }
        }
    }
}
