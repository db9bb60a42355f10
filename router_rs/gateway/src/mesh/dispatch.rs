//! From a request for a plan to a booked plan, or to the queue (`queue`).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use kvmesh_kv_index::{
    CacheChange, IndexStats, KvIndex, Matches, WorkerSlot, chain_values, namespace_root,
};
use kvmesh_scheduler::{
    Booking as Load, Class, Hold, Needs, OutputLengths, PerClass, RequestView, TransferRate,
};
use kvmesh_session::{
    TransferId, WorkerIndex,
    generation::{Event, Plan, PlanRequest, Stop},
    parse::{Hello, LoadReport, Refusal},
};
use kvmesh_wire::v1;
use smallvec::SmallVec;

use super::{
    Core,
    decisions::Decided,
    figures::ms,
    models::ServedModel,
    open::{Chosen, Open, Party},
    placer::{Lacks, Placed, Placer, Standing},
    queue::Waits,
    recover::Retry,
    settings::MeshSettings,
    table::WorkerEntry,
    views::apply_cache,
};
use crate::request::AdmittedRequest;

/// The placer, the index it asks, and the requests that wait.
pub(super) struct Dispatcher {
    /// Name of the policy.
    policy: &'static str,
    pub(super) index: Arc<KvIndex>,
    placer: Mutex<Placer>,
    pub(super) waits: Waits,
    lengths: Mutex<Lengths>,
}

/// What came of trying to place a request.
pub(super) enum Tried {
    /// It has its plan.
    Done,
    /// It has its end.
    Ended,
    /// No worker has room at the moment.
    NoRoom,
    /// Its worker would not start it soon, and it is listed there; or nobody is
    /// ready for it.
    NotYet(Option<Hold>),
}

/// Load that was booked at the moment of choice. Dropping it releases it, so
/// that every way out does.
pub(super) struct Booking {
    loads: Vec<(WorkerIndex, Load)>,
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

    /// Its first token came: its prompt holds nobody up any more.
    pub(super) fn started(&self) {
        for (_, booked) in &self.loads {
            booked.started();
        }
    }
}

/// Lengths of outputs, and what the views were told of them.
struct Lengths {
    learnt: OutputLengths,
    told: BTreeMap<String, PerClass<f64>>,
}

impl Dispatcher {
    /// An empty one; the router's id sets how ties are broken.
    pub(super) fn new(settings: &MeshSettings) -> Self {
        let policy = &settings.policy;
        let index = Arc::new(KvIndex::new(policy.index.clone()));
        let router = xxhash_rust::xxh3::xxh3_64(settings.router_id.as_bytes());
        let placer = Placer::new(Arc::clone(&index), router, policy);
        Self {
            policy: placer.policy(),
            placer: Mutex::new(placer),
            index,
            waits: Waits::new(settings.dispatch()),
            lengths: Mutex::new(Lengths {
                learnt: OutputLengths::new(policy.expected_output),
                told: BTreeMap::new(),
            }),
        }
    }

    /// How full the index is.
    pub(super) fn index(&self) -> IndexStats {
        self.index.stats()
    }

    // No map of it is left half changed by an operation on it.
    pub(super) fn placer(&self) -> MutexGuard<'_, Placer> {
        self.placer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lengths(&self) -> MutexGuard<'_, Lengths> {
        self.lengths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Expected length of a request's output that has `made` tokens: what its
    /// client said, or what is learnt.
    pub(super) fn expected_output(&self, request: &AdmittedRequest, made: u32) -> u32 {
        let most = request.max_tokens;
        match request.expected_output_tokens {
            0 => {
                let class = class_of(request.class);
                let lengths = self.lengths();
                lengths.learnt.expected(&request.model, class, made, most)
            }
            told => told.min(most),
        }
    }

    /// An output is complete. Every view has what streams have left; it is told
    /// anew where that changed by a tenth.
    pub(super) fn learn_output(&self, request: &AdmittedRequest, tokens: u32) {
        let model = &request.model;
        let mut lengths = self.lengths();
        let Lengths { learnt, told } = &mut *lengths;
        learnt.observe(model, class_of(request.class), tokens);
        let left = Class::ALL.map(|class| learnt.left_of_running(model, class, u32::MAX));
        let known = told.get(model);
        let same = |at: usize, known: &PerClass<f64>| (left[at] / known[at] - 1.0).abs() < 0.1;
        if known.is_some_and(|known| (0..left.len()).all(|at| same(at, known))) {
            return;
        }
        told.insert(model.clone(), left);
        drop(lengths);
        self.placer().left(model, left);
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
    /// Chooses and books, as one with this virtual deadline; places if a worker
    /// would start the request soon.
    pub(super) fn try_plan(
        self: &Arc<Self>,
        open: &Arc<Open>,
        request: &PlanRequest,
        key_ms: f64,
    ) -> Tried {
        let began = Instant::now();
        let border = open.next_index();
        // The first new attempt is always allowed.
        let retry = match request.failures {
            0 | 1 => None,
            _ => match self.retries.take(self.counters.open_streams.get()) {
                Some(retry) => Some(retry),
                None => return Tried::NotYet(None),
            },
        };
        let mut placed = match self.choose(open, request, border, key_ms) {
            Ok(placed) => placed,
            Err(Lacks::Room) => return Tried::NoRoom,
            Err(Lacks::Ready) => return Tried::NotYet(None),
            // A worker that is lost may be replaced; one that cannot run it is not
            // waited for.
            Err(Lacks::Worker(_)) if open.continues() && !unsupported(request) => {
                return Tried::NotYet(None);
            }
            Err(Lacks::Worker(why)) => {
                tracing::info!(generation = %open.id, %why, "no plan");
                open.apply(Event::NoPlan);
                return Tried::Ended;
            }
        };
        if !open.continues() && self.misses_deadline(open, &placed) {
            open.apply(Event::Stop(Stop::Overloaded));
            return Tried::Ended;
        }
        if let Some(hold) = placed.hold.take() {
            return Tried::NotYet(Some(hold));
        }
        let Some(parties) = self.parties(&placed) else {
            return Tried::NotYet(None);
        };
        self.go(open, placed, parties, (border, retry), began);
        Tried::Done
    }

    fn choose(
        &self,
        open: &Open,
        request: &PlanRequest,
        border: u32,
        virtual_deadline_ms: f64,
    ) -> Result<Placed, Lacks> {
        let mut cached = Matches::default();
        let whole = (border > 0).then(|| self.chain_so_far(open)).flatten();
        let chain = whole.as_deref().unwrap_or(open.chain());
        self.dispatcher.index.lookup_into(chain, &mut cached);
        let id = u128::from_le_bytes(open.id.0);
        let expected = self.dispatcher.expected_output(&open.request, border);
        let waits = &self.dispatcher.waits;
        let mut placer = self.dispatcher.placer();
        let slots = |all: bool| -> SmallVec<[WorkerSlot; 4]> {
            let of = request.excluded.iter();
            let of = of.filter(|(_, why)| all || *why == Refusal::Unsupported);
            of.filter_map(|(worker, _)| placer.slot(*worker)).collect()
        };
        let (excluded, lasting) = (slots(true), slots(false));
        let view = RequestView {
            virtual_deadline_ms,
            affinity: affinity(open.chain(), id),
            ..request_view(&open.request, id, border, expected, &cached, &excluded)
        };
        placer.choose(&view, &lasting, waits.now_ms(), &waits.rules)
    }

    /// Chain values of prompt and output: what a continuation finds in caches.
    fn chain_so_far(&self, open: &Open) -> Option<Vec<u64>> {
        let model = self.models.get(&open.request.model)?;
        let root = root_of(&open.request, &model.record);
        Some(chain_values(root, &open.sequence()))
    }

    /// Whether the first token is predicted for after the client's deadline.
    fn misses_deadline(&self, open: &Open, placed: &Placed) -> bool {
        let Some(deadline) = open.request.deadline else {
            return false;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        placed.chosen.terms.ttft_ms() > ms(left)
    }

    /// Places a request by its plan.
    fn go(
        self: &Arc<Self>,
        open: &Arc<Open>,
        placed: Placed,
        parties: SmallVec<[Party; 2]>,
        (border, retry): (u32, Option<Retry>),
        began: Instant,
    ) {
        self.note_sent(open, &placed);
        let terms = placed.chosen.terms;
        let predicted = v1::PhaseTimes {
            wait_ms: terms.wait_ms,
            prefill_ms: terms.pull_ms + terms.prefill_ms,
            transfer_ms: terms.transfer_ms,
            ttft_ms: terms.ttft_ms(),
        };
        self.decisions.decided(
            open.id,
            Decided {
                attempt: open.attempt() + 1,
                at_ms: ms(open.request.arrived.elapsed()),
                policy: self.dispatcher.policy,
                chosen: placed.plan,
                plans: placed.considered,
                weighed: placed.weighed,
                tied: placed.tied,
                predicted,
                actual: None,
            },
        );
        let prefix_from = placed.source.and_then(|source| {
            let (worker, incarnation, address) = self.table.sender(source);
            // What it holds from the prompt's begin on, not only what is lacking here.
            let (cached, pulled) = (placed.chosen.cached_tokens, placed.chosen.pulled_tokens);
            let tokens = cached.saturating_add(pulled);
            let there = pulled > 0 && !address.is_empty();
            there.then_some(v1::PrefixSource {
                worker,
                incarnation,
                address,
                tokens,
            })
        });
        let left = open.request.max_tokens.saturating_sub(border);
        let moved = placed.source.map(|source| (source, placed.prefill));
        open.planned(Chosen {
            plan: plan_of(placed.engine, placed.prefill, placed.decode, left),
            parties,
            cached_tokens: placed.chosen.cached_tokens,
            pulled_tokens: placed.chosen.pulled_tokens,
            prefix_from,
            urgency_ms: open.urgency_ms + placed.key_ms - self.dispatcher.waits.deadline_ms(open),
            predicted_start_ms: placed.start_ms,
            predicted,
            pulls: moved,
            tail: placed
                .tail
                .map(|tail| (placed.prefill, placed.decode, tail)),
            booking: Booking {
                loads: placed.bookings,
            },
            decide: began.elapsed(),
            retry,
        });
    }

    /// Workers without cache events: what is sent there counts as cached.
    fn note_sent(&self, open: &Open, placed: &Placed) {
        let now_ms = self.dispatcher.waits.now_ms() as u64;
        let (prefill, decode) = (placed.plan.prefill(), placed.plan.decode());
        let two = (decode != prefill).then_some(decode);
        let mut guessed: SmallVec<[WorkerSlot; 2]> = [prefill].into_iter().chain(two).collect();
        {
            // The others tell of their cache: the index need not be asked to write.
            let placer = self.dispatcher.placer();
            guessed.retain(|slot| placer.guesses(*slot));
        }
        for slot in guessed {
            // A worker that left meanwhile holds nothing any more.
            let index = &self.dispatcher.index;
            let _ = index.record_sent(slot, open.chain(), now_ms);
        }
    }

    /// The sessions of a plan. `None` where one has ended or takes nothing now.
    fn parties(&self, placed: &Placed) -> Option<SmallVec<[Party; 2]>> {
        let mut workers: SmallVec<[WorkerIndex; 2]> =
            SmallVec::from_slice(&[placed.prefill, placed.decode]);
        workers.dedup();
        let party = |worker| {
            let session = self.table.get(worker)?.session()?;
            session
                .takes_placements()
                .then_some(Party { worker, session })
        };
        workers.into_iter().map(party).collect()
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

    /// A worker's load came.
    pub(super) fn worker_loaded(self: &Arc<Self>, worker: &Arc<WorkerEntry>, report: &LoadReport) {
        let now_ms = self.dispatcher.waits.now_ms();
        let mut placer = self.dispatcher.placer();
        let reported = placer.loaded(worker.index, report, now_ms);
        drop(placer);
        if let Some(reported) = reported {
            self.look(&reported);
        }
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
        let (step_model, slot, paths) = {
            let placer = self.dispatcher.placer();
            let (index, slot) = (worker.index, placer.slot(worker.index));
            (placer.step_model(index), slot, placer.paths_to(index))
        };
        let path = |(source, rate): (WorkerIndex, TransferRate)| {
            Some(v1::PathRate {
                source: self.table.get(source)?.name(),
                fixed_ms: rate.fixed_ms,
                bytes_per_ms: rate.bytes_per_ms,
            })
        };
        let status = worker.status();
        v1::WorkerStatus {
            step_model: step_model.or(status.step_model),
            paths_to: paths.into_iter().filter_map(path).collect(),
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

    /// Whether a worker whose answers fail may be left out: of those that do its
    /// stages at least half are to be left. Where most fail the fault is
    /// elsewhere, and a pool that is emptied serves nobody (DESIGN 5).
    pub(super) fn may_eject(&self, worker: &WorkerEntry) -> bool {
        let model = |entry: &WorkerEntry| entry.record().and_then(|r| r.model).map(|m| m.name);
        let (own, (role, _)) = (model(worker), worker.role());
        let alike = |entry: &&Arc<WorkerEntry>| {
            let (other, draining) = entry.role();
            let same = other == role || other == v1::Role::Both;
            entry.index != worker.index && same && !draining && model(entry) == own
        };
        let all = self.table.all();
        let (mut others, mut works) = (0, 0);
        for entry in all.iter().filter(alike) {
            others += 1;
            works += usize::from(entry.live());
        }
        2 * works > others
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

/// Units of a prompt whose chain value stands for what belongs together.
const AFFINITY_UNITS: usize = 16;

/// What a request belongs to: the first 256 tokens of its prompt, or it stands
/// for itself.
fn affinity(chain: &[u64], id: u128) -> u64 {
    let first = &chain[..chain.len().min(AFFINITY_UNITS)];
    first.last().copied().unwrap_or(id as u64)
}

/// Whether a worker said that its engine cannot do what is asked.
fn unsupported(request: &PlanRequest) -> bool {
    let mut why = request.excluded.iter().map(|(_, why)| *why);
    why.any(|why| why == Refusal::Unsupported)
}

/// A class in the scheduler's terms.
pub(crate) fn class_of(class: v1::RequestClass) -> Class {
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
        itl_target_ms: (request.itl_target_ms > 0.0).then_some(request.itl_target_ms),
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
    chain_values(root_of(request, model), &request.prompt_ids)
}

fn root_of(request: &AdmittedRequest, model: &v1::ModelRecord) -> u64 {
    let adapter = model
        .adapters
        .get(&request.adapter)
        .map_or("", String::as_str);
    namespace_root(&model.digest, adapter, &request.cache_salt)
}

/// `left` is the number of tokens still to be made.
fn plan_of(engine: Option<bool>, prefill: WorkerIndex, decode: WorkerIndex, left: u32) -> Plan {
    match engine {
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
