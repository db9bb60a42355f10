//! Made-up traffic of any size, for questions of scale.

use super::{PrefixSettings, Request, Trace, give_prefixes};
use crate::seed::Seeded;
use kvmesh_scheduler::Class;
use serde::{Deserialize, Serialize};

/// Poisson arrivals; log-normal lengths of prompts and outputs; prefixes by
/// [`PrefixSettings`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SyntheticSettings {
    /// How many.
    pub requests: usize,
    /// Mean arrivals a second.
    pub per_second: f64,
    /// Mean prompt, tokens.
    pub prompt_tokens: f64,
    /// Mean output, tokens.
    pub output_tokens: f64,
    /// Sigma of the logarithms of both.
    pub sigma: f64,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Shared prefixes.
    pub prefixes: PrefixSettings,
    /// Seed of arrivals and lengths.
    pub seed: u64,
}

impl Default for SyntheticSettings {
    fn default() -> Self {
        Self {
            requests: 10_000,
            per_second: 10.0,
            prompt_tokens: 2_000.0,
            output_tokens: 200.0,
            sigma: 0.8,
            block_tokens: 128,
            prefixes: PrefixSettings::default(),
            seed: 1,
        }
    }
}

/// Makes the traffic.
pub fn synthetic(settings: &SyntheticSettings) -> Trace {
    let mut seeded = Seeded::new(settings.seed, 0x51);
    let mut trace = Trace::new(settings.block_tokens.max(16));
    let mut now_ms = 0.0;
    let gap_ms = 1e3 / settings.per_second.max(1e-9);
    for _ in 0..settings.requests {
        now_ms += seeded.exponential() * gap_ms;
        let mut length = |mean: f64| (seeded.log_normal(settings.sigma) * mean).max(1.0) as u32;
        let (prompt, output) = (
            length(settings.prompt_tokens),
            length(settings.output_tokens),
        );
        let request = Request {
            arrival_ms: now_ms,
            prompt,
            output,
            class: Class::Standard,
            blocks: 0..0,
        };
        trace.push(request, []);
    }
    give_prefixes(&mut trace, &settings.prefixes);
    trace
}
