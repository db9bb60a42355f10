//! Whether etcd can be reached, for metrics.

use std::time::Instant;

/// Whether etcd can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// The last call was answered.
    pub connected: bool,
    /// Since when that is so.
    pub since: Instant,
    /// Lists that were made: one when a watch starts, one whenever it broke.
    pub lists: u64,
    /// Watches that broke.
    pub watch_breaks: u64,
}
