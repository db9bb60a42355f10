//! Errors of pools and nodes.

use std::io;

use crate::id::Reason;

/// Why a pool could not be made or a peer's could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// A size is zero or too large for this machine's address space.
    #[error("{blocks} blocks of {block_bytes} bytes cannot be mapped")]
    Size {
        /// Slots asked for.
        blocks: u64,
        /// Bytes a slot.
        block_bytes: u64,
    },
    /// There is no such slot.
    #[error("slot {slot} of a pool of {blocks}")]
    Slot {
        /// The slot asked for.
        slot: u32,
        /// Slots that there are.
        blocks: u32,
    },
    /// The descriptor is no pool, lacks a seal, or is another pool than named.
    #[error("not the pool that was named: {0}")]
    Foreign(&'static str),
    /// The other end of the socket belongs to another user.
    #[error("peer has uid {0}")]
    Uid(u32),
    /// The kernel refused.
    #[error("{what}: {source}")]
    Os {
        /// The call.
        what: &'static str,
        /// Its error.
        source: io::Error,
    },
}

impl PoolError {
    /// The last error of the kernel, from the call `what`.
    pub(crate) fn os(what: &'static str) -> Self {
        Self::Os {
            what,
            source: io::Error::last_os_error(),
        }
    }
}

/// A call about a transfer that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// Kind of refusal, as on the wire.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

impl Refused {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }
}
