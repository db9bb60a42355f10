//! Mooncake's traces (kvcache-ai/Mooncake, R. Qin et al., FAST 2025): JSON
//! lines with `timestamp` in ms, `input_length`, `output_length` and
//! `hash_ids`, one id a 512-token block.

use super::{Request, Trace, TraceError};
use crate::seed::Seeded;
use kvmesh_scheduler::Class;
use serde::Deserialize;

const BLOCK_TOKENS: u32 = 512;
/// The tick of the published traces, ms: for the last one, which no later
/// one ends.
const TICK_MS: f64 = 3_000.0;

/// What becomes of arrivals that come in ticks of some 3 s, up to 23 at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ticks {
    /// Spread uniformly within their tick.
    Spread {
        /// Seed of the places.
        seed: u64,
    },
    /// As they are.
    Raw,
}

#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

/// Reads a trace.
///
/// # Errors
/// [`TraceError`] for a line that is no such object.
pub fn read_mooncake(text: &str, ticks: Ticks) -> Result<Trace, TraceError> {
    let mut lines = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(line).map_err(|error| TraceError {
            line: at + 1,
            what: error.to_string(),
        })?;
        lines.push(line);
    }
    lines.sort_by(|a, b| a.timestamp.total_cmp(&b.timestamp));
    let mut trace = Trace::new(BLOCK_TOKENS);
    let stamps: Vec<f64> = lines.iter().map(|line| line.timestamp).collect();
    let mut places = Seeded::new(
        match ticks {
            Ticks::Spread { seed } => seed,
            Ticks::Raw => 0,
        },
        0x7134,
    );
    for line in lines {
        let next = stamps.partition_point(|stamp| *stamp <= line.timestamp);
        let tick = stamps
            .get(next)
            .map_or(TICK_MS, |stamp| stamp - line.timestamp);
        let offset = match ticks {
            Ticks::Spread { .. } => places.uniform() * tick.min(TICK_MS),
            Ticks::Raw => 0.0,
        };
        let request = Request {
            arrival_ms: line.timestamp + offset,
            prompt: line.input_length,
            output: line.output_length,
            class: Class::Standard,
            blocks: 0..0,
        };
        trace.push(request, line.hash_ids);
    }
    trace.sort();
    Ok(trace)
}
