//! Prefixes for traces that have none.

use super::Trace;
use crate::seed::{Seeded, mix};
use serde::{Deserialize, Serialize};

/// How prompts share prefixes. Lengths and arrivals stay the trace's own.
///
/// A request opens a session, with probability `1 - follow_up`, or goes on
/// with one of the last `open_sessions` whose last prompt was shorter than
/// its own; then the whole of that prompt is its prefix. A session that opens
/// takes one of `system_prompts` (by a Zipf law with exponent 1), as far as
/// its first prompt is long; the rest of every prompt is its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrefixSettings {
    /// Shared system prompts.
    pub system_prompts: u32,
    /// Mean length of one in tokens; lengths are uniform up to twice that.
    pub system_tokens: u32,
    /// Probability that a request goes on with a session.
    pub follow_up: f64,
    /// Sessions that can be gone on with: the last ones so many.
    pub open_sessions: usize,
    /// Seed of all that.
    pub seed: u64,
}

impl Default for PrefixSettings {
    fn default() -> Self {
        Self {
            system_prompts: 16,
            system_tokens: 512,
            follow_up: 0.5,
            open_sessions: 256,
            seed: 1,
        }
    }
}

/// Gives every request of a trace its blocks.
pub fn give_prefixes(trace: &mut Trace, settings: &PrefixSettings) {
    let mut seeded = Seeded::new(settings.seed, 0xA2);
    let size = trace.block_tokens.max(1);
    let systems: Vec<u32> = (0..settings.system_prompts.max(1))
        .map(|_| seeded.below(2 * u64::from(settings.system_tokens) + 1) as u32)
        .collect();
    let total: f64 = (1..=systems.len()).map(|rank| 1.0 / rank as f64).sum();
    let mut sessions: Vec<Vec<u64>> = Vec::new();
    let mut turn = 0;
    let mut ids = Vec::new();
    for (number, request) in trace.requests.iter_mut().enumerate() {
        let full = (request.prompt / size) as usize;
        let goes_on = seeded.uniform() < settings.follow_up;
        let mut fitting: Vec<usize> = Vec::new();
        if goes_on {
            // It says something new: a session as long as itself is none.
            fitting.extend((0..sessions.len()).filter(|at| sessions[*at].len() < full));
        }
        let chosen = fitting
            .get(seeded.below(fitting.len() as u64) as usize)
            .copied();
        let mut prompt = match chosen {
            Some(at) => sessions[at].clone(),
            None => {
                let mut left = seeded.uniform() * total;
                let rank = (0..systems.len() - 1).find(|rank| {
                    left -= 1.0 / (*rank as f64 + 1.0);
                    left < 0.0
                });
                let rank = rank.unwrap_or(systems.len() - 1);
                let shared = ((systems[rank] / size) as usize).min(full);
                (0..shared)
                    .map(|block| mix(((rank as u64 + 1) << 32) | block as u64))
                    .collect()
            }
        };
        for block in prompt.len()..full {
            prompt.push(mix(((number as u64 + (1 << 30)) << 32) | block as u64));
        }
        let start = ids.len();
        ids.extend_from_slice(&prompt);
        request.blocks = start..ids.len();
        match chosen {
            Some(at) => sessions[at] = prompt,
            None if sessions.len() < settings.open_sessions => sessions.push(prompt),
            None if sessions.is_empty() => {}
            None => {
                // The oldest makes room.
                let at = turn % sessions.len();
                sessions[at] = prompt;
                turn += 1;
            }
        }
    }
    trace.ids = ids;
}
