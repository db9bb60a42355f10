//! From a request for a plan to a booked plan, or to the queue (`queue`).

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use kvmesh_kv_index::{
    CacheChange, IndexSettings, KvIndex, Matches, WorkerSlot, chain_values, namespace_root,
};
use kvmesh_scheduler::{
    Booking as Load, Class, Considered, Needs, NoPlan, OutputLengths, RequestView,
};
use kvmesh_session::{
    TransferId, WorkerIndex,
    generation::{Cause, Event, Plan, PlanRequest},
    parse::{Hello, LoadReport, Refusal},
};
use kvmesh_wire::v1;
use smallvec::SmallVec;

use super::{
    Core,
    figures::ms,
    models::{self, ServedModel},
    open::{Chosen, Open, Party},
    placer::{Placed, Placer, Standing, Wanted, apply_cache},
    queue::{Sent, Waits},
    table::WorkerEntry,
};
use crate::request::AdmittedRequest;

/// The placer, the index it asks, and the requests that wait.
pub(super) struct Dispatcher {
    pub(super) index: Arc<KvIndex>,
    placer: Mutex<Placer>,
    pub(super) waits: Waits,
    lengths: Mutex<OutputLengths>,
}

/// What came of trying to place a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tried {
    /// It has its plan, or its end.
    Done,
    /// No worker has room, or is ready, at the moment.
    NoRoom,
    /// Its worker would not start it soon.
    NotYet,
}

/// Load that was booked at the moment of choice. Dropping it releases it, so
/// that every way out does.
pub(super) struct Booking {
    loads: Vec<(WorkerIndex, Load)>,
    /// Until the first token.
    sent: Option<Sent>,
}

impl Booking {
    /// Notes the command by which it went to a worker: from the load frame
    /// that echoes it on, the worker's own report counts.
    pub(super) fn placed(&self, worker: WorkerIndex, command: u64) {
        for (on, booked) in &self.loads {
            if *on == worker {
                booked.sent(command);
            }
        }
    }

    /// Its first token came.
    pub(super) fn started(&mut self) {
        self.sent = None;
    }
}

impl Dispatcher {
    /// An empty one; `router_id` sets how ties are broken.
    pub(super) fn new(router_id: &str) -> Self {
        let index = Arc::new(KvIndex::new(IndexSettings::default()));
        let router = xxhash_rust::xxh3::xxh3_64(router_id.as_bytes());
        Self {
            placer: Mutex::new(Placer::new(Arc::clone(&index), router)),
            index,
            waits: Waits::new(),
            lengths: Mutex::new(OutputLengths::new(EXPECTED_OUTPUT)),
        }
    }

    // No map of it is left half changed by an operation on it.
    pub(super) fn placer(&self) -> MutexGuard<'_, Placer> {
        self.placer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lengths(&self) -> MutexGuard<'_, OutputLengths> {
        self.lengths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Expected length of a request's output that has `made` tokens: what its
    /// client said, or what is learnt.
    pub(super) fn expected_output(&self, request: &AdmittedRequest, made: u32) -> u32 {
        let most = request.max_tokens;
        match request.expected_output_tokens {
            0 => {
                let class = class_of(request.class);
                self.lengths().expected(&request.model, class, made, most)
            }
            told => told.min(most),
        }
    }

    /// An output is complete.
    pub(super) fn learn_output(&self, request: &AdmittedRequest, tokens: u32) {
        let class = class_of(request.class);
        self.lengths().observe(&request.model, class, tokens);
    }

    /// Requests that wait.
    pub(super) fn queued(&self) -> usize {
        self.waits.len()
    }

    /// Bookings that stand.
    pub(super) fn booked(&self) -> usize {
        self.placer().booked()
    }
}

impl Core {
    /// Finds a plan for a generation, or lets it wait for room.
    pub(super) fn plan(self: &Arc<Self>, open: &Arc<Open>, request: &PlanRequest) {
        // New work does not pass what goes before it.
        let behind = request.cause == Cause::Start && self.dispatcher.waits.behind(open);
        if !request.wait_for_room && !behind && self.try_plan(open, request) == Tried::Done {
            return;
        }
        // Whoever refused may have room when the next load comes; what an
        // engine cannot do it cannot do then either.
        let mut request = request.clone();
        request.wait_for_room = false;
        request
            .excluded
            .retain(|(_, why)| *why == Refusal::Unsupported);
        self.dispatcher.waits.push(open, request);
    }

    /// Chooses and places, if a worker would start the request soon.
    pub(super) fn try_plan(self: &Arc<Self>, open: &Arc<Open>, request: &PlanRequest) -> Tried {
        let began = Instant::now();
        let mut cached = Matches::default();
        self.dispatcher.index.lookup_into(open.chain(), &mut cached);
        let id = u128::from_le_bytes(open.id.0);
        let border = open.next_index();
        let expected = self.dispatcher.expected_output(&open.request, border);
        let chosen = {
            let mut placer = self.dispatcher.placer();
            let excluded: SmallVec<[WorkerSlot; 4]> = request
                .excluded
                .iter()
                .filter_map(|(worker, _)| placer.slot(*worker))
                .collect();
            let view = request_view(&open.request, id, border, expected, &cached, &excluded);
            let explain = self.settings.decisions_kept > 0;
            placer.choose(&Wanted {
                request: view,
                explain,
            })
        };
        let placed = match chosen {
            Ok(placed) => placed,
            Err(
                NoPlan::NoRoom { .. }
                | NoPlan::NotReady {
                    draining: false, ..
                },
            ) => return Tried::NoRoom,
            // Those who refused for now may be all that there are.
            Err(_)
                if request
                    .excluded
                    .iter()
                    .any(|(_, why)| *why != Refusal::Unsupported) =>
            {
                return Tried::NoRoom;
            }
            Err(why) => {
                tracing::info!(generation = %open.id, %why, "no plan");
                open.apply(Event::NoPlan);
                return Tried::Done;
            }
        };
        let Some(parties) = self.parties(&placed) else {
            return Tried::NoRoom;
        };
        // What is dropped here releases its booking.
        let ahead = ms(self.settings.dispatch_ahead).max(placed.step_ms);
        let waits = &self.dispatcher.waits;
        if placed.start_ms > ahead && !waits.preempts(placed.prefill, open) {
            return Tried::NotYet;
        }
        let sent = Some(waits.sent(placed.prefill, open));
        self.note_sent(open, &placed);
        self.decisions
            .decided(open.id, self.decision(open, &placed));
        let prefix_from = placed.source.and_then(|source| {
            let (worker, incarnation, address) = self.table.sender(source);
            let tokens = placed.chosen.pulled_tokens;
            let there = tokens > 0 && !address.is_empty();
            there.then_some(v1::PrefixSource {
                worker,
                incarnation,
                address,
                tokens,
            })
        });
        open.planned(Chosen {
            plan: plan_of(&placed, open.request.max_tokens.saturating_sub(border)),
            parties,
            cached_tokens: placed.chosen.cached_tokens,
            pulled_tokens: placed.chosen.pulled_tokens,
            prefix_from,
            predicted_start_ms: placed.start_ms,
            booking: Booking {
                loads: placed.bookings,
                sent,
            },
            decide: began.elapsed(),
        });
        Tried::Done
    }

    /// Workers without cache events: what is sent there counts as cached.
    fn note_sent(&self, open: &Open, placed: &Placed) {
        let now_ms = self.dispatcher.waits.now_ms() as u64;
        let (prefill, decode) = (placed.plan.prefill(), placed.plan.decode());
        let two = (decode != prefill).then_some(decode);
        for slot in [prefill].into_iter().chain(two) {
            // A worker that left meanwhile holds nothing any more.
            let index = &self.dispatcher.index;
            let _ = index.record_sent(slot, open.chain(), now_ms);
        }
    }

    fn parties(&self, placed: &Placed) -> Option<SmallVec<[Party; 2]>> {
        let mut workers: SmallVec<[WorkerIndex; 2]> =
            SmallVec::from_slice(&[placed.prefill, placed.decode]);
        workers.dedup();
        let party = |worker| {
            let session = self.table.get(worker)?.session()?;
            Some(Party { worker, session })
        };
        workers.into_iter().map(party).collect()
    }

    fn decision(&self, open: &Open, placed: &Placed) -> v1::Decision {
        let (policy, names) = {
            let placer = self.dispatcher.placer();
            let name = |slot| placer.worker_at(slot).map(|worker| self.table.name(worker));
            let names = |plan: &kvmesh_scheduler::Plan| {
                let decode = name(plan.decode()).unwrap_or_default();
                let prefill = match plan {
                    kvmesh_scheduler::Plan::Whole { .. } => String::new(),
                    split => name(split.prefill()).unwrap_or_default(),
                };
                (
                    prefill,
                    decode,
                    plan.source().and_then(name).unwrap_or_default(),
                )
            };
            let named: Vec<_> = placed
                .considered
                .iter()
                .take(PLANS_KEPT)
                .map(|c| names(&c.plan))
                .collect();
            (placer.policy(), named)
        };
        let plans = placed
            .considered
            .iter()
            .zip(names)
            .map(|(considered, names)| {
                let (prefill_worker, decode_worker, prefix_worker) = names;
                v1::PlanCost {
                    prefill_worker,
                    decode_worker,
                    prefix_worker,
                    total_ms: considered.terms.total_ms(),
                    terms: cost_terms(considered),
                }
            });
        let chosen = placed.considered.iter().position(|c| c.plan == placed.plan);
        v1::Decision {
            attempt: open.attempt() + 1,
            at_ms: ms(open.request.arrived.elapsed()),
            policy: policy.to_owned(),
            plans: plans.collect(),
            chosen: chosen.and_then(|at| u32::try_from(at).ok()).unwrap_or(0),
            predicted_ttft_ms: placed.chosen.terms.ttft_ms(),
            actual_ttft_ms: 0.0,
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
        let mut placer = self.dispatcher.placer();
        placer.greeted(worker.index, record, hello.step_model, told.is_some());
        drop(placer);
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
        self.dispatcher.placer().loaded(worker.index, report);
        self.serve_queue();
    }

    /// Whether a worker can be placed on has changed.
    pub(super) fn worker_state(&self, worker: &WorkerEntry, standing: Standing) {
        self.dispatcher.placer().stands(worker.index, standing);
    }

    /// A worker is off the table.
    pub(super) fn worker_gone(&self, worker: &Arc<WorkerEntry>) {
        self.dispatcher.placer().remove(worker.index);
    }

    /// A step's service time came.
    pub(super) fn step_sample(&self, worker: &WorkerEntry, sample: &v1::StepSample) {
        self.dispatcher.placer().stepped(worker.index, sample);
    }

    /// Cache events came; gives the number of the last one that is applied.
    pub(super) fn cache_events(
        &self,
        worker: &WorkerEntry,
        events: &v1::CacheEvents,
    ) -> Option<u64> {
        let slot = self.dispatcher.placer().slot(worker.index)?;
        let fed = apply_cache(&self.dispatcher.index, slot, events);
        if fed.dropped > 0 {
            self.counters.cache_events_dropped.add(fed.dropped);
        }
        fed.last
    }

    /// What is known of a worker's cache is void.
    pub(super) fn forget_cache(&self, worker: &WorkerEntry) {
        if let Some(slot) = self.dispatcher.placer().slot(worker.index) {
            // The slot was just read: it is there.
            let _ = self.dispatcher.index.apply(slot, &[CacheChange::Cleared]);
        }
    }

    /// The row of a worker.
    pub(super) fn status(&self, worker: &WorkerEntry) -> v1::WorkerStatus {
        let (step_model, slot) = {
            let placer = self.dispatcher.placer();
            (placer.step_model(worker.index), placer.slot(worker.index))
        };
        let status = worker.status();
        v1::WorkerStatus {
            step_model: step_model.or(status.step_model),
            indexed_blocks: slot.map_or(0, |slot| self.dispatcher.index.held(slot)),
            ..status
        }
    }

    /// A model as clients see it.
    pub(super) fn describe(&self, model: &ServedModel) -> v1::Model {
        let record = &model.record;
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
            ready: self.dispatcher.placer().ready(&record.name),
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

/// Plans kept for `explain`.
const PLANS_KEPT: usize = 8;

/// A prior for the length of an output, in tokens, where nothing is known.
const EXPECTED_OUTPUT: u32 = 256;

fn cost_terms(considered: &Considered) -> Vec<v1::CostTerm> {
    let terms = &considered.terms;
    [
        ("wait", terms.wait_ms),
        ("pull", terms.pull_ms),
        ("prefill", terms.prefill_ms),
        ("transfer", terms.transfer_ms),
        ("decode_wait", terms.decode_wait_ms),
        ("own_stretch", terms.own_stretch_ms),
        ("others_stretch", terms.others_stretch_ms),
    ]
    .into_iter()
    .map(|(name, ms)| v1::CostTerm {
        name: name.to_owned(),
        ms,
    })
    .collect()
}

/// A class in the scheduler's terms.
pub(super) fn class_of(class: v1::RequestClass) -> Class {
    match class {
        v1::RequestClass::Interactive => Class::Interactive,
        v1::RequestClass::Batch => Class::Batch,
        v1::RequestClass::Standard | v1::RequestClass::Unspecified => Class::Standard,
    }
}

/// A request as the scheduler sees it.
pub(super) fn request_view<'a>(
    request: &'a AdmittedRequest,
    id: u128,
    output_tokens: u32,
    expected_output: u32,
    cached: &'a Matches,
    excluded: &'a [WorkerSlot],
) -> RequestView<'a> {
    let sampling = &request.sampling;
    let neutral = (sampling.repetition_penalty == 1.0 || sampling.repetition_penalty == 0.0)
        && sampling.frequency_penalty == 0.0
        && sampling.presence_penalty == 0.0;
    let grammar = request.grammar.as_ref();
    RequestView {
        id,
        model: &request.model,
        digest: "",
        adapter: &request.adapter,
        prompt_tokens: u32::try_from(request.prompt_ids.len()).unwrap_or(u32::MAX),
        output_tokens,
        max_tokens: request.max_tokens,
        expected_output,
        class: class_of(request.class),
        virtual_deadline_ms: f64::INFINITY,
        affinity: 0,
        needs: Needs {
            grammar: grammar.is_some(),
            grammar_continuation: grammar.is_some_and(|grammar| grammar.require_continuation),
            penalties: !neutral,
            logprobs: request.logprobs,
        },
        cached,
        excluded,
    }
}

/// Chain values of a request's prompt.
pub(super) fn chain_of(request: &AdmittedRequest, model: &v1::ModelRecord) -> Vec<u64> {
    let adapter = model
        .adapters
        .get(&request.adapter)
        .map_or("", String::as_str);
    let root = namespace_root(&model.digest, adapter, &request.cache_salt);
    chain_values(root, &request.prompt_ids)
}

/// `left` is the number of tokens still to be made.
fn plan_of(placed: &Placed, left: u32) -> Plan {
    let Placed {
        prefill, decode, ..
    } = *placed;
    match placed.engine {
        _ if prefill == decode => Plan::Whole { on: decode },
        // One token comes with the prompt: there is nothing to hand on.
        _ if left <= 1 => Plan::Whole { on: prefill },
        Some(prefill_emits) => Plan::Engine {
            prefill,
            decode,
            prefill_emits,
        },
        None => Plan::Mesh {
            prefill,
            decode,
            transfer: TransferId(rand::random()),
        },
    }
}
