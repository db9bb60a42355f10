//! What the mesh counts, for `/metrics`. Plain atomics: read at any time,
//! written without a label lookup on the data path.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Its value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds `n`.
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Takes `n` away.
    pub(super) fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }
}

/// A number that only goes up.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Its value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds `n`.
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
}

/// Counters of the whole mesh.
#[derive(Debug, Default)]
pub struct Counters {
    /// Generations that have not ended.
    pub open_streams: Gauge,
    /// Attempts made.
    pub attempts: Count,
    /// Placements sent.
    pub placements: Count,
    /// Placements refused by workers.
    pub refusals: Count,
    /// Rows of tokens and answers of attempts that were over
    /// (`kvmesh_stale_frames_total`).
    pub stale_frames: Count,
    /// Mesh hand-offs begun.
    pub transfers_started: Count,
    /// Hand-offs that failed.
    pub transfers_failed: Count,
    /// Bytes of KV that workers said they received.
    pub transferred_bytes: Count,
    /// Token ids kept for clients that have not taken them yet.
    pub undelivered_ids: Gauge,
    /// Tokens taken from workers.
    pub tokens: Count,
    /// Messages with tokens handed to clients' streams.
    pub token_messages: Count,
    /// Generations that ended well.
    pub finished: Count,
    /// Generations that their client left.
    pub cancelled: Count,
    /// Generations that ended with an error.
    pub failed: Count,
    /// Streams ended since their client read nothing.
    pub slow_clients: Count,
    /// Sessions closed since a worker broke the protocol.
    pub violations: Count,
    /// Frames on the step lane.
    pub step_frames: Count,
    /// Bytes on the step lane, as encoded.
    pub step_bytes: Count,
    /// Frames on the load lane.
    pub load_frames: Count,
    /// Bytes on the load lane, as encoded.
    pub load_bytes: Count,
    /// Frames on the cache lane.
    pub cache_frames: Count,
    /// Bytes on the cache lane, as encoded.
    pub cache_bytes: Count,
    /// Cache events that were dropped: of a kind that is not known here.
    pub cache_events_dropped: Count,
    /// Tokeniser downloads begun.
    pub tokenizer_fetches: Count,
    /// Tokeniser downloads that failed.
    pub tokenizer_failures: Count,
}

/// Attempts and their mesh transfers, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttemptCounts {
    /// Attempts that run.
    pub open: u64,
    /// Transfers whose decode worker has not answered.
    pub placed: u64,
    /// Transfers with room at decode whose prefill worker has not answered.
    pub reserved: u64,
    /// Transfers whose prompt is being computed.
    pub flowing: u64,
    /// Transfers that prefill has handed off.
    pub committed: u64,
}

/// Sessions by state, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionCounts {
    /// No connection.
    pub connecting: u64,
    /// Work.
    pub live: u64,
    /// Silent or stuck for too long: no new placements.
    pub suspect: u64,
    /// Given up.
    pub lost: u64,
    /// Back, on probation.
    pub half_open: u64,
    /// Refused: protocol, model or identity.
    pub refused: u64,
}
