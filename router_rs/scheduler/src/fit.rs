//! Which workers can take which part of a request, and why the others cannot.

use crate::plan::{Feature, NoPlan};
use crate::request::RequestView;
use crate::worker::{Cluster, Phase, Role, WorkerView};

/// Tokens reserved beyond the prompt, so that decoding can begin.
pub const HEADROOM: u64 = 64;

/// Part of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Duty {
    /// Prompt, then hand-off.
    Prefill,
    /// Output, after a hand-off.
    Decode,
    /// All of it.
    Whole,
}

impl Duty {
    fn role(self) -> Role {
        match self {
            Self::Prefill => Role::Prefill,
            Self::Decode => Role::Decode,
            Self::Whole => Role::Both,
        }
    }

    /// A decode worker can compute a prompt too; whether it should is the
    /// policy's question.
    fn takes(self, role: Role) -> bool {
        match self {
            Self::Prefill => role != Role::Decode,
            Self::Decode | Self::Whole => role != Role::Prefill,
        }
    }
}

/// Why a worker cannot, from the farthest miss to the nearest. Of all workers
/// the nearest miss is what the client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Miss {
    Model,
    Adapter,
    Role,
    Feature(u8),
    TooLong { limit: u64 },
    Stopping,
    Draining,
    NotReady,
    NoRoom,
}

const FEATURES: [Feature; 5] = [
    Feature::Grammar,
    Feature::GrammarContinuation,
    Feature::PenaltiesOverContinuation,
    Feature::Logprobs,
    Feature::CacheSalt,
];

/// Whether a worker can take a part of a request now.
pub(crate) fn fits(worker: &WorkerView, request: &RequestView<'_>, duty: Duty) -> Result<(), Miss> {
    let digest_differs = !request.digest.is_empty() && *worker.digest != *request.digest;
    if *worker.model != *request.model || digest_differs {
        return Err(Miss::Model);
    }
    if !request.adapter.is_empty() && !worker.adapters.contains(request.adapter) {
        return Err(Miss::Adapter);
    }
    if !duty.takes(worker.role) {
        return Err(Miss::Role);
    }
    if let Some(feature) = lacks(worker, request, duty) {
        return Err(Miss::Feature(feature));
    }
    let tokens = tokens_held(request);
    let limit = pool_limit(worker);
    if tokens > limit {
        return Err(Miss::TooLong { limit });
    }
    match worker.phase {
        Phase::Stopping => return Err(Miss::Stopping),
        Phase::Loading => return Err(Miss::NotReady),
        Phase::WarmingUp | Phase::Serving => {}
    }
    if worker.draining {
        return Err(Miss::Draining);
    }
    if worker.suspect {
        return Err(Miss::NotReady);
    }
    if request.excluded.contains(&worker.slot) || worker.blocks(tokens) > room(worker, request) {
        return Err(Miss::NoRoom);
    }
    Ok(())
}

/// Whether a worker can compute a request's prompt, now or once it has room.
pub(crate) fn could_compute(worker: &WorkerView, request: &RequestView<'_>) -> bool {
    let duty = match worker.role {
        Role::Prefill => Duty::Prefill,
        Role::Decode | Role::Both => Duty::Whole,
    };
    let fit = fits(worker, request, duty);
    matches!(fit, Ok(()) | Err(Miss::NoRoom | Miss::NotReady))
}

/// Tokens that a worker must hold for it to start: the sequence, headroom,
/// but no more than it can ever become.
pub(crate) fn tokens_held(request: &RequestView<'_>) -> u64 {
    let left = u64::from(request.max_tokens.saturating_sub(request.output_tokens));
    request.sequence() + HEADROOM.min(left)
}

/// Longest sequence that a worker can hold alone, in tokens.
fn pool_limit(worker: &WorkerView) -> u64 {
    let pool = worker
        .abilities
        .pool_blocks
        .saturating_mul(u64::from(worker.abilities.block_tokens));
    pool.min(u64::from(worker.abilities.context_length))
}

/// Blocks for this request: what is available, and its own cached prefix
/// where that may be among the blocks in use.
fn room(worker: &WorkerView, request: &RequestView<'_>) -> u64 {
    let shared = worker
        .blocks(request.cached_on(worker.slot))
        .min(worker.load.kv.running);
    worker.available_blocks() + shared
}

fn lacks(worker: &WorkerView, request: &RequestView<'_>, duty: Duty) -> Option<u8> {
    let (abilities, needs) = (&worker.abilities, &request.needs);
    let continued = request.output_tokens > 0 || duty == Duty::Decode;
    if needs.grammar && !abilities.grammars {
        return Some(0);
    }
    if needs.grammar
        && (needs.grammar_continuation || request.output_tokens > 0)
        && !abilities.grammars_over_continuation
    {
        return Some(1);
    }
    if needs.penalties && continued && !abilities.penalties_over_continuation {
        return Some(2);
    }
    if needs
        .logprobs
        .is_some_and(|wanted| wanted.max(1) > abilities.max_logprobs)
    {
        return Some(3);
    }
    (needs.cache_salt && abilities.no_cache_salt).then_some(4)
}

/// Whether KV can pass from one worker to the other.
pub(crate) fn pairs(prefill: &WorkerView, decode: &WorkerView) -> bool {
    let (p, d) = (&prefill.abilities, &decode.abilities);
    let streamed = p.streamed_hand_off && d.streamed_hand_off;
    let engine = !p.engine_connector.is_empty() && p.engine_connector == d.engine_connector;
    prefill.slot != decode.slot
        && prefill.digest == decode.digest
        && p.pairing == d.pairing
        && (streamed || engine)
}

/// Whether any worker can take a part, or the nearest miss.
pub(crate) fn able(
    cluster: &Cluster<'_>,
    request: &RequestView<'_>,
    duty: Duty,
    roles: &[Role],
) -> Result<(), Miss> {
    let mut nearest = Miss::Model;
    for worker in cluster.workers {
        match fits(worker, request, duty) {
            Ok(()) if roles.contains(&worker.role) => return Ok(()),
            Ok(()) => nearest = nearest.max(Miss::Role),
            Err(miss) => {
                nearest = nearest.max(if roles.contains(&worker.role) {
                    miss
                } else {
                    miss.min(Miss::Role)
                })
            }
        }
    }
    Err(nearest)
}

/// Whether a worker can do what only few requests ask for.
pub(crate) fn fits_else(worker: &WorkerView, request: &RequestView<'_>) -> bool {
    (request.digest.is_empty() || *worker.digest == *request.digest)
        && (request.adapter.is_empty() || worker.adapters.contains(request.adapter))
        && !request.excluded.contains(&worker.slot)
        && lacks(worker, request, Duty::Whole).is_none()
}

impl WorkerView {
    /// Whether it has the model and its engine can do what is asked, as far as a request
    /// has come, whatever it is doing now.
    pub fn suits(&self, request: &RequestView<'_>) -> bool {
        *self.model == *request.model && fits_else(self, request)
    }
}

/// What the client is told of a miss.
pub(crate) fn reason(miss: Miss, duty: Duty, request: &RequestView<'_>) -> NoPlan {
    let tokens = tokens_held(request);
    let role = duty.role();
    match miss {
        Miss::Model => NoPlan::UnknownModel,
        Miss::Adapter => NoPlan::UnknownAdapter,
        Miss::Role => NoPlan::NoWorker(role),
        Miss::Feature(index) => NoPlan::Unsupported(FEATURES[usize::from(index).min(4)]),
        Miss::TooLong { limit } => NoPlan::TooLong { tokens, limit },
        Miss::Stopping | Miss::Draining => NoPlan::NotReady {
            role,
            draining: true,
        },
        Miss::NotReady => NoPlan::NotReady {
            role,
            draining: false,
        },
        Miss::NoRoom => NoPlan::NoRoom { tokens },
    }
}
