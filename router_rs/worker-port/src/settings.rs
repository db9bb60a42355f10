//! Bounds of a port.

use std::time::Duration;

/// Bounds of a port. Meanings as in the settings of a worker.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Step output that may wait for one router, bytes; beyond it the session is closed.
    pub step_lane_bytes: usize,
    /// Age that waiting step output may reach; beyond it the session is closed.
    pub step_lane_age: Duration,
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
    /// How much later than it was true each load report goes. For trials of what
    /// late news costs.
    pub load_delay: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            step_lane_bytes: 8 << 20,
            step_lane_age: Duration::from_secs(10),
            cache_ring_events: 65_536,
            cache_coalesce: Duration::from_millis(20),
            snapshot_interval: Duration::from_millis(5),
            load_interval: Duration::from_millis(250),
            load_coalesce: Duration::from_millis(5),
            load_delay: Duration::ZERO,
        }
    }
}
