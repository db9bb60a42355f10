//! A simple format: JSON lines with `arrival_ms`, `prompt_tokens`,
//! `output_tokens`, and if wanted `blocks` (ids of its blocks, equal ones mean
//! equal prefixes up to there) and `class`.

use super::{Request, Trace, TraceError, class_named};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    arrival_ms: f64,
    prompt_tokens: u32,
    output_tokens: u32,
    #[serde(default)]
    blocks: Vec<u64>,
    #[serde(default)]
    class: Option<String>,
}

/// Reads a trace whose ids stand for so many tokens each.
///
/// # Errors
/// [`TraceError`] for a line that is no such object.
pub fn read_simple(text: &str, block_tokens: u32) -> Result<Trace, TraceError> {
    let mut trace = Trace::new(block_tokens);
    for (at, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let bad = |what: String| TraceError { line: at + 1, what };
        let line: Line = serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
        let name = line.class.as_deref().unwrap_or("standard");
        let class = class_named(name).ok_or_else(|| {
            bad(format!(
                "class is {name:?}; allowed are interactive, standard, batch"
            ))
        })?;
        if !line.arrival_ms.is_finite() || line.arrival_ms < 0.0 {
            return Err(bad("arrival_ms is a number, at least 0".to_owned()));
        }
        let request = Request {
            arrival_ms: line.arrival_ms,
            prompt: line.prompt_tokens,
            output: line.output_tokens,
            class,
            blocks: 0..0,
        };
        trace.push(request, line.blocks);
    }
    trace.sort();
    Ok(trace)
}
