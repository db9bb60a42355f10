//! From a request for a plan to a booked plan, or to the queue.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use kvmesh_session::{
    TransferId, WorkerIndex,
    generation::{Cause, Event, Plan, PlanRequest, Stop},
    parse::{Hello, LoadReport, Refusal},
};
use kvmesh_wire::v1;
use smallvec::SmallVec;

use super::{
    Core,
    figures::ms,
    models::{self, ServedModel},
    open::{Chosen, Open, Party},
    placer::{Choice, Cost, Placer, Shape, Wanted},
    table::WorkerEntry,
};
use crate::{error::RequestError, request::AdmittedRequest};

/// When a client that found the queue full may try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The placer and the requests that wait for room, in order of arrival.
#[derive(Default)]
pub(super) struct Dispatcher {
    placer: Mutex<Placer>,
    waiting: Mutex<BTreeMap<(Instant, u64), Waiting>>,
    length: AtomicUsize,
}

struct Waiting {
    open: Arc<Open>,
    request: PlanRequest,
    since: Instant,
}

/// Load that was booked at the moment of choice. Dropping it releases it, so
/// that every way out does.
pub(super) struct Booking {
    dispatcher: Arc<Dispatcher>,
    id: u64,
}

impl Booking {
    /// Notes the command by which it went to a worker: from the load frame
    /// that echoes it on, the worker's own report counts.
    pub(super) fn placed(&self, worker: WorkerIndex, command: u64) {
        self.dispatcher.placer().placed(self.id, worker, command);
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        self.dispatcher.placer().release(self.id);
    }
}

impl Dispatcher {
    // Neither map is left half changed by an operation on it.
    fn placer(&self) -> MutexGuard<'_, Placer> {
        self.placer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<(Instant, u64), Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that wait.
    pub(super) fn queued(&self) -> usize {
        self.length.load(Ordering::Relaxed)
    }

    /// Bookings that stand.
    pub(super) fn booked(&self) -> usize {
        self.placer().booked()
    }

    fn wait(&self, open: &Arc<Open>, request: PlanRequest) {
        let tie = u64::from_le_bytes(open.id.0[..8].try_into().unwrap_or_default());
        let entry = Waiting {
            open: Arc::clone(open),
            request,
            since: Instant::now(),
        };
        let mut waiting = self.waiting();
        // A returned request waits with its first arrival.
        waiting.insert((open.request.arrived, tie), entry);
        self.length.store(waiting.len(), Ordering::Relaxed);
    }

    fn take(&self, mut wanted: impl FnMut(&Waiting) -> bool) -> Vec<Waiting> {
        let mut waiting = self.waiting();
        let keys: Vec<_> = waiting
            .iter()
            .filter(|(_, entry)| wanted(entry))
            .map(|(key, _)| *key)
            .collect();
        let taken = keys.iter().filter_map(|key| waiting.remove(key)).collect();
        self.length.store(waiting.len(), Ordering::Relaxed);
        taken
    }
}

impl Core {
    /// What the mesh itself can refuse before a request is opened.
    pub(super) fn admit(&self, request: &AdmittedRequest) -> Result<(), RequestError> {
        if request
            .deadline
            .is_some_and(|deadline| deadline <= Instant::now())
        {
            return Err(RequestError::DeadlineExceeded { next_index: 0 });
        }
        let served = self.dispatcher.placer().served(&request.model);
        if !served.prefill || !served.decode {
            let stage = if served.decode { "prefill" } else { "decode" };
            return Err(RequestError::NoWorker(format!(
                "{stage} of {}",
                request.model
            )));
        }
        let tokens = request.prompt_ids.len() as u64;
        if tokens > served.largest_pool {
            return Err(RequestError::PromptTooLong {
                tokens,
                limit: served.largest_pool,
            });
        }
        if self.dispatcher.queued() >= self.settings.queue_length {
            let reason = "the queue is full";
            return Err(RequestError::Overloaded {
                reason,
                retry_after: RETRY_AFTER,
            });
        }
        Ok(())
    }

    /// Finds a plan for a generation, or lets it wait for room.
    pub(super) fn plan(self: &Arc<Self>, open: &Arc<Open>, request: &PlanRequest) {
        // New work does not pass what waits already.
        let behind = request.cause == Cause::Start && self.dispatcher.queued() > 0;
        if !request.wait_for_room && !behind && self.try_plan(open, request) {
            return;
        }
        // Whoever refused may have room when the next load comes; what an
        // engine cannot do it cannot do then either.
        let mut request = request.clone();
        request.wait_for_room = false;
        request
            .excluded
            .retain(|(_, why)| *why == Refusal::Unsupported);
        self.dispatcher.wait(open, request);
    }

    /// Whether the request has its plan, or its end.
    fn try_plan(self: &Arc<Self>, open: &Arc<Open>, request: &PlanRequest) -> bool {
        let began = Instant::now();
        let tie = u64::from_le_bytes(open.id.0[8..].try_into().unwrap_or_default());
        let admitted = &open.request;
        let cached = BTreeMap::new();
        let wanted = Wanted {
            model: &admitted.model,
            prompt_tokens: admitted.prompt_ids.len() as u64,
            output_tokens: u64::from(open.next_index()),
            max_tokens: u64::from(admitted.max_tokens),
            excluded: &request.excluded,
            cached: &cached,
            tie,
        };
        let choice = self.dispatcher.placer().choose(&wanted);
        let (shape, booking, cached_tokens, costs) = match choice {
            Choice::Plan {
                shape,
                booking,
                cached,
                costs,
            } => (shape, booking, cached, costs),
            Choice::Wait => return false,
            Choice::Never => {
                open.apply(Event::NoPlan);
                return true;
            }
        };
        let booking = Booking {
            dispatcher: Arc::clone(&self.dispatcher),
            id: booking,
        };
        let Some(parties) = self.parties(shape) else {
            return false;
        };
        let predicted_start_ms = costs.first().map_or(0.0, |cost| term(cost, "queue"));
        self.decisions.decided(open.id, self.decision(open, &costs));
        open.planned(Chosen {
            plan: plan_of(shape),
            parties,
            booking,
            cached_tokens,
            pulled_tokens: 0,
            prefix_from: None,
            predicted_start_ms,
            decide: began.elapsed(),
        });
        true
    }

    fn parties(&self, shape: Shape) -> Option<SmallVec<[Party; 2]>> {
        let workers: SmallVec<[WorkerIndex; 2]> = match shape {
            Shape::Whole(on) => SmallVec::from_slice(&[on]),
            Shape::Mesh { prefill, decode }
            | Shape::Engine {
                prefill, decode, ..
            } => SmallVec::from_slice(&[prefill, decode]),
        };
        let party = |worker| {
            let session = self.table.get(worker)?.session()?;
            Some(Party { worker, session })
        };
        workers.into_iter().map(party).collect()
    }

    fn decision(&self, open: &Open, costs: &[Cost]) -> v1::Decision {
        let plans = costs.iter().map(|cost| {
            let (prefill, decode) = match cost.shape {
                Shape::Whole(on) => (String::new(), self.table.name(on)),
                Shape::Mesh { prefill, decode }
                | Shape::Engine {
                    prefill, decode, ..
                } => (self.table.name(prefill), self.table.name(decode)),
            };
            let terms = cost.terms.iter();
            v1::PlanCost {
                prefill_worker: prefill,
                decode_worker: decode,
                prefix_worker: String::new(),
                total_ms: cost.terms.iter().map(|(_, ms)| ms).sum(),
                terms: terms
                    .map(|(name, ms)| v1::CostTerm {
                        name: (*name).to_owned(),
                        ms: *ms,
                    })
                    .collect(),
            }
        });
        v1::Decision {
            attempt: open.attempt() + 1,
            at_ms: ms(open.request.arrived.elapsed()),
            policy: "uncached tokens and queue".to_owned(),
            plans: plans.collect(),
            chosen: 0,
            predicted_ttft_ms: costs
                .first()
                .map_or(0.0, |cost| term(cost, "queue") + term(cost, "prefill")),
            actual_ttft_ms: 0.0,
        }
    }

    /// Room may be there: tries what waits, oldest first. A request that finds
    /// none keeps those of its model behind it waiting.
    fn serve_queue(self: &Arc<Self>) {
        if self.dispatcher.queued() == 0 {
            return;
        }
        let mut full: Vec<String> = Vec::new();
        for entry in self.dispatcher.take(|_| true) {
            let model = &entry.open.request.model;
            if entry.open.ended() {
                continue;
            }
            if full.contains(model) || !self.try_plan(&entry.open, &entry.request) {
                if !full.contains(model) {
                    full.push(model.clone());
                }
                self.dispatcher.wait_again(entry);
            }
        }
    }

    /// Ends what waited for too long, and forgets what ended while it waited.
    pub(super) fn expire_queued(&self, now: Instant) {
        let bound = self.settings.queue_timeout;
        let old = |entry: &Waiting| now.saturating_duration_since(entry.since) > bound;
        for entry in self
            .dispatcher
            .take(|entry| old(entry) || entry.open.ended())
        {
            entry.open.apply(Event::Stop(Stop::Overloaded));
        }
    }

    /// A worker said who it is.
    pub(super) fn worker_greeted(self: &Arc<Self>, worker: &Arc<WorkerEntry>, hello: &Hello) {
        let record = &hello.record;
        let (Some(model), Some(capabilities)) = (&record.model, &record.capabilities) else {
            return;
        };
        let others = self.table.all();
        let alone = !others
            .iter()
            .any(|other| other.index != worker.index && other.live());
        let told = self.models.tell(model, capabilities, alone);
        {
            let mut placer = self.dispatcher.placer();
            let view = placer.view(worker.index);
            view.model = told.map(|_| model.name.clone()).unwrap_or_default();
            view.digest.clone_from(&model.digest);
            view.role = v1::Role::try_from(record.role).unwrap_or_default();
            view.capabilities = capabilities.clone();
            view.transfer = !record.transfer_address.is_empty();
            view.load = None;
            view.serving = false;
        }
        match told {
            None => worker.set_mismatch(format!(
                "its digests of model {} are not those of the other workers",
                model.name
            )),
            Some(true) => self.fetch_tokenizer(worker, model.tokenizer_digest.clone()),
            Some(false) => {}
        }
    }

    fn fetch_tokenizer(self: &Arc<Self>, worker: &Arc<WorkerEntry>, digest: String) {
        let core = Arc::clone(self);
        let worker = Arc::clone(worker);
        self.counters.tokenizer_fetches.add(1);
        self.tasks.spawn(async move {
            let address = worker.address();
            let cache = core.settings.cache_dir.as_deref();
            let fetched = tokio::select! {
                () = core.stop.cancelled() => return,
                fetched = models::fetch(&address, &digest, cache) => fetched,
            };
            match fetched {
                Ok(text) => {
                    tracing::info!(worker = %worker.name(), %digest, "tokeniser ready");
                    core.models.fetched(&digest, Some(text));
                }
                Err(error) => {
                    tracing::warn!(worker = %worker.name(), %digest, %error, "no tokeniser");
                    worker.set_detail(format!("its tokeniser cannot be used: {error}"));
                    core.models.fetched(&digest, None);
                }
            }
        });
    }

    /// A worker's load came.
    pub(super) fn worker_loaded(self: &Arc<Self>, worker: &Arc<WorkerEntry>, report: &LoadReport) {
        {
            let mut placer = self.dispatcher.placer();
            let view = placer.view(worker.index);
            view.role = report.role;
            view.draining = report.load.draining || report.phase == v1::WorkerPhase::Stopping;
            view.serving = report.phase == v1::WorkerPhase::Serving;
            view.load = Some(report.load);
        }
        self.serve_queue();
    }

    /// Whether a worker can be placed on has changed.
    pub(super) fn worker_state(self: &Arc<Self>, worker: &Arc<WorkerEntry>, placeable: bool) {
        self.dispatcher.placer().view(worker.index).placeable = placeable;
    }

    /// A worker is off the table.
    pub(super) fn worker_gone(&self, worker: &Arc<WorkerEntry>) {
        self.dispatcher.placer().remove(worker.index);
    }

    /// A step's service time came.
    pub(super) fn step_sample(&self, _worker: &WorkerEntry, _sample: &v1::StepSample) {}

    /// Cache events came; gives the number of the last one that is applied.
    pub(super) fn cache_events(
        &self,
        _worker: &WorkerEntry,
        events: &v1::CacheEvents,
    ) -> Option<u64> {
        (!events.events.is_empty()).then(|| events.first_event + events.events.len() as u64 - 1)
    }

    /// What is known of a worker's cache is void.
    pub(super) fn forget_cache(&self, _worker: &WorkerEntry) {}

    /// The row of a worker.
    pub(super) fn status(&self, worker: &WorkerEntry) -> v1::WorkerStatus {
        worker.status()
    }

    /// A model as clients see it.
    pub(super) fn describe(&self, model: &ServedModel) -> v1::Model {
        let record = &model.record;
        let served = self.dispatcher.placer().served(&record.name);
        v1::Model {
            name: record.name.clone(),
            context_length: record.context_length,
            vocabulary_size: record.vocabulary_size,
            adapters: {
                let mut names: Vec<_> = record.adapters.keys().cloned().collect();
                names.sort();
                names
            },
            reproducible: model.capabilities.reproducible,
            chat: model.text.has_chat_template(),
            digest: record.digest.clone(),
            ready: served.prefill && served.decode,
        }
    }

    /// Whether a role that is served now would not be, were this worker gone
    /// or of another role.
    pub(super) fn would_empty(&self, worker: &WorkerEntry, becomes: Option<v1::Role>) -> bool {
        let model = |entry: &WorkerEntry| entry.record().and_then(|r| r.model).map(|m| m.name);
        let own = model(worker);
        let (before, draining) = worker.role();
        if draining {
            return false;
        }
        let does = |role: v1::Role, stage: v1::Role| role == stage || role == v1::Role::Both;
        [v1::Role::Prefill, v1::Role::Decode]
            .into_iter()
            .any(|stage| {
                let loses = does(before, stage) && !becomes.is_some_and(|role| does(role, stage));
                let others = self.table.all();
                let mut rest = others.iter().filter(|entry| {
                    entry.index != worker.index && entry.live() && model(entry) == own
                });
                loses
                    && !rest.any(|entry| {
                        let (role, draining) = entry.role();
                        !draining && does(role, stage)
                    })
            })
    }
}

impl Dispatcher {
    fn wait_again(&self, entry: Waiting) {
        let tie = u64::from_le_bytes(entry.open.id.0[..8].try_into().unwrap_or_default());
        let mut waiting = self.waiting();
        waiting.insert((entry.open.request.arrived, tie), entry);
        self.length.store(waiting.len(), Ordering::Relaxed);
    }
}

fn term(cost: &Cost, name: &str) -> f64 {
    cost.terms
        .iter()
        .find(|(n, _)| *n == name)
        .map_or(0.0, |(_, ms)| *ms)
}

fn plan_of(shape: Shape) -> Plan {
    match shape {
        Shape::Whole(on) => Plan::Whole { on },
        Shape::Mesh { prefill, decode } => Plan::Mesh {
            prefill,
            decode,
            transfer: TransferId(rand::random()),
        },
        Shape::Engine {
            prefill,
            decode,
            prefill_emits,
        } => Plan::Engine {
            prefill,
            decode,
            prefill_emits,
        },
    }
}
