//! The usual formula with its weights free: what other routers can be tuned to.

use kvmesh_scheduler::{Columns, ScoreError, Scorer};

/// `backlog - overlap x cached + decode x decode context`, all in tokens: the
/// prompts that wait on the prefill worker, what it has of this one, and the
/// contexts of the streams on the decode worker. The least is chosen. Overlap 1
/// and decode 1/w is Dynamo's formula with weight w.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weighted {
    pub(crate) overlap: f64,
    pub(crate) decode: f64,
}

impl Scorer for Weighted {
    fn score(&self, plans: &Columns) -> Result<Vec<f64>, ScoreError> {
        let missing = ScoreError::Unusable {
            given: 0,
            plans: plans.plans(),
        };
        let column = |name| plans.column(name).ok_or(missing.clone());
        let (backlog, cached) = (column("prefill_backlog_tokens")?, column("cached_tokens")?);
        let context = column("decode_context")?;
        let score = |at: usize| backlog[at] - self.overlap * cached[at] + self.decode * context[at];
        Ok((0..plans.plans()).map(score).collect())
    }

    /// Choices are then by cost, which a comparison would show at once.
    fn failed(&self, _error: &ScoreError) {}
}
