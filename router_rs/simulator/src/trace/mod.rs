//! Traces: what arrives when, how long it is, and which prefixes are equal.

mod azure;
mod mooncake;
mod prefixes;
mod simple;
mod synthetic;

pub use azure::read_azure;
pub use mooncake::{Ticks, read_mooncake};
pub use prefixes::{PrefixSettings, give_prefixes};
pub use simple::read_simple;
pub use synthetic::{SyntheticSettings, synthetic};

use kvmesh_scheduler::Class;
use std::ops::Range;
use thiserror::Error;

/// A line that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("line {line}: {what}")]
pub struct TraceError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong, and what is allowed.
    pub what: String,
}

/// One request of a trace. Output length is the truth: no policy sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Arrival since the start, ms.
    pub arrival_ms: f64,
    /// Prompt tokens; at least 1.
    pub prompt: u32,
    /// Output tokens; at least 1.
    pub output: u32,
    /// Urgency.
    pub class: Class,
    /// Ids of its full blocks, within [`Trace::ids`].
    pub blocks: Range<usize>,
}

/// Requests in the order of their arrival.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trace {
    /// Tokens that an id stands for.
    pub block_tokens: u32,
    /// The requests.
    pub requests: Vec<Request>,
    /// Ids of all blocks, request after request. Equal ids mean equal
    /// prefixes up to there.
    pub ids: Vec<u64>,
}

impl Trace {
    /// An empty one.
    pub fn new(block_tokens: u32) -> Self {
        Self {
            block_tokens,
            ..Self::default()
        }
    }

    /// Ids of a request's full blocks.
    pub fn blocks(&self, request: usize) -> &[u64] {
        &self.ids[self.requests[request].blocks.clone()]
    }

    /// Adds a request; blocks that its prompt does not fill are left out,
    /// since nobody can share them.
    pub fn push(&mut self, mut request: Request, blocks: impl IntoIterator<Item = u64>) {
        let full = request.prompt / self.block_tokens.max(1);
        let start = self.ids.len();
        self.ids.extend(blocks.into_iter().take(full as usize));
        request.blocks = start..self.ids.len();
        request.prompt = request.prompt.max(1);
        request.output = request.output.max(1);
        self.requests.push(request);
    }

    /// Brings requests into the order of their arrival; equal ones stay as
    /// they were.
    pub fn sort(&mut self) {
        self.requests
            .sort_by(|a, b| a.arrival_ms.total_cmp(&b.arrival_ms));
    }

    /// The first `share` of the requests.
    pub fn truncate(&mut self, share: f64) {
        let keep = (self.requests.len() as f64 * share).round() as usize;
        self.requests.truncate(keep);
    }

    /// Share of the full blocks that an unbounded cache would have.
    pub fn ideal_hit_share(&self) -> f64 {
        let mut seen = std::collections::HashSet::new();
        let (mut hits, mut all) = (0u64, 0u64);
        for (at, _) in self.requests.iter().enumerate() {
            let mut prefix = true;
            for id in self.blocks(at) {
                all += 1;
                prefix &= !seen.insert(*id);
                hits += u64::from(prefix);
            }
        }
        hits as f64 / all.max(1) as f64
    }
}

fn class_named(name: &str) -> Option<Class> {
    match name {
        "interactive" => Some(Class::Interactive),
        "standard" => Some(Class::Standard),
        "batch" => Some(Class::Batch),
        _ => None,
    }
}
