//! Where a request runs: cost in milliseconds, queue, admission.
//!
//! Pure: state and time come in as arguments, decisions go out. The gateway,
//! the simulator and the tests run this same code. Times are milliseconds on
//! a clock of the caller's choice.
//!
//! The way of a request: [`admit`] → [`Queue`] → [`Policy::choose`] over a
//! [`Cluster`] of [`WorkerView`]s → [`Bookings::book`] for each stage of the
//! [`Plan`].
#![forbid(unsafe_code)]

mod admission;
mod booking;
mod cost;
mod deadline;
mod fit;
mod fixed;
mod learn;
mod lengths;
mod plan;
mod queue;
mod request;
mod step_model;
mod terms;
mod worker;

pub use admission::{Admission, AdmissionSettings, Rejected, admit};
pub use booking::{Booking, Bookings, Work};
pub use cost::{CostSettings, KvCost, LocalPrefill};
pub use deadline::{ClassTargets, Targets, virtual_deadline_ms};
pub use fixed::{FixedPolicy, Rule};
pub use learn::{Learner, StepSample};
pub use lengths::OutputLengths;
pub use plan::{Considered, Decision, Feature, NoPlan, Plan, Policy, Terms};
pub use queue::{Queue, Ticket};
pub use request::{Class, Needs, RequestView};
pub use step_model::StepModel;
pub use worker::{Abilities, Cluster, KvRoom, Load, Phase, Role, Share, WorkerView};
