//! What the mesh counts, for `/metrics`. Plain atomics: read at any time,
//! written without a label lookup on the data path.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use kvmesh_session::generation::{Cause, Loss, Plan};
use kvmesh_wire::v1;

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

/// A time that grows, or whose longest value is kept: whole microseconds inside,
/// seconds outside.
#[derive(Debug, Default)]
pub struct Seconds(AtomicU64);

impl Seconds {
    /// Its value now, in seconds.
    #[must_use]
    pub fn get(&self) -> f64 {
        self.0.load(Ordering::Relaxed) as f64 / 1e6
    }

    /// Adds a time.
    fn add(&self, time: Duration) {
        self.0.fetch_add(micros(time), Ordering::Relaxed);
    }

    /// Raises it to a time where it is lower.
    fn raise(&self, time: Duration) {
        self.0.fetch_max(micros(time), Ordering::Relaxed);
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
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

/// Upper bounds of [`Ratios`].
const RATIO_BOUNDS: [f64; 12] = [
    0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0, 2.0, 5.0,
];

/// How far predictions are off: |predicted / measured - 1|.
#[derive(Debug, Default)]
pub struct Ratios {
    counts: [AtomicU64; RATIO_BOUNDS.len() + 1],
    sum_millionths: AtomicU64,
}

impl Ratios {
    /// Nothing is counted where nothing was measured.
    fn observe(&self, predicted: f64, measured: f64) {
        let ratio = (predicted / measured - 1.0).abs();
        if !ratio.is_finite() || measured <= 0.0 {
            return;
        }
        let bucket = RATIO_BOUNDS.partition_point(|bound| *bound < ratio);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        let millionths = (ratio * 1e6).min(1e15) as u64;
        self.sum_millionths.fetch_add(millionths, Ordering::Relaxed);
    }

    /// Sum, number, and (bound, count) of each bucket.
    #[must_use]
    pub fn read(&self) -> (f64, u64, Vec<(f64, u64)>) {
        let bounds = RATIO_BOUNDS.into_iter().chain([f64::INFINITY]);
        let counts = self.counts.iter().map(|n| n.load(Ordering::Relaxed));
        let buckets: Vec<_> = bounds.zip(counts).collect();
        let all = buckets.iter().map(|(_, count)| count).sum();
        let sum = self.sum_millionths.load(Ordering::Relaxed) as f64 / 1e6;
        (sum, all, buckets)
    }
}

/// Counters of the whole mesh.
#[derive(Debug, Default)]
pub struct Counters {
    /// Generations that have not ended.
    pub open_streams: Gauge,
    /// Attempts made.
    pub attempts: Count,
    /// Plans with prompt and output on one worker.
    pub plans_whole: Count,
    /// Plans with prompt and output on two.
    pub plans_split: Count,
    /// Time from a request for a plan to its booking.
    pub decide: Seconds,
    /// How far predicted first tokens were off.
    pub ttft_errors: Ratios,
    /// The same of computing prompts alone.
    pub prefill_errors: Ratios,
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
    /// Hand-offs of engines that crossed a cancel, and were given to decode to be
    /// dropped there (`kvmesh_hand_offs_dropped_total`).
    pub hand_offs_dropped: Count,
    /// Bytes of KV that workers said they received.
    pub transferred_bytes: Count,
    /// Token ids kept for clients that have not taken them yet.
    pub undelivered_ids: Gauge,
    /// Tokens taken from workers.
    pub tokens: Count,
    /// Messages with tokens handed to clients' streams.
    pub token_messages: Count,
    /// New attempts after a failure, by cause.
    pub migrations: Migrations,
    /// Streams handed over, with their KV, by workers that are left.
    pub hand_overs: HandOvers,
    /// Prompt and output tokens that later attempts computed.
    pub recomputed_tokens: Count,
    /// Generations that went on within their attempt after a broken session.
    pub reattached: Count,
    /// Streams that went on after a failure: how many, and the sum of their
    /// gaps, from the last token before it to the first after it.
    pub moved_gaps: Count,
    /// That sum.
    pub moved_gap: Seconds,
    /// The longest of these gaps.
    pub longest_moved_gap: Seconds,
    /// Workers ejected since their answers failed.
    pub ejections: Count,
    /// Requests of which workers died.
    pub quarantined: Count,
    /// Generations that clients took up again.
    pub resumed: Resumed,
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
    /// Panics of sessions' tasks: bugs of ours, each of which cost a worker's
    /// streams their session.
    pub session_panics: Count,
    /// Panics of the mesh's other tasks: timers, sweep, the list of workers, looks
    /// at the queue.
    pub task_panics: Count,
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

/// New attempts by why there was a need of one. Refusals are none.
#[derive(Debug, Default)]
pub struct Migrations {
    /// The worker's process ended.
    pub died: Count,
    /// Its session broke, and it did not come back with the stream.
    pub broken: Count,
    /// It was silent, or its step did not end.
    pub silent: Count,
    /// The attempt failed there, or its transfer.
    pub failed: Count,
    /// It gave the stream back.
    pub returned: Count,
    /// Claimed from another router, and no attempt could be gone on with.
    pub claimed: Count,
}

/// Generations that clients took up again, by how.
#[derive(Debug, Default)]
pub struct Resumed {
    /// This router had it still.
    pub here: Count,
    /// Claimed from another router, with the attempt that runs.
    pub running: Count,
    /// Claimed, and gone on from by a new attempt.
    pub anew: Count,
    /// Nobody had it, for this tenant and from where its client was.
    pub unknown: Count,
}

impl Resumed {
    /// Each with its label.
    #[must_use]
    pub fn by_outcome(&self) -> [(&'static str, u64); 4] {
        [
            ("here", self.here.get()),
            ("running", self.running.get()),
            ("anew", self.anew.get()),
            ("unknown", self.unknown.get()),
        ]
    }
}

/// Hand-overs of running streams.
#[derive(Debug, Default)]
pub struct HandOvers {
    /// A target was asked for room.
    pub begun: Count,
    /// The stream went on there.
    pub done: Count,
    /// It went on where it was.
    pub failed: Count,
}

impl Migrations {
    /// Each with its label.
    #[must_use]
    pub fn by_cause(&self) -> [(&'static str, u64); 6] {
        [
            ("died", self.died.get()),
            ("broken", self.broken.get()),
            ("silent", self.silent.get()),
            ("failed", self.failed.get()),
            ("returned", self.returned.get()),
            ("claimed", self.claimed.get()),
        ]
    }
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

impl Counters {
    /// A new attempt is needed.
    pub(super) fn migrates(&self, cause: Cause) {
        let of = &self.migrations;
        match cause {
            Cause::Start | Cause::Refused(_) => return,
            Cause::Lost(Loss::Died) => &of.died,
            Cause::Lost(Loss::Broken) => &of.broken,
            Cause::Lost(Loss::Silent) => &of.silent,
            Cause::Failed => &of.failed,
            Cause::Returned => &of.returned,
            Cause::Claimed => &of.claimed,
        }
        .add(1);
    }

    /// A stream goes on after a failure.
    pub(super) fn moved(&self, gap: Duration) {
        self.moved_gaps.add(1);
        self.moved_gap.add(gap);
        self.longest_moved_gap.raise(gap);
    }

    /// A plan was made.
    pub(super) fn decided(&self, plan: &Plan, took: Duration) {
        match plan {
            Plan::Whole { .. } => self.plans_whole.add(1),
            Plan::Mesh { .. } | Plan::Engine { .. } => self.plans_split.add(1),
        }
        self.decide.add(took);
    }

    /// A first token came that was predicted.
    pub(super) fn predicted(&self, predicted: &v1::PhaseTimes, actual: &v1::PhaseTimes) {
        self.ttft_errors.observe(predicted.ttft_ms, actual.ttft_ms);
        self.prefill_errors
            .observe(predicted.prefill_ms, actual.prefill_ms);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_told_in_seconds() {
        let counters = Counters::default();
        counters.moved(Duration::from_millis(1_500));
        counters.moved(Duration::from_millis(250));
        assert_eq!(counters.moved_gaps.get(), 2);
        assert_eq!(counters.moved_gap.get(), 1.75);
        assert_eq!(counters.longest_moved_gap.get(), 1.5);
    }

    #[test]
    fn errors_are_relative_to_what_was_measured() {
        let ratios = Ratios::default();
        ratios.observe(110.0, 100.0);
        ratios.observe(50.0, 100.0);
        ratios.observe(1.0, 0.0);
        let (sum, count, buckets) = ratios.read();
        assert_eq!(count, 2);
        assert!((sum - 0.6).abs() < 1e-5, "{sum}");
        let at = |bound: f64| buckets.iter().find(|(b, _)| *b == bound).map(|(_, n)| *n);
        assert_eq!((at(0.15), at(0.6)), (Some(1), Some(1)));
    }
}
