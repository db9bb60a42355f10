//! Who exists: workers and routers in etcd.
//!
//! etcd says who exists; a live session says who works. So nothing here is on
//! the way of a request, and losing etcd stops nothing: a table keeps what it
//! last saw, a registration comes back by itself.
//!
//! * [`Registry::register_worker`] and [`Registry::register_router`] hold a key
//!   under a lease until they are closed.
//! * [`Registry::watch_workers`] follows the workers of a cluster in a table
//!   that is exact whenever etcd can be reached.
//! * [`Registry::changes`] tells routers of each other's changes of workers.
//! * [`Registry::status`] says whether it can, and since when.
//!
//! Keys are those of PROTOCOLS 4, without a leading slash, so that etcd's own
//! gRPC resolvers find routers under `etcd:///kvmesh/v1/<cluster>/routers`.
#![forbid(unsafe_code)]

mod again;
mod backoff;
mod changes;
mod client;
mod error;
mod etcd;
mod keys;
mod probe;
mod record;
mod registration;
mod registry;
mod settings;
mod status;
mod table;
mod watch;

#[cfg(test)]
mod tests;

pub use changes::{Announced, Changes, WorkerChange};
pub use error::{RegistryError, SettingsError, WatchBreak};
pub use probe::{GetInfoProbe, Probe};
pub use record::{RecordError, RouterRecord, worker_from_json, worker_to_json};
pub use registration::{Registration, RegistrationState};
pub use registry::Registry;
pub use settings::{Credentials, Settings};
pub use status::Status;
pub use table::{RegisteredWorker, WorkerTable};
pub use watch::WorkerWatch;
