//! Notes of a run while it goes.

use super::summary::summarise;
use super::timeline::{FlipRow, POINTS, PoolSums, Timeline, role_name};
use super::unloaded::{Unloaded, floors_ms};
use super::{Run, Summary};
use crate::engine::Engine;
use crate::histogram::Histogram;
use crate::settings::Settings;
use crate::trace::Trace;
use kvmesh_scheduler::planner::{Flip, Outlook};
use kvmesh_scheduler::{Role, StepSample};
use serde::Serialize;

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Row {
    /// Its number in the trace.
    pub request: u32,
    /// Arrival, ms.
    pub arrival_ms: f64,
    /// When it was placed last, ms; NaN: never.
    #[serde(skip)]
    pub(crate) placed_ms: f64,
    /// First token, ms of the replay; NaN: none.
    pub first_ms: f64,
    /// Last token, ms of the replay; NaN: none.
    pub end_ms: f64,
    /// First token as predicted at its placement, ms of the replay.
    pub predicted_ms: f64,
    /// Prompt tokens.
    pub prompt: u32,
    /// Output tokens.
    pub output: u32,
    /// Prompt tokens that were cached when it began.
    pub cached: u32,
    /// Worker that computed its prompt.
    pub prefill: u32,
    /// Worker that made its output.
    pub decode: u32,
    /// Was not admitted, or nobody could run it.
    #[serde(skip)]
    pub(crate) rejected: bool,
}

impl Row {
    pub(crate) fn ttft_ms(&self) -> f64 {
        self.first_ms - self.arrival_ms
    }

    pub(crate) fn end_to_end_ms(&self) -> f64 {
        self.end_ms - self.arrival_ms
    }

    /// Mean time between its tokens; 0 of one token.
    pub(crate) fn itl_ms(&self) -> f64 {
        (self.end_ms - self.first_ms) / f64::from(self.output.saturating_sub(1).max(1))
    }
}

/// Takes notes.
#[derive(Debug)]
pub(crate) struct Recorder {
    pub(crate) rows: Vec<Row>,
    pub(crate) first: usize,
    pub(crate) gaps: Histogram,
    pub(crate) unloaded: Unloaded,
    pub(crate) pools: Vec<PoolSums>,
    pub(crate) span_ms: f64,
    pub(crate) from_ms: f64,
    pub(crate) until_ms: f64,
    pub(crate) queued: Vec<u32>,
    /// Integral of the queue's length over the counted time.
    pub(crate) queue_ms: f64,
    last_queue: (f64, usize),
    pub(crate) queue_most: usize,
    pub(crate) returned: u64,
    pub(crate) refused: u64,
    pub(crate) ends_ms: f64,
    pub(crate) steps: u64,
    flips: Vec<FlipRow>,
    report_ms: f64,
}

impl Recorder {
    pub(crate) fn new(settings: &Settings, trace: &Trace, unloaded: Unloaded) -> Self {
        let count = trace.requests.len();
        let first = (count as f64 * settings.warm_up).round() as usize;
        let arrival = |at: usize| {
            let request = trace.requests.get(at).or(trace.requests.last());
            request.map_or(0.0, |request| request.arrival_ms / settings.speed)
        };
        let until_ms = arrival(count);
        let rows = trace.requests.iter().enumerate().map(|(at, request)| Row {
            request: at as u32,
            arrival_ms: request.arrival_ms / settings.speed,
            placed_ms: f64::NAN,
            first_ms: f64::NAN,
            end_ms: f64::NAN,
            predicted_ms: f64::NAN,
            prompt: request.prompt,
            output: request.output,
            cached: 0,
            prefill: 0,
            decode: 0,
            rejected: false,
        });
        let pools = [
            (Role::Prefill, settings.prefill),
            (Role::Decode, settings.decode),
            (Role::Both, settings.both),
        ];
        Self {
            rows: rows.collect(),
            first,
            gaps: Histogram::default(),
            unloaded,
            pools: pools
                .into_iter()
                .filter(|(_, workers)| *workers > 0)
                .map(|(role, workers)| PoolSums::new(role, workers))
                .collect(),
            span_ms: (until_ms / POINTS as f64).max(1.0),
            from_ms: arrival(first),
            until_ms,
            queued: vec![0; POINTS],
            queue_ms: 0.0,
            last_queue: (0.0, 0),
            queue_most: 0,
            returned: 0,
            refused: 0,
            ends_ms: 0.0,
            steps: 0,
            flips: Vec::new(),
            report_ms: settings.noise.report_ms,
        }
    }

    fn row(&mut self, request: u32) -> &mut Row {
        &mut self.rows[request as usize]
    }

    pub(crate) fn rejected(&mut self, request: u32) {
        self.row(request).rejected = true;
    }

    pub(crate) fn placed(
        &mut self,
        request: u32,
        now_ms: f64,
        ttft_ms: f64,
        prefill: u32,
        decode: u32,
    ) {
        let row = self.row(request);
        row.placed_ms = now_ms;
        if row.first_ms.is_nan() {
            row.predicted_ms = now_ms + ttft_ms;
        }
        (row.prefill, row.decode) = (prefill, decode);
    }

    pub(crate) fn started(&mut self, request: u32, cached: u32) {
        let row = self.row(request);
        if row.first_ms.is_nan() {
            row.cached = cached.min(row.prompt);
        }
    }

    /// A frame with a token takes as long as a report.
    pub(crate) fn token(&mut self, request: u32, now_ms: f64) {
        let at_ms = now_ms + self.report_ms;
        let row = self.row(request);
        if row.first_ms.is_nan() {
            row.first_ms = at_ms;
        }
    }

    pub(crate) fn finished(&mut self, request: u32, now_ms: f64) {
        self.ends_ms = now_ms;
        let at_ms = now_ms + self.report_ms;
        self.row(request).end_ms = at_ms;
    }

    pub(crate) fn returned(&mut self) {
        self.returned += 1;
    }

    pub(crate) fn refused(&mut self) {
        self.refused += 1;
    }

    /// A time between two tokens of so many streams.
    pub(crate) fn gap(&mut self, now_ms: f64, ms: f64, count: u32) {
        if now_ms >= self.from_ms {
            self.gaps.add(ms, count);
        }
    }

    pub(crate) fn queued(&mut self, now_ms: f64, waiting: usize) {
        let (then_ms, before) = self.last_queue;
        let from = then_ms.max(self.from_ms);
        let until = now_ms.min(self.until_ms);
        self.queue_ms += before as f64 * (until - from).max(0.0);
        self.last_queue = (now_ms, waiting);
        if now_ms >= self.from_ms {
            self.queue_most = self.queue_most.max(waiting);
        }
        let point = (now_ms / self.span_ms) as usize;
        if let Some(most) = self.queued.get_mut(point) {
            *most = (*most).max(u32::try_from(waiting).unwrap_or(u32::MAX));
        }
    }

    /// A worker changes its role.
    pub(crate) fn flips(&mut self, now_ms: f64, flip: &Flip, before: &Outlook) {
        if !self.pools.iter().any(|pool| pool.role == flip.to) {
            // Of such workers there were none at the beginning.
            self.pools.push(PoolSums::new(flip.to, 0));
        }
        for (role, workers) in [(flip.from, -1.0), (flip.to, 1.0)] {
            let pool = self.pools.iter_mut().find(|pool| pool.role == role);
            if let Some(pool) = pool {
                pool.moves(now_ms, self.span_ms, workers);
            }
        }
        self.flips.push(FlipRow {
            at_ms: now_ms,
            worker: flip.worker.0,
            from: role_name(flip.from),
            to: role_name(flip.to),
            prefill_pressure: before.prefill_pressure,
            decode_pressure: before.decode_pressure,
        });
    }

    pub(crate) fn step(&mut self, now_ms: f64, sample: &StepSample, engine: &Engine) {
        self.steps += 1;
        let point = (now_ms / self.span_ms) as usize;
        if point >= POINTS {
            return;
        }
        let kv = engine.pool().running() as f64 / engine.pool().total().max(1) as f64;
        let pool = self.pools.iter_mut().find(|pool| pool.role == engine.role);
        if let Some(pool) = pool {
            pool.step(point, sample.duration_ms, sample.decode_batch, kv);
        }
    }

    /// Requests that have not ended.
    pub(crate) fn open(&self) -> Vec<u32> {
        let open = |row: &&Row| row.end_ms.is_nan() && !row.rejected;
        self.rows
            .iter()
            .filter(open)
            .map(|row| row.request)
            .collect()
    }

    pub(crate) fn finish(self, settings: &Settings, trace: &Trace) -> Run {
        let floors = floors_ms(trace, &self.unloaded);
        let summary: Summary = summarise(&self, settings, trace, &floors);
        let timeline = self.timeline();
        let rows = if settings.rows {
            self.rows[self.first..].to_vec()
        } else {
            Vec::new()
        };
        Run {
            summary,
            timeline,
            flips: self.flips,
            rows,
        }
    }

    fn timeline(&self) -> Timeline {
        let mut sums = vec![(0.0, 0u32); POINTS];
        for row in self.rows.iter().filter(|row| !row.first_ms.is_nan()) {
            let point = ((row.arrival_ms / self.span_ms) as usize).min(POINTS - 1);
            sums[point].0 += row.ttft_ms();
            sums[point].1 += 1;
        }
        Timeline {
            span_ms: self.span_ms,
            queued: self.queued.clone(),
            busy: self
                .pools
                .iter()
                .map(|pool| pool.timeline(self.span_ms))
                .collect(),
            ttft_ms: sums
                .into_iter()
                .map(|(sum, count)| sum / f64::from(count.max(1)))
                .collect(),
        }
    }
}
