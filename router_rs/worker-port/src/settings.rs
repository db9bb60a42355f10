//! Bounds of a port.

use std::{sync::Arc, time::Duration};

use kvmesh_trust::{ClusterToken, Followed, PeerTls};

/// Bounds of a port. Meanings as in the settings of a worker.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Step output that may wait for one router, bytes; beyond it the session is closed.
    pub step_lane_bytes: usize,
    /// Age that waiting step output may reach; beyond it the session is closed.
    pub step_lane_age: Duration,
    /// Step output that was sent and is kept for a router that may come back,
    /// bytes. What it wants from before that is unknown, and computed anew.
    pub replay_bytes: usize,
    /// How long the attempts of a router whose session broke are kept, what has ended for
    /// routers that resume it, and which owners are over.
    pub orphan_ttl: Duration,
    /// What is kept of generations for routers that resume them, bytes. Beyond it those go
    /// that ended first, then the newest.
    pub resume_bytes: usize,
    /// Cache events kept for routers that come back.
    pub cache_ring_events: u64,
    /// Longest time that cache events wait for others.
    pub cache_coalesce: Duration,
    /// Shortest time between two frames of a snapshot.
    pub snapshot_interval: Duration,
    /// Longest time between two load reports.
    pub load_interval: Duration,
    /// Shortest time between two load reports.
    pub load_coalesce: Duration,
    /// How often a router's connection is pinged.
    pub keep_alive_interval: Duration,
    /// A connection that answers no ping for this long is closed.
    pub keep_alive_timeout: Duration,
    /// Time for running work after a `Drain` that names none.
    pub grace: Duration,
    /// Tell the process of every attempt's end; else only of those that went wrong.
    pub tell_all_ends: bool,
    /// What calls of `kvmesh.v1.Worker` have to show. `None`: nothing.
    pub token: Option<Arc<Followed<ClusterToken>>>,
    /// TLS, and who may call by certificate. `None`: plain text, and anybody.
    pub tls: Option<Arc<PeerTls>>,
    /// How much later than it was true each load report goes. For trials of what
    /// late news costs.
    pub load_delay: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            step_lane_bytes: 8 << 20,
            step_lane_age: Duration::from_secs(10),
            replay_bytes: 4 << 20,
            orphan_ttl: Duration::from_secs(10),
            resume_bytes: 64 << 20,
            cache_ring_events: 65_536,
            cache_coalesce: Duration::from_millis(20),
            snapshot_interval: Duration::from_millis(5),
            load_interval: Duration::from_millis(250),
            load_coalesce: Duration::from_millis(5),
            keep_alive_interval: Duration::from_secs(10),
            keep_alive_timeout: Duration::from_secs(10),
            grace: Duration::from_secs(30),
            tell_all_ends: false,
            token: None,
            tls: None,
            load_delay: Duration::ZERO,
        }
    }
}
