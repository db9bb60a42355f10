//! KV blocks between workers: one copy on a host, TCP between hosts.

pub mod checksum;
mod error;
mod id;
mod pool;

pub use error::{PoolError, Refused};
pub use id::{Reason, TransferId};
pub use pool::{KvPool, PeerPool, PoolId};
