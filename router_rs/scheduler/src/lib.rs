//! Where a request runs: cost in milliseconds, queue, admission.
//!
//! Pure: state and time come in as arguments, decisions go out. The gateway,
//! the simulator and the tests run this same code. Times are milliseconds on
//! a clock of the caller's choice.
//!
//! The way of a request: [`Dispatch::admit`] → [`Dispatch::arrives`] →
//! [`Policy::choose`] over a [`Cluster`] of [`WorkerView`]s →
//! [`DispatchSettings::judge`], which books each stage of the [`Plan`] or lets
//! the request wait for [`Dispatch::pass`].
#![forbid(unsafe_code)]

mod admission;
mod best;
mod booking;
mod chunk;
mod cost;
mod deadline;
mod dispatch;
mod facts;
mod fair;
mod fit;
mod fixed;
mod floor;
mod learn;
mod lengths;
mod plan;
pub mod planner;
mod queue;
mod relay;
mod request;
mod roster;
mod scored;
mod sides;
mod step_model;
mod survey;
mod terms;
mod transfer;
mod usual;
mod weigh;
mod worker;

pub use admission::{Admission, AdmissionSettings, Estimate, Rejected, admit};
pub use booking::{Booked, Booking, Bookings, Work};
pub use chunk::{ChunkBounds, OWN_STEP_SHARE, PREEMPTION_TARGET_MS, chunk_tokens, tokens_within};
pub use cost::{CostSettings, KvCost};
pub use deadline::{ClassTargets, Targets, virtual_deadline_ms};
pub use dispatch::{
    Admitted, Dispatch, DispatchSettings, Entry, Hold, Look, Next, Others, Outcome, Pass, Place,
    Reported, Turn, Verdict, may_run,
};
pub use fit::HEADROOM;
pub use fixed::{FixedPolicy, Rule};
pub use learn::{Learner, StepSample};
pub use lengths::OutputLengths;
pub use plan::{Considered, Decision, Feature, NoPlan, Plan, Policy, Terms};
pub use queue::{Lane, Queue, QueueSettings, Ticket};
pub use relay::{FirstToken, Relay};
pub use request::{Class, Needs, PerClass, RequestView};
pub use roster::Roster;
pub use scored::{Columns, ScoreError, ScoredPolicy, Scorer};
pub use step_model::{StepModel, prefill_context};
pub use survey::{LocalPrefill, placeable};
pub use transfer::{Path, TransferRate, TransferRates};
pub use usual::UsualStreams;
pub use worker::{
    Abilities, ByClass, Cluster, KvRoom, Load, Phase, Prompt, Reload, Role, Share, WorkerView,
};
