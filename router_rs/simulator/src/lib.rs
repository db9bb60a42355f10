//! Discrete-event replay of traces over the index and the scheduler that serve.
//!
//! Truth and belief are two things (SCHEDULING 5). `engine` is the truth: it
//! steps with coefficients and noise that no scheduler sees. `router` is the
//! belief: `kvmesh-kv-index` and `kvmesh-scheduler`, fed by reports as in
//! life. `simulation` lets them exchange messages; `outcome` counts.
//!
//! Pure: a trace and settings with a seed come in, figures go out. Equal
//! arguments give equal results, to the byte.
#![forbid(unsafe_code)]

mod clairvoyant;
mod engine;
mod events;
mod histogram;
mod links;
mod outcome;
mod policies;
mod profile;
mod replay;
mod router;
mod seed;
mod settings;
mod simulation;
pub mod trace;
mod weighted;

pub use histogram::Histogram;
pub use outcome::{
    Bounds, Distribution, FlipRow, PoolUse, Prediction, Row, Run, Summary, Timeline, Unloaded,
    bounds,
};
pub use profile::{Coefficients, Profile, Transfer};
pub use replay::{Replay, ReplayError, Source, replay_json};
pub use seed::Seeded;
pub use settings::{
    Failure, LocalPrefill, Noise, Order, PlannerNumbers, PolicySettings, QueueSettings, Settings,
    Slo,
};
pub use simulation::{SimulationError, simulate};
