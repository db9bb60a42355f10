//! What came of a run.

mod record;
mod summary;
mod timeline;
mod unloaded;

pub(crate) use record::Recorder;
pub use record::Row;
pub use summary::{Distribution, PoolUse, Prediction, Summary};
pub use timeline::{FlipRow, Timeline};
pub use unloaded::{Bounds, Unloaded, bounds};

use serde::Serialize;

/// A run's results.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// The figures.
    pub summary: Summary,
    /// How it went over time.
    pub timeline: Timeline,
    /// Workers that changed their role, in the order of time.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flips: Vec<FlipRow>,
    /// One row a request that counts, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rows: Vec<Row>,
}
