//! What is simulated: the cluster, its noise, the router and the policy.

use crate::profile::Profile;
use kvmesh_scheduler::planner::PlannerSettings;
use kvmesh_scheduler::{Role, StepModel};
use serde::{Deserialize, Serialize};

/// A whole run but for the trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Hardware and model of every worker.
    pub profile: Profile,
    /// Workers that compute prompts and hand KV on.
    #[serde(default)]
    pub prefill: usize,
    /// Workers that take KV over.
    #[serde(default)]
    pub decode: usize,
    /// Workers that do both.
    #[serde(default)]
    pub both: usize,
    /// Routers; requests are spread over them by a hash.
    #[serde(default = "one")]
    pub routers: usize,
    /// How many times faster than it was the trace is replayed.
    #[serde(default = "unit")]
    pub speed: f64,
    /// Share of the trace, from its start, that warms caches and is not
    /// counted.
    #[serde(default = "warm_up")]
    pub warm_up: f64,
    /// Chooses workers.
    pub policy: PolicySettings,
    /// Order and dispatch of what waits.
    #[serde(default)]
    pub queue: QueueSettings,
    /// What the scheduler does not see.
    #[serde(default)]
    pub noise: Noise,
    /// Prefixes can be pulled from another worker.
    #[serde(default)]
    pub prefix_pull: bool,
    /// When decode workers compute prompts, under `cost` and `clairvoyant`; none:
    /// as shipped.
    #[serde(default)]
    pub local_prefill: Option<LocalPrefill>,
    /// What routers take step coefficients (a, b, c, d, e) for before a worker's
    /// first step, each as a multiple of the mean worker's true one.
    #[serde(default = "exact")]
    pub prior: [f64; 5],
    /// Workers that fail.
    #[serde(default)]
    pub failures: Vec<Failure>,
    /// Roles follow the load; none: they stay.
    #[serde(default)]
    pub planner: Option<PlannerNumbers>,
    /// Targets that goodput is held to.
    #[serde(default)]
    pub slo: Slo,
    /// Most output tokens that a request asks for; its true length if that
    /// is more.
    #[serde(default = "max_tokens")]
    pub max_tokens: u32,
    /// Whether each request's row is kept.
    #[serde(default)]
    pub rows: bool,
    /// Seed of everything that looks random.
    #[serde(default = "seed")]
    pub seed: u64,
}

fn one() -> usize {
    1
}

fn unit() -> f64 {
    1.0
}

fn exact() -> [f64; 5] {
    [1.0; 5]
}

fn warm_up() -> f64 {
    0.2
}

fn max_tokens() -> u32 {
    4096
}

fn seed() -> u64 {
    1
}

/// A policy by name, with its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PolicySettings {
    /// Added milliseconds (SCHEDULING 2).
    Cost {
        /// ε; none: as shipped.
        #[serde(default)]
        stretch: Option<f64>,
        /// κ; none: as shipped.
        #[serde(default)]
        beyond_target: Option<f64>,
        /// Share of the best cost within which plans tie; none: as shipped.
        #[serde(default)]
        tie_share: Option<f64>,
    },
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
    /// Fewest requests.
    LeastLoaded,
    /// The less loaded of two.
    PowerOfTwo,
    /// What belongs together goes together.
    ConsistentHash,
    /// Longest cached prefix.
    PrefixGreedy,
    /// The usual formula: weighted overlap and load.
    OverlapLoad {
        /// Weight of blocks to compute; none: as shipped.
        #[serde(default)]
        overlap_weight: Option<f64>,
        /// Temperature of the draw; none: as shipped.
        #[serde(default)]
        temperature: Option<f64>,
    },
    /// That formula with each weight free: `backlog - overlap x cached +
    /// decode x decode context`, in tokens.
    Weighted {
        /// Weight of what is cached.
        overlap: f64,
        /// Weight of the streams' contexts.
        decode: f64,
    },
    /// True lengths and coefficients, rolled forward for every candidate.
    Clairvoyant,
}

/// When a worker that decodes computes a prompt too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LocalPrefill {
    /// Where no prefill worker is there.
    WithoutPrefillWorkers,
    /// Wherever it costs least.
    ByCost,
}

/// How requests wait.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QueueSettings {
    /// What goes first.
    pub order: Order,
    /// A request leaves its router when it is predicted to start within so
    /// many ms, or within one step; none: at once.
    pub dispatch_ahead_ms: Option<f64>,
    /// Longest predicted wait for which a request is admitted, ms; none: any.
    pub max_wait_ms: Option<f64>,
}

impl Default for QueueSettings {
    fn default() -> Self {
        Self {
            order: Order::Deadline,
            dispatch_ahead_ms: Some(50.0),
            max_wait_ms: None,
        }
    }
}

/// The order of waiting, in routers and engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Earliest virtual deadline first.
    Deadline,
    /// First come, first served.
    Arrival,
}

/// What the scheduler never sees.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Noise {
    /// Workers' speeds differ by up to this share, either way, uniformly.
    pub speed: f64,
    /// Sigma of the logarithm of a step's jitter.
    pub jitter: f64,
    /// Probability that a step stalls.
    pub stall: f64,
    /// How many times longer such a step takes.
    pub stall_factor: f64,
    /// Reports tell of the start of the step that ends; else of now.
    pub reports_a_step_late: bool,
    /// And come so many ms later.
    pub report_ms: f64,
    /// From a router to a worker, ms.
    pub network_ms: f64,
}

impl Default for Noise {
    fn default() -> Self {
        Self {
            speed: 0.2,
            jitter: 0.1,
            stall: 0.01,
            stall_factor: 5.0,
            reports_a_step_late: true,
            report_ms: 2.0,
            network_ms: 0.3,
        }
    }
}

impl Noise {
    /// None.
    pub fn none() -> Self {
        Self {
            speed: 0.0,
            jitter: 0.0,
            stall: 0.0,
            stall_factor: 1.0,
            reports_a_step_late: false,
            report_ms: 0.0,
            network_ms: 0.0,
        }
    }
}

/// A worker that loses everything.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// When, ms of the replay.
    pub at_ms: f64,
    /// Which, counted prefill, decode, both.
    pub worker: usize,
    /// After how long it is back, empty, ms; none: never.
    #[serde(default)]
    pub back_after_ms: Option<f64>,
    /// After how long its routers notice, ms: a killed process is noticed
    /// when its connection closes, a silent one after 3 s.
    #[serde(default = "noticed")]
    pub noticed_after_ms: f64,
}

fn noticed() -> f64 {
    5.0
}

/// The pool controller's numbers (`kvmesh_scheduler::planner`); none: as
/// shipped.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlannerNumbers {
    /// Between two looks, ms; none: 1,000.
    pub look_ms: Option<f64>,
    /// A pool is short from this pressure on.
    pub relieve_at: Option<f64>,
    /// Least share by which a flip must help.
    pub gain: Option<f64>,
    /// How long a pool must be short, ms.
    pub confirm_ms: Option<f64>,
    /// Least time between two flips, ms.
    pub dwell_ms: Option<f64>,
    /// Share by which what comes must have changed before a flip is undone.
    pub margin: Option<f64>,
    /// What is measured counts by e^-1 after so many ms.
    pub memory_ms: Option<f64>,
}

impl PlannerNumbers {
    /// Between two looks, ms.
    pub(crate) fn every_ms(&self) -> f64 {
        self.look_ms.unwrap_or(1_000.0)
    }

    /// What the controller gets.
    pub(crate) fn settings(&self) -> PlannerSettings {
        let shipped = PlannerSettings::default();
        PlannerSettings {
            relieve_at: self.relieve_at.unwrap_or(shipped.relieve_at),
            gain: self.gain.unwrap_or(shipped.gain),
            confirm_ms: self.confirm_ms.unwrap_or(shipped.confirm_ms),
            dwell_ms: self.dwell_ms.unwrap_or(shipped.dwell_ms),
            margin: self.margin.unwrap_or(shipped.margin),
            memory_ms: self.memory_ms.unwrap_or(shipped.memory_ms),
            ..shipped
        }
    }
}

/// What a served request is held to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Slo {
    /// First token, as a multiple of its unloaded time for that length
    /// without any cache.
    pub ttft_factor: f64,
    /// Mean time between its tokens by class (interactive, standard, batch),
    /// ms.
    pub itl_ms: [f64; 3],
}

impl Default for Slo {
    fn default() -> Self {
        Self {
            ttft_factor: 5.0,
            itl_ms: [50.0, 100.0, 1e9],
        }
    }
}

impl Settings {
    /// Roles of the workers, in the order in which they are counted.
    pub fn roles(&self) -> Vec<Role> {
        let of = |role, count| std::iter::repeat_n(role, count);
        of(Role::Prefill, self.prefill)
            .chain(of(Role::Decode, self.decode))
            .chain(of(Role::Both, self.both))
            .collect()
    }

    /// Step times that routers start from.
    pub(crate) fn believed(&self) -> StepModel {
        let mean = self.profile.step_model(1.0);
        let [a, b, c, d, e] = self.prior;
        StepModel {
            a_ms: mean.a_ms * a,
            b_ms: mean.b_ms * b,
            c_ms: mean.c_ms * c,
            d_ms: mean.d_ms * d,
            e_ms: mean.e_ms * e,
            ..mean
        }
    }
}
