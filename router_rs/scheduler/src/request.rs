//! A request as the scheduler sees it.

use kvmesh_kv_index::{Matches, WorkerSlot};

/// How urgent a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Class {
    /// A person waits.
    Interactive,
    /// The default.
    #[default]
    Standard,
    /// Nobody waits.
    Batch,
}

/// One value a class, by [`Class::index`].
pub type PerClass<T> = [T; 3];

impl Class {
    /// All classes, most urgent first.
    pub const ALL: PerClass<Self> = [Self::Interactive, Self::Standard, Self::Batch];

    /// Its place in a [`PerClass`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// What a request asks of an engine beyond plain tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// Follows a grammar.
    pub grammar: bool,
    /// The grammar must survive a lost worker.
    pub grammar_continuation: bool,
    /// Any penalty is set.
    pub penalties: bool,
    /// Alternatives with log-probability; none wanted: `None`.
    pub logprobs: Option<u32>,
    /// Its cached prefixes are kept apart by a salt. With keys every request's are.
    pub cache_salt: bool,
}

/// A request, or what is left of one.
#[derive(Debug, Clone, Copy)]
pub struct RequestView<'a> {
    /// The generation's id.
    pub id: u128,
    /// Model by name.
    pub model: &'a str,
    /// Digest to keep to, once a first attempt ran. Empty: any.
    pub digest: &'a str,
    /// Adapter by name. Empty: the base model.
    pub adapter: &'a str,
    /// Prompt tokens.
    pub prompt_tokens: u32,
    /// Output tokens so far: part of what must be computed again.
    pub output_tokens: u32,
    /// Most output tokens in all.
    pub max_tokens: u32,
    /// Output tokens expected in all; at most `max_tokens`.
    pub expected_output: u32,
    /// Urgency.
    pub class: Class,
    /// Longest time between two of its tokens that it asked for, ms. `None`: that
    /// of its class.
    pub itl_target_ms: Option<f64>,
    /// Its key in every queue: [`crate::virtual_deadline_ms`], on the clock of
    /// [`Cluster::now_ms`](crate::Cluster::now_ms). Infinite: behind everyone.
    pub virtual_deadline_ms: f64,
    /// What belongs together, for consistent hashing: a conversation, or the
    /// beginning of a prompt, as a hash.
    pub affinity: u64,
    /// What it asks of an engine.
    pub needs: Needs,
    /// What each worker holds of prompt and output so far.
    pub cached: &'a Matches,
    /// Workers that refused it since their last load report.
    pub excluded: &'a [WorkerSlot],
}

impl RequestView<'_> {
    /// Tokens whose KV must be there before the next one is made.
    pub fn sequence(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.output_tokens)
    }

    /// Whether every engine of its model can run it, a salt apart: that is common, and
    /// has a gate of its own.
    pub(crate) fn is_plain(&self) -> bool {
        let common = Needs {
            cache_salt: self.needs.cache_salt,
            ..Needs::default()
        };
        self.needs == common
            && self.digest.is_empty()
            && self.adapter.is_empty()
            && self.excluded.is_empty()
    }

    /// Output tokens expected from now on; at least 1.
    pub fn expected_left(&self) -> f64 {
        f64::from(
            self.expected_output
                .min(self.max_tokens)
                .saturating_sub(self.output_tokens)
                .max(1),
        )
    }

    /// Whether any worker holds some of it below its device.
    pub(crate) fn is_tiered(&self) -> bool {
        !(self.cached.host_by_slot().is_empty() && self.cached.disk_by_slot().is_empty())
    }

    /// Of [`RequestView::cached_on`], tokens that lie on the host and on disk.
    pub(crate) fn below_device(&self, worker: WorkerSlot) -> [f64; 2] {
        let (host, disk) = (
            self.cached.host_tokens(worker),
            self.cached.disk_tokens(worker),
        );
        [host, disk].map(f64::from)
    }

    /// Tokens of the sequence that a worker need not compute. The last one is
    /// always computed: its logits are wanted.
    pub fn cached_on(&self, worker: WorkerSlot) -> u64 {
        u64::from(self.cached.tokens(worker)).min(self.sequence().saturating_sub(1))
    }
}
