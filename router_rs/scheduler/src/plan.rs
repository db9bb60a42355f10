//! Plans, what they cost, and why there is none.

use crate::booking::Work;
use crate::request::RequestView;
use crate::survey::LocalPrefill;
use crate::worker::{Cluster, Role};
use kvmesh_kv_index::WorkerSlot;
use thiserror::Error;

/// Where an attempt runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Plan {
    /// Prompt and output on one worker.
    Whole {
        /// The worker.
        worker: WorkerSlot,
        /// Pull the prompt's prefix from there first.
        source: Option<WorkerSlot>,
    },
    /// Prompt on one worker, output on another.
    Split {
        /// Computes the prompt.
        prefill: WorkerSlot,
        /// Produces the output.
        decode: WorkerSlot,
        /// The prefill worker pulls the prompt's prefix from there first.
        source: Option<WorkerSlot>,
    },
}

impl Plan {
    /// The worker that computes the prompt.
    pub fn prefill(&self) -> WorkerSlot {
        match *self {
            Self::Whole { worker, .. } => worker,
            Self::Split { prefill, .. } => prefill,
        }
    }

    /// The worker that produces the output.
    pub fn decode(&self) -> WorkerSlot {
        match *self {
            Self::Whole { worker, .. } => worker,
            Self::Split { decode, .. } => decode,
        }
    }

    /// Where the prefix is pulled from.
    pub fn source(&self) -> Option<WorkerSlot> {
        match *self {
            Self::Whole { source, .. } | Self::Split { source, .. } => source,
        }
    }
}

/// What a plan costs, by term, in milliseconds of added delay.
///
/// The first seven are what the request itself waits for, as it will be
/// measured; of the way to the client only what other plans lack is a cost. The
/// others are costs: weighted by class (`interactive target /
/// class target`), by ε and by κ (SCHEDULING 2).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Terms {
    /// Waiting for the prefill worker: running step and queued prompts.
    pub wait_ms: f64,
    /// Pulling a prefix from another worker.
    pub pull_ms: f64,
    /// Bringing cached blocks back from below the device.
    pub reload_ms: f64,
    /// Computing what is not cached.
    pub prefill_ms: f64,
    /// KV that arrives after prefill's end.
    pub transfer_ms: f64,
    /// Waiting for a place in the decode worker's batch.
    pub decode_wait_ms: f64,
    /// Between worker and client, what is neither waiting nor computing.
    pub relay_ms: f64,
    /// As much of it as every plan has.
    pub relay_least_ms: f64,
    /// Whether the first token comes from decode: then transfer and
    /// decode's wait lie before it, else between first and second token.
    pub first_from_decode: bool,
    /// Weight of the request's own waiting.
    pub weight: f64,
    /// Those that wait behind it.
    pub queued_ms: f64,
    /// The gap between first and second token.
    pub gap_ms: f64,
    /// The request's own output, slowed by company.
    pub own_stretch_ms: f64,
    /// Other streams, slowed by this request.
    pub others_stretch_ms: f64,
    /// A pool that runs full.
    pub recompute_ms: f64,
}

impl Terms {
    /// Predicted time to the first token.
    pub fn ttft_ms(&self) -> f64 {
        let before = self.wait_ms + self.pull_ms + self.reload_ms + self.prefill_ms + self.relay_ms;
        if self.first_from_decode {
            before + self.transfer_ms + self.decode_wait_ms
        } else {
            before
        }
    }

    /// The cost: all of it.
    pub fn total_ms(&self) -> f64 {
        self.weight * (self.ttft_ms() - self.relay_least_ms)
            + self.queued_ms
            + self.gap_ms
            + self.own_stretch_ms
            + self.others_stretch_ms
            + self.recompute_ms
    }

    /// Of the predicted time to the first token, what models say of service:
    /// computing, pulling and moving.
    pub fn modelled_ms(&self) -> f64 {
        self.ttft_ms() - self.wait_ms - self.relay_ms
    }

    /// The cost by name; the rows add up to [`Terms::total_ms`].
    pub fn rows(&self) -> [(&'static str, f64); 12] {
        let late = if self.first_from_decode {
            self.weight
        } else {
            0.0
        };
        [
            ("wait", self.weight * self.wait_ms),
            ("pull", self.weight * self.pull_ms),
            ("reload", self.weight * self.reload_ms),
            ("prefill", self.weight * self.prefill_ms),
            ("transfer", late * self.transfer_ms),
            ("decode_wait", late * self.decode_wait_ms),
            ("relay", self.weight * (self.relay_ms - self.relay_least_ms)),
            ("queued", self.queued_ms),
            ("gap", self.gap_ms),
            ("own_stretch", self.own_stretch_ms),
            ("others_stretch", self.others_stretch_ms),
            ("recompute", self.recompute_ms),
        ]
    }
}

/// A plan with its cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Considered {
    /// The plan.
    pub plan: Plan,
    /// Its cost by term.
    pub terms: Terms,
    /// Tokens that the prefill worker has.
    pub cached_tokens: u32,
    /// Tokens that it pulls.
    pub pulled_tokens: u32,
}

/// The plan chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// What was chosen.
    pub chosen: Considered,
    /// How many plans tied with it, itself included.
    pub tied: u32,
    /// How many plans were weighed.
    pub weighed: u32,
    /// The best of them, cheapest first, and the chosen one
    /// ([`crate::CostSettings::plans_kept`]). Empty: they were not asked for.
    pub considered: Vec<Considered>,
    /// Predicted start of the prompt, in ms from now.
    pub start_ms: f64,
    /// The same from the end of the worker's running step, which nothing that is
    /// sent now can join: what `--dispatch-ahead` is held against.
    pub queued_ms: f64,
    /// What to book, by worker: one entry for a whole, two for a split
    /// (prefill, decode).
    pub work: Vec<(WorkerSlot, Work)>,
}

impl Decision {
    /// The plan.
    pub fn plan(&self) -> Plan {
        self.chosen.plan
    }
}

/// What an engine lacks. It is shown as the path of the client's field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Feature {
    /// Output held to a grammar.
    Grammar,
    /// A grammar that survives a lost worker.
    GrammarContinuation,
    /// Penalties over an output that began elsewhere.
    PenaltiesOverContinuation,
    /// So many log-probabilities.
    Logprobs,
    /// Cached prefixes kept apart by salt.
    CacheSalt,
}

impl std::fmt::Display for Feature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Grammar => "grammar",
            Self::GrammarContinuation => "grammar.require_continuation",
            Self::PenaltiesOverContinuation => "continue_from",
            Self::Logprobs => "output.logprobs",
            Self::CacheSalt => "hints.cache_salt",
        })
    }
}

/// Why a request cannot be placed now. The first four will not pass by
/// waiting, as far as this cluster goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NoPlan {
    /// No worker has the model.
    #[error("no worker serves this model")]
    UnknownModel,
    /// No worker of the model has the adapter.
    #[error("no worker has this adapter")]
    UnknownAdapter,
    /// No engine can do what is asked.
    #[error("no worker supports {0}")]
    Unsupported(Feature),
    /// No pool can hold it alone.
    #[error("{tokens} tokens do not fit, the limit is {limit}")]
    TooLong {
        /// Tokens asked for.
        tokens: u64,
        /// Most that any fitting worker can hold.
        limit: u64,
    },
    /// Nobody takes this role.
    #[error("no worker for role {0:?}")]
    NoWorker(Role),
    /// Those that take this role drain, stop, load or are silent.
    #[error("no worker for role {role:?} takes new work now")]
    NotReady {
        /// The role.
        role: Role,
        /// All of them drain or stop.
        draining: bool,
    },
    /// Prefill and decode workers that would do have incompatible KV.
    #[error("no prefill and decode worker can exchange KV")]
    NoPair,
    /// No room at the moment: wait for a load report.
    #[error("no room for {tokens} tokens at the moment")]
    NoRoom {
        /// Tokens asked for.
        tokens: u64,
    },
}

impl NoPlan {
    /// Whether a load report may change it: the request waits.
    pub fn passes(&self) -> bool {
        matches!(
            self,
            Self::NoRoom { .. }
                | Self::NotReady {
                    draining: false,
                    ..
                }
        )
    }
}

/// Chooses where requests run.
pub trait Policy: Send {
    /// Name, as in settings and metrics.
    fn name(&self) -> &'static str;

    /// When it lets decode workers compute prompts.
    fn local_prefill(&self) -> LocalPrefill {
        LocalPrefill::WithoutPrefillWorkers
    }

    /// Chooses a plan.
    ///
    /// # Errors
    /// [`NoPlan`] where no plan is possible now.
    fn choose(
        &mut self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Decision, NoPlan>;

    /// All plans that [`Policy::choose`] would weigh, cheapest first.
    ///
    /// # Errors
    /// As [`Policy::choose`].
    fn explain(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
    ) -> Result<Vec<Considered>, NoPlan>;
}
