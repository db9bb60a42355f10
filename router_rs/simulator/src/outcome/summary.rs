//! The figures of a run.

use super::record::{Recorder, Row};
use super::timeline::{POINTS, role_name};
use super::unloaded::{Bounds, bounds};
use crate::engine::class_number;
use crate::settings::Settings;
use crate::trace::Trace;
use serde::Serialize;

/// Mean and quantiles.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Distribution {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// Nine in ten are not above it.
    pub p90: f64,
    /// 99 in 100 are not above it.
    pub p99: f64,
}

impl Distribution {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values.get(rank.max(1) - 1).copied().unwrap_or(0.0)
        };
        Self {
            mean: values.iter().sum::<f64>() / values.len().max(1) as f64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
        }
    }
}

/// How a pool was used between the first arrival that counts and the last.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PoolUse {
    /// prefill, decode or both.
    pub role: &'static str,
    /// Workers.
    pub workers: usize,
    /// Share of the time in which they ran steps.
    pub busy: f64,
    /// Streams a step.
    pub batch: f64,
    /// Share of the KV pool in use, without what is only cached.
    pub kv: f64,
}

/// First tokens as predicted at placement, against what was: shares of the
/// true time from arrival.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Prediction {
    /// Median of the absolute error.
    pub median: f64,
    /// 95 in 100 are not above it.
    pub p95: f64,
    /// Mean of the signed error: above 0 it was later than predicted.
    pub bias: f64,
}

/// A run in figures. All but the counts are of the requests that count.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The policy.
    pub policy: String,
    /// Requests of the trace.
    pub requests: usize,
    /// Requests that count.
    pub counted: usize,
    /// Were not admitted, or nobody could run them.
    pub rejected: usize,
    /// Never ended: a worker that could is gone.
    pub unfinished: usize,
    /// Time to first token, ms.
    pub ttft_ms: Distribution,
    /// Time between two tokens, ms.
    pub itl_ms: Distribution,
    /// From arrival to the last token, ms.
    pub end_to_end_ms: Distribution,
    /// First token over its unloaded time, at that length and without cache.
    pub slowdown: Distribution,
    /// First token above the no-wait floor of each, mean, ms.
    pub above_floor_ms: f64,
    /// Bounds that no placement gets below.
    pub bounds: Bounds,
    /// Share of the requests that were served within the targets.
    pub goodput_share: f64,
    /// Requests served within the targets a second.
    pub goodput_per_s: f64,
    /// And a second and GPU; 0 without GPUs.
    pub goodput_per_gpu_s: f64,
    /// Share of prompt tokens that were cached where they began.
    pub hit_rate: f64,
    /// And with an unbounded cache that all share: of blocks.
    pub ideal_hit_rate: f64,
    /// Requests that wait in routers, mean over time.
    pub queued_mean: f64,
    /// And at most.
    pub queued_most: usize,
    /// Pools.
    pub pools: Vec<PoolUse>,
    /// How good predictions were.
    pub prediction: Prediction,
    /// Streams and prompts that came back to their routers.
    pub returned: u64,
    /// Hand-offs that decode workers had no room for.
    pub refused: u64,
    /// Arrivals a second.
    pub arrivals_per_s: f64,
    /// Length of the replay, s.
    pub duration_s: f64,
    /// Engine steps.
    pub steps: u64,
}

pub(super) fn summarise(
    recorder: &Recorder,
    settings: &Settings,
    trace: &Trace,
    floors: &[f64],
) -> Summary {
    let counted = &recorder.rows[recorder.first..];
    let served: Vec<&Row> = counted.iter().filter(|row| !row.end_ms.is_nan()).collect();
    let of =
        |value: &dyn Fn(&Row) -> f64| -> Vec<f64> { served.iter().map(|row| value(row)).collect() };
    let unloaded = |row: &Row| recorder.unloaded.ttft_ms(0, row.prompt);
    let good = served
        .iter()
        .filter(|row| {
            let class = class_number(trace.requests[row.request as usize].class);
            row.ttft_ms() <= settings.slo.ttft_factor * unloaded(row)
                && row.itl_ms() <= settings.slo.itl_ms[class]
        })
        .count();
    let span_s = ((recorder.until_ms - recorder.from_ms) / 1e3).max(1e-9);
    let per_s = good as f64 / span_s;
    // Decode workers compute prompts, too, where that is sooner.
    let workers = settings.prefill + settings.both + settings.decode;
    let gpus = workers as f64 * f64::from(settings.profile.gpus);
    let tokens = |value: &dyn Fn(&Row) -> u32| -> u64 {
        served.iter().map(|row| u64::from(value(row))).sum()
    };
    let above = of(&|row| row.ttft_ms() - floors[row.request as usize]);
    let (gaps, served_count) = (&recorder.gaps, served.len());
    Summary {
        policy: name(settings),
        requests: recorder.rows.len(),
        counted: counted.len(),
        rejected: recorder.rows.iter().filter(|row| row.rejected).count(),
        unfinished: recorder.open().len(),
        ttft_ms: Distribution::of(of(&Row::ttft_ms)),
        itl_ms: Distribution {
            mean: gaps.mean(),
            p50: gaps.quantile(0.5),
            p90: gaps.quantile(0.9),
            p99: gaps.quantile(0.99),
        },
        end_to_end_ms: Distribution::of(of(&Row::end_to_end_ms)),
        slowdown: Distribution::of(of(&|row| row.ttft_ms() / unloaded(row))),
        above_floor_ms: above.iter().sum::<f64>() / served_count.max(1) as f64,
        bounds: bounds(
            trace,
            &recorder.unloaded,
            workers,
            settings.speed,
            recorder.first,
        ),
        goodput_share: good as f64 / counted.len().max(1) as f64,
        goodput_per_s: per_s,
        goodput_per_gpu_s: if gpus > 0.0 { per_s / gpus } else { 0.0 },
        hit_rate: tokens(&|row| row.cached) as f64 / tokens(&|row| row.prompt).max(1) as f64,
        ideal_hit_rate: trace.ideal_hit_share(),
        queued_mean: recorder.queue_ms / (span_s * 1e3),
        queued_most: recorder.queue_most,
        pools: pools(recorder),
        prediction: prediction(&served),
        returned: recorder.returned,
        refused: recorder.refused,
        arrivals_per_s: counted.len() as f64 / span_s,
        duration_s: recorder.ends_ms / 1e3,
        steps: recorder.steps,
    }
}

fn name(settings: &Settings) -> String {
    let value = serde_json::to_value(&settings.policy).unwrap_or_default();
    value["name"].as_str().unwrap_or_default().to_owned()
}

fn pools(recorder: &Recorder) -> Vec<PoolUse> {
    let first = ((recorder.from_ms / recorder.span_ms).ceil() as usize).min(POINTS - 1);
    let of = |pool: &super::timeline::PoolSums| {
        let (busy, batch, kv) = pool.means(first..POINTS, recorder.span_ms);
        PoolUse {
            role: role_name(pool.role),
            workers: pool.workers,
            busy,
            batch,
            kv,
        }
    };
    recorder.pools.iter().map(of).collect()
}

fn prediction(served: &[&Row]) -> Prediction {
    let errors: Vec<f64> = served
        .iter()
        .map(|row| (row.first_ms - row.predicted_ms) / row.ttft_ms())
        .filter(|error| error.is_finite())
        .collect();
    let bias = errors.iter().sum::<f64>() / errors.len().max(1) as f64;
    let mut sizes: Vec<f64> = errors.iter().map(|error| error.abs()).collect();
    sizes.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let rank = (share * sizes.len() as f64).ceil() as usize;
        sizes.get(rank.max(1) - 1).copied().unwrap_or(0.0)
    };
    Prediction {
        median: at(0.5),
        p95: at(0.95),
        bias,
    }
}
