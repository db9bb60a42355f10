//! From a request for a plan to a booked plan, or to the queue (`queue`).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use kvmesh_kv_index::{IndexStats, KvIndex, Matches, WorkerSlot, chain_values};
use kvmesh_scheduler::{Booking as Load, Class, Hold, OutputLengths, PerClass, RequestView, Turn};
use kvmesh_session::{
    WorkerIndex,
    generation::{Event, PlanRequest, Stop},
    parse::Refusal,
};
use kvmesh_wire::v1;
use smallvec::SmallVec;

use super::{
    Core,
    decisions::Decided,
    figures::ms,
    open::{Chosen, Open, Party},
    placer::{Lacks, Placed, Placer},
    queue::{Waiting, Waits},
    recover::Retry,
    settings::MeshSettings,
};
use crate::request::AdmittedRequest;

mod away;
mod claimed;
mod request;
mod rows;
mod spare;
mod told;

pub(super) use away::Stays;
pub(crate) use request::class_of;
use request::{affinity, lacks, plan_of, root_of, unsupported};
pub(super) use request::{chain_of, request_view};

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

    /// Its first token came, in a step of this worker: its prompt holds nobody up any
    /// more. Whether it was computed there.
    pub(super) fn started(&self, from: WorkerIndex, step: u64) -> bool {
        let mut computed = false;
        for (on, booked) in &self.loads {
            match *on == from {
                true => computed |= booked.started_in(step),
                false => booked.started(),
            }
        }
        computed
    }
}

/// Lengths of outputs, and what the views were told of them.
struct Lengths {
    learnt: OutputLengths,
    told: BTreeMap<String, PerClass<f64>>,
}

impl Lengths {
    fn left(&self, model: &str) -> PerClass<f64> {
        Class::ALL.map(|class| self.learnt.left_of_running(model, class, u32::MAX))
    }
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

    /// What streams of a model have left, by class: learnt, or expected before an
    /// output has ended.
    fn left(&self, model: &str) -> PerClass<f64> {
        self.lengths().left(model)
    }

    /// An output is complete. Every view has what streams have left; it is told
    /// anew where that changed by a tenth.
    pub(super) fn learn_output(&self, request: &AdmittedRequest, tokens: u32) {
        let model = &request.model;
        let mut lengths = self.lengths();
        lengths
            .learnt
            .observe(model, class_of(request.class), tokens);
        let left = lengths.left(model);
        let known = lengths.told.get(model);
        let same = |at: usize, known: &PerClass<f64>| (left[at] / known[at] - 1.0).abs() < 0.1;
        if known.is_some_and(|known| (0..left.len()).all(|at| same(at, known))) {
            return;
        }
        lengths.told.insert(model.clone(), left);
        drop(lengths);
        self.placer().left(model, left);
    }

    /// Requests that wait.
    pub(super) fn queued(&self) -> usize {
        self.waits.len()
    }

    /// Requests for a model that wait for room.
    pub(super) fn queued_of(&self, model: &str) -> usize {
        self.waits.of_model(model)
    }

    /// Bookings that stand.
    pub(super) fn booked(&self) -> usize {
        self.placer().booked()
    }
}

impl Core {
    /// Chooses and books, as one whose turn it is; places if a worker would start
    /// the request soon.
    pub(super) fn try_plan(self: &Arc<Self>, waiting: &Waiting, turn: Turn) -> Tried {
        let (open, request) = (&waiting.open, &waiting.request);
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
        let mut placed = match self.choose(open, request, border, turn) {
            Ok(placed) => placed,
            Err(Lacks::Room) => return Tried::NoRoom,
            Err(Lacks::Ready) => return Tried::NotYet(None),
            Err(Lacks::Engine(feature)) => {
                let attempt = open.attempts();
                tracing::info!(generation = %open.id, attempt, %feature, "no engine can run it");
                open.engine_lacks(&lacks(feature));
                open.apply(Event::NoPlan);
                return Tried::Ended;
            }
            // A worker that is lost may be replaced; one that cannot run it is not
            // waited for.
            Err(Lacks::Worker(_)) if open.continues() && !unsupported(request) => {
                return Tried::NotYet(None);
            }
            Err(Lacks::Worker(why)) => {
                let attempt = open.attempts();
                tracing::info!(generation = %open.id, attempt, %why, "no plan");
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
        let waited = waiting.told(began);
        self.go(open, placed, parties, (border, retry), (began, waited));
        Tried::Done
    }

    fn choose(
        &self,
        open: &Open,
        request: &PlanRequest,
        border: u32,
        turn: Turn,
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
            virtual_deadline_ms: turn.chosen_by_ms(),
            affinity: affinity(open.chain(), id),
            ..request_view(&open.request, id, border, expected, &cached, &excluded)
        };
        let (now_ms, rules) = (waits.now_ms(), &waits.rules);
        // Its client has waited for one worker that failed: where another can run it at once, it
        // is not the one that tries whether a third works again.
        if request.failures > 0 {
            let mut unproved = placer.on_probation();
            if !unproved.is_empty() {
                unproved.extend_from_slice(&excluded);
                let sound = RequestView {
                    excluded: &unproved,
                    ..view
                };
                let placed = placer.choose(&sound, turn, &lasting, (now_ms, rules));
                if let Ok(placed) = placed
                    && placed.hold.is_none()
                {
                    return Ok(placed);
                }
            }
        }
        placer.choose(&view, turn, &lasting, (now_ms, rules))
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
        (began, waited): (Instant, v1::RouterWait),
    ) {
        self.note_sent(open, &placed);
        let terms = placed.chosen.terms;
        let predicted = v1::PhaseTimes {
            wait_ms: terms.wait_ms,
            prefill_ms: terms.pull_ms + terms.reload_ms + terms.prefill_ms,
            transfer_ms: terms.transfer_ms,
            ttft_ms: terms.ttft_ms(),
        };
        self.decisions.decided(
            open.id,
            Decided {
                attempt: open.next_attempt(),
                at_ms: ms(open.request.arrived.elapsed()),
                policy: self.dispatcher.policy,
                chosen: placed.plan,
                plans: placed.considered,
                weighed: placed.weighed,
                tied: placed.tied,
                predicted_wait_ms: open.wait_ms,
                waited,
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
}
