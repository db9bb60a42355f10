//! What an engine says at a moment.

use kvmesh_wire::v1::{KvRoom, LoadShare, Opening, RowLogprobs, StageEnd, StepSample};

use crate::cache_log::Change;

/// New tokens of all requests of one router, by columns (wire: `TokenRows`).
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// 16 bytes a row.
    pub generations: Vec<u8>,
    /// Owner number a row.
    pub owners: Vec<u32>,
    /// Attempt a row.
    pub attempts: Vec<u32>,
    /// Output index of the row's first token.
    pub first_indices: Vec<u32>,
    /// Tokens a row.
    pub counts: Vec<u32>,
    /// Token ids of all rows, one after the other.
    pub ids: Vec<u32>,
    /// Log-probabilities of rows that asked for them.
    pub logprobs: Vec<RowLogprobs>,
}

impl Rows {
    /// What does not fit; `None`: all does.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        let rows = self.counts.len();
        if self.generations.len() != 16 * rows {
            return Some("generations are 16 bytes a row");
        }
        if [&self.owners, &self.attempts, &self.first_indices]
            .iter()
            .any(|column| column.len() != rows)
        {
            return Some("columns differ in length");
        }
        let tokens: u64 = self.counts.iter().map(|count| u64::from(*count)).sum();
        if tokens != self.ids.len() as u64 {
            return Some("ids are not as many as counts say");
        }
        None
    }
}

/// What a step brought for one router.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Placements answered.
    pub openings: Vec<Opening>,
    /// Tokens.
    pub tokens: Option<Rows>,
    /// Stages ended.
    pub ends: Vec<StageEnd>,
}

/// State of an engine at a moment.
#[derive(Clone, Debug, Default)]
pub struct EngineLoad {
    /// Room in the pool.
    pub kv: KvRoom,
    /// Work by session.
    pub shares: Vec<(String, LoadShare)>,
    /// Number of the running step, or of the last one.
    pub step: u64,
    /// Milliseconds since the running step began.
    pub step_age_ms: f64,
    /// Predicted length of the running step, ms; 0 when none runs.
    pub step_predicted_ms: f64,
}

/// What an engine says at a moment: after a step, or between steps.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Number of the step that ended; 0: between steps.
    pub step: u64,
    /// What it brought, by session.
    pub parts: Vec<(String, Part)>,
    /// Service time of the step.
    pub sample: Option<StepSample>,
    /// State now.
    pub load: EngineLoad,
    /// Changes of the prefix cache, numbered from the first of the pair on.
    pub cache: Option<(u64, Vec<Change>)>,
}
