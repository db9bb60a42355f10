//! A worker's gRPC port.
//!
//! It serves `kvmesh.v1.Worker`, health and reflection on one thread of its own.
//! An engine says what each step brought ([`Port::step`]), by columns; from there
//! on nothing of a token needs the process that runs the engine:
//!
//! ```text
//! engine ─step─▶ [lanes of each session] ─▶ routers
//! host ◀─events─ [what routers ask]      ◀─ routers
//! ```
//!
//! The host (Python) takes [`Event`]s at its own pace and is never called from
//! here, so no thread of ours waits for an interpreter. A session's sending side
//! is three lanes (lanes.rs), all state lies behind one lock that is held for
//! microseconds and never across an await.
#![forbid(unsafe_code)]

mod attempt;
mod cache_log;
mod command;
mod ends;
mod error;
mod event;
mod frames;
mod guard;
mod health;
mod incoming;
mod kept;
mod lanes;
mod load;
mod passed;
mod port;
mod replay;
mod report;
mod server;
mod service;
mod session;
mod settings;
mod shared;
mod snapshot;
mod state;
mod tokenizer;

pub use attempt::AttemptId;
pub use cache_log::{CacheGap, Change};
pub use ends::AttemptEnd;
pub use error::PortError;
pub use event::Event;
pub use port::Port;
pub use report::{EngineLoad, Part, Report, Rows};
pub use settings::Settings;
pub use tokenizer::TokenizerFiles;
