//! Sockets, inbound services, telemetry; drives session, scheduler and text.
//!
//! ```text
//! serve (accept, protocol, paths) ─▶ door (limits, text, values) ─▶ mesh (workers)
//!   │  │ ▲ bodies                                                    │
//!   │  │ └──────────────── GenerationStream ◀───────────────────────┘
//!   │  ├─▶ openai (HTTP and JSON: the same requests, the same streams)
//!   │  └─▶ vllm (gRPC as vLLM has it: the same again)
//!   └──▶ access (whose call, how much of it)
//! ```
//!
//! [`Router::start`] takes [`Settings`] to a router that serves, [`run`] to its
//! end.
#![forbid(unsafe_code)]

mod access;
mod door;
pub mod error;
pub mod mesh;
mod openai;
pub mod request;
mod run;
mod serve;
pub mod settings;
mod telemetry;
mod vllm;

pub use run::{Router, StartError, run};
pub use settings::Settings;
pub use telemetry::init_logging;
pub use tokio_util::sync::CancellationToken;
