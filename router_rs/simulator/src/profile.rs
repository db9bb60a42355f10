//! Hardware and model: what steps, KV and transfers take.

use kvmesh_scheduler::StepModel;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a worker is made of. Every figure's origin is named in `sources`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Name, as the command line gives it.
    pub name: String,
    /// The machine of one worker.
    pub hardware: String,
    /// The model and its number format.
    pub model: String,
    /// GPUs of one worker: figures are printed per GPU too. 0: none.
    pub gpus: u32,
    /// Mean step time, ms: `a + b n + c Σ(n context) + d B + e Σ context`.
    pub step: Coefficients,
    /// Smallest chunk at which prefill runs at full rate, tokens.
    pub saturating_chunk: u32,
    /// Whether a step of prompts alone can be stopped between layers. If not, its
    /// chunks fit the preemption target, as those beside streams always do.
    pub layer_preemption: bool,
    /// Tokens of prompts in a step, whatever they take, as of an engine with the
    /// setting of this name. 0: as many as fit the targets in milliseconds.
    #[serde(default)]
    pub chunk_tokens: u32,
    /// KV of a token, bytes.
    pub kv_bytes_per_token: u64,
    /// KV pool of a worker, tokens.
    pub pool_tokens: u64,
    /// Most requests in a step.
    pub max_batch: u32,
    /// Longest prompt and output together, tokens.
    pub context_length: u32,
    /// KV from worker to worker.
    pub transfer: Transfer,
    /// Where the figures come from, by field.
    pub sources: BTreeMap<String, String>,
}

/// Coefficients of the step time, all in ms.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coefficients {
    /// Constant.
    pub a_ms: f64,
    /// A prefill token.
    pub b_ms: f64,
    /// A prefill token times a context token.
    pub c_ms: f64,
    /// A decoding request.
    pub d_ms: f64,
    /// A context token of a decoding request.
    pub e_ms: f64,
}

/// What moving KV takes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// Rate of one worker's link, each way, bytes/ms.
    pub bytes_per_ms: f64,
    /// Fixed part of a hand-off, ms.
    pub fixed_ms: f64,
}

impl Profile {
    /// Step times of a worker that takes `slowness` times as long.
    pub fn step_model(&self, slowness: f64) -> StepModel {
        let Coefficients {
            a_ms,
            b_ms,
            c_ms,
            d_ms,
            e_ms,
        } = self.step;
        StepModel {
            a_ms: a_ms * slowness,
            b_ms: b_ms * slowness,
            c_ms: c_ms * slowness,
            d_ms: d_ms * slowness,
            e_ms: e_ms * slowness,
            relative_error: 0.2,
            saturating_chunk: self.saturating_chunk,
        }
    }
}
