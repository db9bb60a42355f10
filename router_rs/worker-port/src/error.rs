//! What can go wrong on the worker's own side.

use std::io;

use crate::cache_log::CacheGap;

/// A call of the worker's process that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The address cannot be bound, or the thread not be started.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// `serve` was called twice, or after `close`; the same holds for what comes before it.
    #[error("the port serves already, or was closed")]
    Serves,
    /// Cache events that do not follow those before.
    #[error(transparent)]
    Gap(#[from] CacheGap),
    /// Columns of a step that do not fit each other.
    #[error("columns of a step: {0}")]
    Columns(&'static str),
}
