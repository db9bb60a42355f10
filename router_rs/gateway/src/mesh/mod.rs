//! The mesh as one router drives it: sessions with workers, the choice of
//! workers, open generations.
//!
//! ```text
//!  generate ─▶ core.plan ─▶ placer (choose, book) ─▶ open generation ─▶ session ─▶ worker
//!                 ▲  no room: queue                     │    ▲             │
//!                 └──── load frame ◀── session ◀────────┼────┼─────────────┘
//!                                                       ▼    │ rows, ends
//!                        client ◀── GenerationStream ◀──┘
//! ```
//!
//! Tasks: one a worker ([`session`]), one for timers, one that follows the
//! registry, one sweep a second, one a tokeniser download. All belong to a
//! tracker that [`Mesh::shutdown`] waits for.

mod admit;
mod asked;
mod backoff;
mod cancel;
mod continuation;
mod counters;
mod decisions;
mod dispatch;
mod figures;
mod given_up;
mod models;
mod open;
mod operate;
mod placer;
mod policy;
mod pools;
mod queue;
mod recover;
mod resume;
mod session;
mod settings;
mod stream;
mod supervise;
mod table;
mod timers;
mod tokenizer;
mod turned;
mod views;

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use kvmesh_kv_index::IndexStats;
use kvmesh_registry::{Changes, Registry, WorkerWatch};
use kvmesh_session::GenerationId;
use kvmesh_text::TextStream;
use kvmesh_wire::v1;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use counters::{AttemptCounts, Count, Counters, Gauge, Ratios, Seconds, SessionCounts};
pub(crate) use dispatch::class_of;
pub use given_up::GivenUp;
pub use models::ServedModel;
pub(crate) use open::Traced;
pub use operate::MeshError;
pub use policy::{COST, POLICIES, PolicySettings, SCORED};
pub(crate) use session::text_of;
pub use settings::{MeshSettings, StreamSettings};
pub use stream::GenerationStream;

use crate::{error::RequestError, request::AdmittedRequest, telemetry::Histogram};
use asked::Asked;
use decisions::Decisions;
use dispatch::Dispatcher;
use models::Models;
use open::Open;
use pools::PoolWatch;
use recover::{Quarantine, Retries};
pub(crate) use resume::ResumeAsked;
use resume::Resumes;
use session::{ById, Session};
use table::{Table, WorkerEntry};
use timers::Timers;

/// What all parts of the mesh share.
struct Core {
    settings: MeshSettings,
    table: Table,
    models: Models,
    dispatcher: Dispatcher,
    timers: Arc<Timers>,
    counters: Counters,
    decisions: Decisions,
    pools: PoolWatch,
    asked: Asked,
    /// Changes that other routers ask workers for, where there is a registry.
    changes: Option<Changes>,
    urgent_start: Histogram,
    retries: Retries,
    quarantine: Quarantine,
    resumes: Resumes,
    open: Mutex<ById<Arc<Open>>>,
    /// Told when the last open generation is gone.
    idle: Notify,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Core {
    fn register(&self, open: &Arc<Open>) {
        self.counters.open_streams.add(1);
        let mut all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(open.id, Arc::clone(open));
    }

    fn unregister(&self, id: GenerationId) {
        let mut all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if all.remove(&id).is_some() {
            self.counters.open_streams.sub(1);
            if all.is_empty() {
                self.idle.notify_waiters();
            }
        }
    }

    /// Waits until no generation is open.
    async fn all_closed(&self) {
        loop {
            // Listens before it looks: no end can pass between the two.
            let idle = self.idle.notified();
            let mut idle = pin!(idle);
            idle.as_mut().enable();
            if self.counters.open_streams.get() == 0 {
                return;
            }
            idle.await;
        }
    }

    fn opened(&self, id: GenerationId) -> Option<Arc<Open>> {
        let all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&id).cloned()
    }

    fn all_open(&self) -> Vec<Arc<Open>> {
        let all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        all.values().cloned().collect()
    }

    /// Starts a worker's session. It outlives its own panics.
    fn spawn_session(self: &Arc<Self>, worker: Arc<WorkerEntry>) {
        let stop = worker.stop.clone();
        let all = self.stop.clone();
        let session = Session::new(Arc::clone(self), worker);
        self.tasks.spawn(async move {
            tokio::select! {
                () = session.supervised(stop) => {}
                () = all.cancelled() => {}
            }
        });
    }

    /// Follows the registry's list of workers.
    async fn follow(self: Arc<Self>, watch: Arc<WorkerWatch>) {
        let mut changes = watch.changes();
        loop {
            let listed: Option<BTreeMap<String, String>> = {
                let table = changes.borrow_and_update();
                let address = |(id, worker): (&String, &kvmesh_registry::RegisteredWorker)| {
                    (id.clone(), worker.record.address.clone())
                };
                table
                    .is_listed()
                    .then(|| table.workers.iter().map(address).collect())
            };
            if let Some(listed) = listed {
                let difference = self.table.sync(&listed);
                for worker in difference.added {
                    self.spawn_session(worker);
                }
                let fewer = !difference.removed.is_empty();
                for worker in difference.removed {
                    worker.stop.cancel();
                    self.worker_gone(&worker);
                }
                if fewer {
                    self.forget_models();
                }
            }
            tokio::select! {
                () = self.stop.cancelled() => break,
                changed = changes.changed() => if changed.is_err() { break },
            }
        }
        watch.close().await;
    }

    /// Once a second: clients that do not read; ten times a second: requests that
    /// wait too long, since some may for no more than a second.
    async fn sweep(self: Arc<Self>) {
        let mut every = tokio::time::interval(Duration::from_secs(1));
        let mut queued = tokio::time::interval(Duration::from_millis(100));
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = queued.tick() => {
                    self.expire_queued();
                    continue;
                }
                _ = every.tick() => {}
            }
            let now = Instant::now();
            let bound = &self.settings;
            let full = self.counters.undelivered_ids.get() > bound.undelivered_ids;
            // Over the global bound the streams above their even share go.
            let open = self.all_open();
            let share = match full {
                true => bound.undelivered_ids as usize / open.len().max(1),
                false => usize::MAX,
            };
            let since = now.checked_sub(bound.slow_client_timeout);
            for open in open.iter().filter(|open| open.starved(since, share)) {
                open.give_up_on_client();
            }
            let left = now.checked_sub(bound.orphan_timeout);
            for open in &open {
                open.expire(left);
            }
            let now_ms = self.dispatcher.waits.now_ms() as u64;
            self.dispatcher.index.expire(now_ms);
        }
    }
}

/// The mesh, seen from the gateway.
pub struct Mesh {
    core: Arc<Core>,
}

impl Mesh {
    /// Starts sessions with the static workers of the settings and with those
    /// of the registry, if one is given. Must be called within a tokio runtime.
    #[must_use]
    pub fn start(settings: MeshSettings, registry: Option<&Registry>) -> Arc<Self> {
        let core = Arc::new(Core {
            table: Table::default(),
            models: Models::default(),
            dispatcher: Dispatcher::new(&settings),
            timers: Arc::default(),
            counters: Counters::default(),
            decisions: Decisions::new(settings.decisions_kept, settings.explain_traces),
            pools: PoolWatch::new(&settings.policy.cost.targets),
            asked: Asked::default(),
            changes: registry.map(Registry::changes),
            urgent_start: Histogram::default(),
            retries: Retries::default(),
            quarantine: Quarantine::default(),
            resumes: Resumes::default(),
            open: Mutex::default(),
            idle: Notify::new(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            settings,
        });
        core.spawn_kept("timers", |core| {
            Arc::clone(&core.timers).run(core.stop.clone())
        });
        core.spawn_kept("sweep", Core::sweep);
        core.spawn_kept("pools", Core::watch_pools);
        for address in &core.settings.workers {
            core.spawn_session(core.table.add_static(address));
        }
        if let Some(registry) = registry {
            core.table.expects_list();
            let watch = Arc::new(registry.watch_workers());
            core.spawn_kept("workers", move |core| core.follow(Arc::clone(&watch)));
        }
        Arc::new(Self { core })
    }

    /// Models that can be asked for, sorted by name.
    #[must_use]
    pub fn models(&self) -> Vec<v1::Model> {
        let models = self.core.models.all();
        models
            .iter()
            .map(|model| self.core.describe(model))
            .collect()
    }

    /// A model by name; empty where there is one only.
    ///
    /// # Errors
    /// [`RequestError::UnknownModel`], or [`RequestError::NoWorker`] while its
    /// tokeniser is on its way or workers are yet to be heard of.
    pub fn model(&self, name: &str) -> Result<Arc<ServedModel>, RequestError> {
        let models = self.core.models.all();
        if name.is_empty() && models.len() == 1 {
            return Ok(Arc::clone(&models[0]));
        }
        if let Some(model) = self.core.models.get(name) {
            return Ok(model);
        }
        let named = if name.is_empty() { "any model" } else { name };
        let unheard = self.core.table.all().iter().any(|worker| worker.unheard());
        if models.is_empty() || unheard {
            // Nobody can say yet that it is unknown: workers are to come.
            let why = format!("{named}: not every worker has answered yet");
            return Err(RequestError::NoWorker(why));
        }
        if self.core.models.told(name) {
            return Err(RequestError::NoWorker(format!(
                "{name}: its tokeniser is on its way"
            )));
        }
        let known = models
            .iter()
            .map(|model| model.record.name.clone())
            .collect();
        Err(RequestError::UnknownModel {
            name: name.to_owned(),
            known,
        })
    }

    /// Opens a generation. Its stream begins with `Accepted`; dropping it
    /// cancels the generation.
    ///
    /// # Errors
    /// Whatever keeps it from being run: no such model, no worker for a stage,
    /// a prompt that fits no pool, a full queue, a deadline that has passed.
    pub fn generate(&self, request: AdmittedRequest) -> Result<GenerationStream, RequestError> {
        let chain = self.chain(&request)?;
        self.generate_named(request, chain)
    }

    /// Chain values of a request's prompt: what [`Mesh::generate_named`] takes.
    /// Some 3 ms for a million tokens: long prompts belong off the serving
    /// threads.
    ///
    /// # Errors
    /// As [`Mesh::model`].
    pub fn chain(&self, request: &AdmittedRequest) -> Result<Vec<u64>, RequestError> {
        let model = self.model(&request.model)?;
        Ok(dispatch::chain_of(request, &model.record))
    }

    /// As [`Mesh::generate`], for a prompt whose chain values are known.
    ///
    /// # Errors
    /// As [`Mesh::generate`].
    pub fn generate_named(
        &self,
        request: AdmittedRequest,
        chain: Vec<u64>,
    ) -> Result<GenerationStream, RequestError> {
        let model = self.model(&request.model)?;
        let admitted = self.core.admit(&request, &chain)?;
        let text: Option<TextStream> = match &request.text {
            None => None,
            Some(settings) => {
                let stream = model.text.stream(settings);
                Some(stream.map_err(|error| {
                    let id = request.request_id.clone();
                    tracing::error!(event = "bug", request_id = id, %error, "text of a stream");
                    RequestError::Internal { id, next_index: 0 }
                })?)
            }
        };
        let id = GenerationId(rand::random());
        let open = Open::start(Arc::clone(&self.core), chain, request, admitted, id);
        Ok(GenerationStream::new(open, text))
    }

    /// The workers, sorted by id.
    #[must_use]
    pub fn workers(&self) -> Vec<v1::WorkerStatus> {
        let entries = self.core.table.all();
        let mut rows: Vec<_> = entries
            .iter()
            .map(|entry| self.core.status(entry))
            .collect();
        let id = |row: &v1::WorkerStatus| row.record.as_ref().map(|r| r.worker_id.clone());
        rows.sort_by_key(id);
        rows
    }

    /// What prompts that were the most urgent ones of their worker waited for
    /// their first layer.
    pub(crate) fn urgent_start(&self) -> &Histogram {
        &self.core.urgent_start
    }

    /// Why a generation went where it went, and how it waits where it waits;
    /// `None` for one that is not kept.
    #[must_use]
    pub fn explain(&self, id: &str) -> Option<v1::ExplainResponse> {
        let (core, id) = (&self.core, GenerationId::from_hex(id)?);
        let waits = core.dispatcher.waits.explain(id);
        let waits = waits.or_else(|| core.opened(id)?.put_off());
        let known = core.decisions.explain(id, |worker| core.table.name(worker));
        let Some((waiting, predicted_wait_ms)) = waits else {
            return known;
        };
        Some(v1::ExplainResponse {
            predicted_wait_ms,
            waiting: Some(waiting),
            ..known.unwrap_or_default()
        })
    }

    /// What a pool controller makes of the workers now; sorted by model.
    #[must_use]
    pub fn advise_pools(&self) -> Vec<v1::PoolAdvice> {
        self.core.advise_pools()
    }

    /// Counters, for `/metrics`.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.core.counters
    }

    /// Sessions by state.
    #[must_use]
    pub fn sessions(&self) -> SessionCounts {
        self.core.table.session_counts()
    }

    /// Attempts that run, and their transfers by state.
    #[must_use]
    pub fn attempts(&self) -> AttemptCounts {
        let mut counts = AttemptCounts::default();
        for open in self.core.all_open() {
            open.count(&mut counts);
        }
        counts
    }

    /// How full the prefix index is.
    #[must_use]
    pub fn index(&self) -> IndexStats {
        self.core.dispatcher.index()
    }

    /// Requests that wait for room.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.core.dispatcher.queued()
    }

    /// Generations of a model that are open, and those among them that wait here.
    #[must_use]
    pub fn open_of(&self, model: &str) -> (usize, usize) {
        let all = self.core.all_open();
        let of_model = all.iter().filter(|open| open.request.model == model);
        (of_model.count(), self.core.dispatcher.queued_of(model))
    }

    /// Bookings that stand.
    #[must_use]
    pub fn booked(&self) -> usize {
        self.core.dispatcher.booked()
    }

    /// Lets running generations end for up to `grace`, then ends the rest and
    /// every task.
    pub async fn shutdown(&self, grace: Duration) {
        // Over is over: what is still open is ended below.
        let _ = tokio::time::timeout(grace, self.core.all_closed()).await;
        for open in self.core.all_open() {
            open.shut_down();
        }
        self.core.stop.cancel();
        self.core.tasks.close();
        self.core.tasks.wait().await;
    }
}

#[cfg(test)]
mod tests;
