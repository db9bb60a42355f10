//! The usual formula with its weights free: what other routers can be tuned to.

use kvmesh_scheduler::{Columns, ScoreError, Scorer};
use std::sync::OnceLock;

/// `backlog - overlap x cached + decode x decode context`, all in tokens: the
/// prompts that wait on the prefill worker, what it has of this one, and the
/// contexts of the streams on the decode worker. The least is chosen. Overlap 1
/// and decode 1/w is Dynamo's formula with weight w.
#[derive(Debug)]
pub(crate) struct Weighted {
    overlap: f64,
    decode: f64,
    /// Why a choice was by cost: the run is then none of this policy.
    failed: OnceLock<ScoreError>,
}

impl Weighted {
    pub(crate) fn new(overlap: f64, decode: f64) -> Self {
        Self {
            overlap,
            decode,
            failed: OnceLock::new(),
        }
    }

    /// The first failure.
    pub(crate) fn failure(&self) -> Option<&ScoreError> {
        self.failed.get()
    }
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

    fn failed(&self, error: &ScoreError) {
        // The first one is told; later ones are of its kind.
        let _ = self.failed.set(error.clone());
    }
}
