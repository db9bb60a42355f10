//! What comes when: a file of arrivals, a JSON object a line.
//!
//! The lines are those that the simulator reads (`arrival_ms`,
//! `prompt_tokens`, `output_tokens`, `blocks`, `class`; docs/simulator.md), so
//! that one file can be replayed live and simulated. A line may have targets of
//! its own (`ttft_target_ms`, `itl_target_ms`).

use kvmesh_wire::v1::RequestClass;
use serde::Deserialize;

/// What a request is held to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Targets {
    /// From its arrival to its first token, ms.
    pub ttft_ms: f64,
    /// Between its tokens, in the mean, ms; infinite: none.
    pub itl_ms: f64,
}

impl Targets {
    /// Those of a class as shipped (SCHEDULING 4).
    #[must_use]
    pub fn of(class: RequestClass) -> Self {
        let (ttft_ms, itl_ms) = match class {
            RequestClass::Interactive => (1_000.0, 50.0),
            RequestClass::Batch => (60_000.0, f64::INFINITY),
            RequestClass::Standard | RequestClass::Unspecified => (5_000.0, 100.0),
        };
        Self { ttft_ms, itl_ms }
    }
}

/// One request of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrival {
    /// When it comes, ms since the start.
    pub at_ms: f64,
    /// Prompt length, tokens; at least 1.
    pub prompt_tokens: u32,
    /// Output length, tokens; at least 1.
    pub output_tokens: u32,
    /// Its prompt's blocks, of [`Arrival::ids`]'s size; equal ones stand for
    /// equal tokens. What they do not fill is the request's own.
    pub blocks: Vec<u64>,
    /// Its class.
    pub class: RequestClass,
    /// What it is held to.
    pub targets: Targets,
    /// The targets are its own: the router is told of them.
    pub own_targets: bool,
}

/// A line that is no arrival.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub struct ArrivalError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong, and what is allowed.
    pub what: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    arrival_ms: f64,
    prompt_tokens: u32,
    output_tokens: u32,
    #[serde(default)]
    blocks: Vec<u64>,
    class: Option<String>,
    ttft_target_ms: Option<u32>,
    itl_target_ms: Option<u32>,
}

impl Line {
    fn arrival(self) -> Result<Arrival, String> {
        let name = self.class.as_deref().unwrap_or("standard");
        let class = match name {
            "interactive" => RequestClass::Interactive,
            "standard" => RequestClass::Standard,
            "batch" => RequestClass::Batch,
            _ => {
                return Err(format!(
                    "class is {name:?}; allowed are interactive, standard, batch"
                ));
            }
        };
        if !self.arrival_ms.is_finite() || self.arrival_ms < 0.0 {
            return Err("arrival_ms is a number, at least 0".to_owned());
        }
        let mut targets = Targets::of(class);
        if let Some(ms) = self.ttft_target_ms {
            targets.ttft_ms = ms.into();
        }
        if let Some(ms) = self.itl_target_ms {
            targets.itl_ms = ms.into();
        }
        Ok(Arrival {
            at_ms: self.arrival_ms,
            prompt_tokens: self.prompt_tokens.max(1),
            output_tokens: self.output_tokens.max(1),
            blocks: self.blocks,
            class,
            targets,
            own_targets: self.ttft_target_ms.is_some() || self.itl_target_ms.is_some(),
        })
    }
}

/// Reads a file of arrivals; they come in the order of their times.
///
/// # Errors
/// For the first line that is no arrival.
pub fn read_arrivals(text: &str) -> Result<Vec<Arrival>, ArrivalError> {
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let read = serde_json::from_str(line)
            .map_err(|error| error.to_string())
            .and_then(Line::arrival);
        found.push(read.map_err(|what| ArrivalError { line: at + 1, what })?);
    }
    found.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
    Ok(found)
}

impl Arrival {
    /// Its prompt: blocks of so many tokens each, then tokens that no other
    /// request has. `number` is the request's; with another seed no token is
    /// shared.
    #[must_use]
    pub fn ids(&self, number: u64, block_tokens: u32, seed: u64) -> Vec<u32> {
        let seed = mix(seed);
        let length = self.prompt_tokens as usize;
        let mut ids = Vec::with_capacity(length);
        for block in &self.blocks {
            if ids.len() + block_tokens as usize > length {
                break;
            }
            ids.extend((0..u64::from(block_tokens)).map(|at| id(*block ^ seed, at)));
        }
        // Apart from all blocks, whose numbers are a file's own.
        let own = mix(number ^ 0x6B76_6D65_7368) ^ seed;
        ids.extend((ids.len()..length).map(|at| id(own, at as u64)));
        ids
    }
}

/// A token id that any vocabulary has.
fn id(name: u64, at: u64) -> u32 {
    16 + (mix(mix(name) ^ at) % 200) as u32
}

/// Spreads 64 bits over 64 bits (splitmix64, S. Vigna).
fn mix(value: u64) -> u64 {
    let mut value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lines_are_read_in_the_order_of_their_times_and_classes_bring_targets() {
        let text = [
            r#"{"arrival_ms": 20, "prompt_tokens": 5, "output_tokens": 0}"#,
            "",
            r#"{"arrival_ms": 10, "prompt_tokens": 40, "output_tokens": 7, "blocks": [3, 4], "class": "interactive"}"#,
            r#"{"arrival_ms": 30, "prompt_tokens": 1, "output_tokens": 1, "class": "batch", "itl_target_ms": 200}"#,
        ]
        .join("\n");
        let found = read_arrivals(&text).unwrap();
        let at: Vec<f64> = found.iter().map(|one| one.at_ms).collect();
        assert_eq!(at, [10.0, 20.0, 30.0]);
        assert_eq!(found[0].targets, Targets::of(RequestClass::Interactive));
        assert_eq!(found[0].blocks, [3, 4]);
        assert_eq!(
            (found[1].class, found[1].output_tokens, found[1].own_targets),
            (RequestClass::Standard, 1, false)
        );
        assert_eq!(
            (
                found[2].targets.ttft_ms,
                found[2].targets.itl_ms,
                found[2].own_targets
            ),
            (60_000.0, 200.0, true)
        );
    }

    #[test]
    fn what_is_no_arrival_is_told_with_its_line() {
        let line = |text: &str| {
            let all = format!(
                "{{\"arrival_ms\": 0, \"prompt_tokens\": 1, \"output_tokens\": 1}}\n{text}"
            );
            read_arrivals(&all).unwrap_err()
        };
        for (text, what) in [
            ("{}", "arrival_ms"),
            (
                r#"{"arrival_ms": -1, "prompt_tokens": 1, "output_tokens": 1}"#,
                "at least 0",
            ),
            (
                r#"{"arrival_ms": 1, "prompt_tokens": 1, "output_tokens": 1, "class": "urgent"}"#,
                "interactive, standard, batch",
            ),
        ] {
            let error = line(text);
            assert_eq!(error.line, 2);
            assert!(error.what.contains(what), "{error}");
        }
    }

    #[test]
    fn equal_blocks_are_equal_prefixes_and_the_rest_is_a_requests_own() {
        let arrival = |blocks: &[u64]| Arrival {
            at_ms: 0.0,
            prompt_tokens: 40,
            output_tokens: 1,
            blocks: blocks.to_vec(),
            class: RequestClass::Standard,
            targets: Targets::of(RequestClass::Standard),
            own_targets: false,
        };
        let ids = |blocks: &[u64], number| arrival(blocks).ids(number, 16, 7);
        let (one, other) = (ids(&[1, 2], 0), ids(&[1, 2], 1));
        assert_eq!((one.len(), other.len()), (40, 40));
        assert_eq!(one[..32], other[..32]);
        assert_ne!(one[32..], other[32..]);
        let third = ids(&[1, 3], 0);
        assert_eq!(one[..16], third[..16]);
        assert_ne!(one[16..32], third[16..32]);
        // A block that the prompt does not fill cannot be shared.
        assert_eq!(ids(&[1, 2, 9], 0), one);
        // Another run finds nothing of this one in a cache.
        assert_ne!(arrival(&[1, 2]).ids(0, 16, 8)[..16], one[..16]);
        assert!(one.iter().all(|id| (16..216).contains(id)));
    }
}
