//! What this router knows of its workers' work, and where a request goes.
//!
//! The cost of a worker is the prompt tokens that it has to compute before it
//! gets to the request, those of the request itself, and what decodes there.
//! Load is booked at the moment of choice: a worker's own report counts up to
//! the last command that it echoes, bookings count after that.

use std::collections::BTreeMap;

use kvmesh_session::{WorkerIndex, parse::Refusal};
use kvmesh_wire::v1;

/// Tokens beyond the prompt that decode reserves room for (DESIGN 4).
const RESERVED_TAIL: u64 = 64;

/// A worker as far as placing on it goes.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    pub(super) model: String,
    pub(super) digest: String,
    pub(super) role: v1::Role,
    pub(super) placeable: bool,
    pub(super) draining: bool,
    pub(super) serving: bool,
    pub(super) capabilities: v1::Capabilities,
    pub(super) transfer: bool,
    pub(super) load: Option<v1::Load>,
}

#[derive(Debug)]
struct Share {
    worker: WorkerIndex,
    /// Number of the command that took it there; `None` before it was sent.
    command: Option<u64>,
    prefill_tokens: u64,
    decodes: u64,
    blocks: u64,
}

/// How a plan passes KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// All on one worker.
    Whole(WorkerIndex),
    /// By mesh transfer.
    Mesh {
        prefill: WorkerIndex,
        decode: WorkerIndex,
    },
    /// By the engine's own connector.
    Engine {
        prefill: WorkerIndex,
        decode: WorkerIndex,
        prefill_emits: bool,
    },
}

/// What came of asking for a plan.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Choice {
    /// A plan, booked under this number.
    Plan {
        shape: Shape,
        booking: u64,
        cached: u32,
        costs: Vec<Cost>,
    },
    /// Workers are there, but none has room now.
    Wait,
    /// No worker can run it.
    Never,
}

/// One plan that was considered.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Cost {
    pub(super) shape: Shape,
    /// Named terms, milliseconds.
    pub(super) terms: Vec<(&'static str, f64)>,
}

impl Cost {
    fn total(&self) -> f64 {
        self.terms.iter().map(|(_, ms)| ms).sum()
    }
}

/// What a plan is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) model: &'a str,
    pub(super) prompt_tokens: u64,
    /// Output tokens that there are already.
    pub(super) output_tokens: u64,
    pub(super) max_tokens: u64,
    pub(super) excluded: &'a [(WorkerIndex, Refusal)],
    /// Cached prefix in tokens by worker.
    pub(super) cached: &'a BTreeMap<WorkerIndex, u32>,
    /// Any number: breaks ties so that routers do not herd.
    pub(super) tie: u64,
}

/// Which stages of a model are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Served {
    pub(super) prefill: bool,
    pub(super) decode: bool,
    /// Tokens that the largest pool holds.
    pub(super) largest_pool: u64,
}

/// The workers' work. Pure: no clock, no socket.
#[derive(Debug, Default)]
pub(super) struct Placer {
    workers: BTreeMap<WorkerIndex, View>,
    bookings: BTreeMap<u64, Vec<Share>>,
    next: u64,
}

impl Placer {
    /// The view of a worker, to be changed.
    pub(super) fn view(&mut self, worker: WorkerIndex) -> &mut View {
        self.workers.entry(worker).or_default()
    }

    /// Takes a worker off.
    pub(super) fn remove(&mut self, worker: WorkerIndex) {
        self.workers.remove(&worker);
    }

    /// Notes the command by which a booking went to a worker.
    pub(super) fn placed(&mut self, booking: u64, worker: WorkerIndex, command: u64) {
        let shares = self.bookings.get_mut(&booking).into_iter().flatten();
        for share in shares.filter(|share| share.worker == worker) {
            share.command = Some(command);
        }
    }

    /// Gives a booking back.
    pub(super) fn release(&mut self, booking: u64) {
        self.bookings.remove(&booking);
    }

    /// Bookings that stand.
    pub(super) fn booked(&self) -> usize {
        self.bookings.len()
    }

    /// What is served of a model. A draining worker counts: whoever asks while
    /// all drain waits for nothing.
    pub(super) fn served(&self, model: &str) -> Served {
        let mut served = Served::default();
        for view in self.workers.values().filter(|view| view.model == model) {
            if !view.placeable || view.draining {
                continue;
            }
            let capabilities = &view.capabilities;
            let tokens = capabilities.pool_blocks * u64::from(capabilities.block_tokens);
            served.largest_pool = served.largest_pool.max(tokens);
            served.prefill |= view.role != v1::Role::Decode;
            // Decode workers prefill for themselves where nobody else does.
            served.decode |= view.role != v1::Role::Prefill;
            served.prefill |= view.role == v1::Role::Decode;
        }
        served
    }

    /// Chooses and books.
    pub(super) fn choose(&mut self, wanted: &Wanted<'_>) -> Choice {
        let unsupported = |index: &WorkerIndex| {
            wanted
                .excluded
                .iter()
                .any(|(w, why)| w == index && *why == Refusal::Unsupported)
        };
        let usable: Vec<(WorkerIndex, &View)> = self
            .workers
            .iter()
            .filter(|(index, view)| {
                view.model == wanted.model
                    && view.placeable
                    && !view.draining
                    && !unsupported(index)
            })
            .map(|(index, view)| (*index, view))
            .collect();
        if !usable
            .iter()
            .any(|(_, view)| view.role != v1::Role::Prefill)
        {
            return Choice::Never;
        }
        let now: Vec<_> = usable
            .into_iter()
            .filter(|(i, view)| view.serving && !wanted.excluded.iter().any(|(w, _)| w == i))
            .collect();
        let mut costs = self.plans(&now, wanted);
        costs.sort_by(|a, b| a.total().total_cmp(&b.total()));
        let Some(best) = costs.first().map(Cost::total) else {
            return Choice::Wait;
        };
        let near = costs
            .iter()
            .take_while(|cost| cost.total() <= best + 2.0_f64.max(best * 0.03));
        let ties = near.count().max(1);
        let picked = usize::try_from(wanted.tie % ties as u64).unwrap_or(0);
        costs.swap(0, picked);
        costs.truncate(8);
        let shape = costs[0].shape;
        let booking = self.book(shape, wanted);
        let source = match shape {
            Shape::Whole(on) => on,
            Shape::Mesh { prefill, .. } | Shape::Engine { prefill, .. } => prefill,
        };
        let cached = wanted.cached.get(&source).copied().unwrap_or(0);
        Choice::Plan {
            shape,
            booking,
            cached,
            costs,
        }
    }

    fn plans(&self, workers: &[(WorkerIndex, &View)], wanted: &Wanted<'_>) -> Vec<Cost> {
        let prefills = workers
            .iter()
            .filter(|(_, view)| view.role != v1::Role::Decode);
        let mut plans = Vec::new();
        for (decode, decoder) in workers {
            if decoder.role == v1::Role::Prefill || !self.has_room(*decode, decoder, wanted) {
                continue;
            }
            // A decode worker computes prompts itself only where no prefill
            // worker fits it.
            let mut alone = decoder.role == v1::Role::Both || wanted.max_tokens <= 1;
            let mut paired = false;
            if wanted.max_tokens > 1 {
                for (prefill, prefiller) in prefills.clone().filter(|(p, _)| p != decode) {
                    if let Some(shape) = pair(*prefill, prefiller, *decode, decoder) {
                        paired = true;
                        plans.push(self.cost(shape, wanted));
                    }
                }
            }
            alone |= !paired;
            if alone {
                plans.push(self.cost(Shape::Whole(*decode), wanted));
            }
        }
        plans
    }

    fn has_room(&self, index: WorkerIndex, view: &View, wanted: &Wanted<'_>) -> bool {
        let Some(kv) = view.load.as_ref().and_then(|load| load.kv.as_ref()) else {
            return true;
        };
        let block = u64::from(view.capabilities.block_tokens).max(1);
        let booked: u64 = self.unseen(index, view).map(|share| share.blocks).sum();
        (kv.free + kv.evictable).saturating_sub(booked) >= blocks(wanted, block)
    }

    /// Shares of bookings that the worker's last load does not show.
    fn unseen<'a>(&'a self, index: WorkerIndex, view: &View) -> impl Iterator<Item = &'a Share> {
        let echoed = view.load.as_ref().map_or(0, |load| load.last_command);
        let shares = self.bookings.values().flatten();
        shares.filter(move |share| {
            share.worker == index && share.command.is_none_or(|number| number > echoed)
        })
    }

    fn cost(&self, shape: Shape, wanted: &Wanted<'_>) -> Cost {
        let (prefill, decode) = match shape {
            Shape::Whole(on) => (on, on),
            Shape::Mesh { prefill, decode }
            | Shape::Engine {
                prefill, decode, ..
            } => (prefill, decode),
        };
        let sequence = wanted.prompt_tokens + wanted.output_tokens;
        let cached = u64::from(wanted.cached.get(&prefill).copied().unwrap_or(0));
        let (queued, _) = self.work(prefill);
        let (_, decoding) = self.work(decode);
        let terms = vec![
            (
                "prefill",
                sequence.saturating_sub(cached) as f64 * PREFILL_MS,
            ),
            ("queue", queued as f64 * PREFILL_MS),
            ("decode", decoding as f64 * DECODE_MS),
        ];
        Cost { shape, terms }
    }

    /// Prompt tokens to be computed before a new request, and requests that
    /// decode or will.
    fn work(&self, index: WorkerIndex) -> (u64, u64) {
        let Some(view) = self.workers.get(&index) else {
            return (0, 0);
        };
        let shares = view
            .load
            .iter()
            .flat_map(|load| [&load.own, &load.others])
            .flatten();
        let (mut tokens, mut decodes) = (0, 0);
        for share in shares {
            tokens += share.queued_prefill_tokens + share.running_prefill_tokens;
            decodes += u64::from(share.decoding + share.receiving);
        }
        for share in self.unseen(index, view) {
            tokens += share.prefill_tokens;
            decodes += share.decodes;
        }
        (tokens, decodes)
    }

    fn book(&mut self, shape: Shape, wanted: &Wanted<'_>) -> u64 {
        let share = |worker, prefills: bool, decodes: bool| {
            let view = self.workers.get(&worker);
            let block = view
                .map_or(16, |view| u64::from(view.capabilities.block_tokens))
                .max(1);
            let cached = u64::from(wanted.cached.get(&worker).copied().unwrap_or(0));
            let sequence = wanted.prompt_tokens + wanted.output_tokens;
            Share {
                worker,
                command: None,
                prefill_tokens: if prefills {
                    sequence.saturating_sub(cached)
                } else {
                    0
                },
                decodes: u64::from(decodes),
                blocks: blocks(wanted, block),
            }
        };
        let shares = match shape {
            Shape::Whole(on) => vec![share(on, true, true)],
            Shape::Mesh { prefill, decode }
            | Shape::Engine {
                prefill, decode, ..
            } => {
                vec![share(prefill, true, false), share(decode, false, true)]
            }
        };
        self.next += 1;
        self.bookings.insert(self.next, shares);
        self.next
    }
}

/// A stand-in for what steps really take.
const PREFILL_MS: f64 = 0.05;
const DECODE_MS: f64 = 2.0;

fn blocks(wanted: &Wanted<'_>, block_tokens: u64) -> u64 {
    (wanted.prompt_tokens + wanted.output_tokens + RESERVED_TAIL).div_ceil(block_tokens)
}

/// How two workers can work together, by their capabilities.
fn pair(
    prefill: WorkerIndex,
    prefiller: &View,
    decode: WorkerIndex,
    decoder: &View,
) -> Option<Shape> {
    if prefiller.digest != decoder.digest {
        return None;
    }
    let (sender, receiver) = (&prefiller.capabilities, &decoder.capabilities);
    let mesh = sender.streamed_hand_off && receiver.streamed_hand_off && prefiller.transfer;
    if mesh && sender.kv == receiver.kv && sender.block_tokens == receiver.block_tokens {
        return Some(Shape::Mesh { prefill, decode });
    }
    let connector = &sender.engine_connector;
    if !connector.is_empty() && *connector == receiver.engine_connector {
        let prefill_emits = sender.prefill_emits_first_token;
        return Some(Shape::Engine {
            prefill,
            decode,
            prefill_emits,
        });
    }
    None
}
