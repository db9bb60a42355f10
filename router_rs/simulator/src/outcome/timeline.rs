//! How a run went over time.

use kvmesh_scheduler::Role;
use serde::Serialize;

/// Points of a plot.
pub(crate) const POINTS: usize = 120;

/// Means over equal spans of the replay.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Timeline {
    /// Length of a span, ms.
    pub span_ms: f64,
    /// Most requests that waited in routers.
    pub queued: Vec<u32>,
    /// Share of the time in which workers ran steps, by pool.
    pub busy: Vec<PoolTimeline>,
    /// Mean time to first token of the requests that arrived, ms; 0: none.
    pub ttft_ms: Vec<f64>,
}

/// One pool over time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PoolTimeline {
    /// prefill, decode or both.
    pub role: &'static str,
    /// Share of the time in which its workers ran steps.
    pub busy: Vec<f64>,
    /// Streams a step, mean.
    pub batch: Vec<f64>,
    /// Share of the KV pool in use, mean over steps.
    pub kv: Vec<f64>,
}

/// A worker that changed its role.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FlipRow {
    /// When, ms of the replay.
    pub at_ms: f64,
    /// Which, counted prefill, decode, both, as at the beginning.
    pub worker: u32,
    /// Its role before ...
    pub from: &'static str,
    /// ... and after.
    pub to: &'static str,
    /// Pressure of the pools before: predicted over target, the worst class.
    pub prefill_pressure: f64,
    /// Of those that decode.
    pub decode_pressure: f64,
}

pub(crate) fn role_name(role: Role) -> &'static str {
    match role {
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Both => "both",
    }
}

/// Sums for [`PoolTimeline`].
#[derive(Debug, Clone)]
pub(crate) struct PoolSums {
    pub(crate) role: Role,
    pub(crate) workers: usize,
    busy_ms: Vec<f64>,
    /// Time of workers that came, less that of those that went.
    moved_ms: Vec<f64>,
    batch: Vec<f64>,
    kv: Vec<f64>,
    steps: Vec<f64>,
}

impl PoolSums {
    pub(crate) fn new(role: Role, workers: usize) -> Self {
        let zeros = vec![0.0; POINTS];
        Self {
            role,
            workers,
            busy_ms: zeros.clone(),
            moved_ms: zeros.clone(),
            batch: zeros.clone(),
            kv: zeros.clone(),
            steps: zeros,
        }
    }

    pub(crate) fn step(&mut self, point: usize, takes_ms: f64, batch: u32, kv: f64) {
        let point = point.min(POINTS - 1);
        self.busy_ms[point] += takes_ms;
        self.batch[point] += f64::from(batch);
        self.kv[point] += kv;
        self.steps[point] += 1.0;
    }

    /// From a time on it has so many workers more.
    pub(crate) fn moves(&mut self, now_ms: f64, span_ms: f64, workers: f64) {
        let first = (now_ms / span_ms) as usize;
        for (point, moved) in self.moved_ms.iter_mut().enumerate().skip(first) {
            let from_ms = now_ms.max(point as f64 * span_ms);
            *moved += workers * ((point + 1) as f64 * span_ms - from_ms);
        }
    }

    /// Over some points: busy share, streams a step, KV share.
    pub(crate) fn means(&self, points: std::ops::Range<usize>, span_ms: f64) -> (f64, f64, f64) {
        let sum = |values: &[f64]| values[points.clone()].iter().sum::<f64>();
        let steps = sum(&self.steps).max(1.0);
        let all_ms = span_ms * points.len() as f64 * self.workers as f64 + sum(&self.moved_ms);
        (
            sum(&self.busy_ms) / all_ms.max(1e-9),
            sum(&self.batch) / steps,
            sum(&self.kv) / steps,
        )
    }

    pub(crate) fn timeline(&self, span_ms: f64) -> PoolTimeline {
        let means: Vec<_> = (0..POINTS)
            .map(|point| self.means(point..point + 1, span_ms))
            .collect();
        PoolTimeline {
            role: role_name(self.role),
            busy: means.iter().map(|(busy, ..)| *busy).collect(),
            batch: means.iter().map(|(_, batch, _)| *batch).collect(),
            kv: means.iter().map(|(.., kv)| *kv).collect(),
        }
    }
}
