//! What would be without load: the yardstick of slowdown, and bounds below
//! which no placement gets.

use crate::profile::Profile;
use crate::trace::Trace;
use kvmesh_scheduler::ChunkBounds;
use serde::Serialize;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};

/// First tokens on an empty worker of mean speed.
#[derive(Debug, Clone)]
pub struct Unloaded {
    profile: Profile,
    chunk_ms: f64,
}

impl Unloaded {
    /// For workers of a profile.
    pub fn new(profile: &Profile) -> Self {
        let bounds = ChunkBounds {
            itl_target_ms: f64::INFINITY,
            layer_preemption: profile.layer_preemption,
            block_tokens: 16,
        };
        Self {
            profile: profile.clone(),
            chunk_ms: bounds.budget_ms(false, 0.0),
        }
    }

    /// Time to compute a prompt of which so much is cached, in the chunks in
    /// which an engine would, ms.
    pub fn ttft_ms(&self, cached: u32, prompt: u32) -> f64 {
        let step = self.profile.step_model(1.0);
        let (mut at, mut sum) = (f64::from(cached), 0.0);
        let end = f64::from(prompt.max(cached + 1));
        while at < end {
            let linear = step.b_ms + step.c_ms * (at + 0.5);
            let root = (linear * linear + 2.0 * step.c_ms * self.chunk_ms).sqrt();
            let within = 2.0 * self.chunk_ms / (linear + root);
            let within = if within.is_nan() {
                f64::INFINITY
            } else {
                within
            };
            let tokens = within
                .min(f64::from(step.saturating_chunk))
                .max(16.0)
                .floor()
                .min(end - at);
            sum += step.a_ms
                + step.b_ms * tokens
                + step.c_ms * (tokens * at + tokens * (tokens + 1.0) / 2.0);
            at += tokens;
        }
        sum
    }
}

/// Means below which no placement gets, ms.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Bounds {
    /// Every prompt at once on an empty worker, with every prefix that any
    /// earlier prompt had.
    pub no_wait_ms: f64,
    /// One queue before one server of the summed speed, every hit, and always
    /// the prompt that needs least (SRPT).
    pub pooled_ms: f64,
}

/// Service time of every prompt with every hit, ms.
pub(crate) fn floors_ms(trace: &Trace, unloaded: &Unloaded) -> Vec<f64> {
    let mut seen: HashSet<u64> = HashSet::new();
    (0..trace.requests.len())
        .map(|at| {
            let prompt = trace.requests[at].prompt;
            let blocks = trace.blocks(at);
            let held = blocks.iter().take_while(|id| seen.contains(*id)).count();
            seen.extend(blocks);
            let cached = (held as u32 * trace.block_tokens).min(prompt.saturating_sub(1));
            unloaded.ttft_ms(cached, prompt)
        })
        .collect()
}

/// The bounds of a trace at a replay speed, over the requests from `first` on.
pub fn bounds(
    trace: &Trace,
    unloaded: &Unloaded,
    servers: usize,
    speed: f64,
    first: usize,
) -> Bounds {
    let floors = floors_ms(trace, unloaded);
    let counted = floors.len().saturating_sub(first).max(1) as f64;
    let no_wait = floors.iter().skip(first).sum::<f64>() / counted;
    let mut waiting: BinaryHeap<Reverse<(Work, usize)>> = BinaryHeap::new();
    let (mut now, mut sum) = (0.0f64, 0.0);
    let arrival = |at: usize| trace.requests[at].arrival_ms / speed;
    let mut next = 0;
    while next < floors.len() || !waiting.is_empty() {
        if waiting.is_empty() {
            now = now.max(arrival(next));
        }
        while next < floors.len() && arrival(next) <= now {
            waiting.push(Reverse((Work(floors[next] / servers.max(1) as f64), next)));
            next += 1;
        }
        let Some(Reverse((Work(left), at))) = waiting.pop() else {
            continue;
        };
        let until = if next < floors.len() {
            arrival(next)
        } else {
            f64::INFINITY
        };
        if now + left <= until {
            now += left;
            if at >= first {
                sum += now - arrival(at);
            }
        } else {
            waiting.push(Reverse((Work(left - (until - now)), at)));
            now = until;
        }
    }
    Bounds {
        no_wait_ms: no_wait,
        pooled_ms: sum / counted,
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Work(f64);

impl Eq for Work {}

impl Ord for Work {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Work {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
