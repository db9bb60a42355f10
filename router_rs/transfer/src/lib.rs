//! KV blocks between workers: one copy on a host, TCP between hosts.
//!
//! Reading order: `pool` (where blocks lie; `mapping`, `huge_pages`), `checksum` (copy and hash in one
//! pass), `sender` and `receiver` (the rules, pure), `node` (the face), `drive`
//! (does what the rules say), `peers` (threads), `greeting` (how they meet), `incoming` (what peers say),
//! `connection`, `socket`, `secured` and `attach` (bytes, TLS and descriptors).

mod attach;
pub mod checksum;
mod connection;
mod drive;
mod error;
mod event;
mod frame;
mod gate;
mod greeting;
mod huge_pages;
mod id;
mod incoming;
mod jobs;
mod mapping;
mod node;
mod peers;
mod pool;
pub mod receiver;
mod secured;
pub mod sender;
mod settings;
mod socket;
mod state;
mod timer;

pub use crate::state::{Figures, Residue};
pub use error::{PoolError, Refused};
pub use event::Event;
pub use huge_pages::HugeUse;
pub use id::{Reason, TransferId};
pub use node::{PullRequest, TransferNode, check_logprobs};
pub use pool::{KvPool, PeerPool, PoolId};
pub use settings::{PeerTls, Proof, Settings};
pub use timer::Timer;
