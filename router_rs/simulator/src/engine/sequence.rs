//! What an engine has, and what it says.

use kvmesh_scheduler::{Class, StepModel};

/// What a worker's engine is and how it behaves.
#[derive(Debug, Clone)]
pub(crate) struct EngineSettings {
    /// True mean step times.
    pub truth: StepModel,
    /// KV pool in units of 16 tokens.
    pub pool_units: u64,
    /// Tokens of a block that can be shared: a multiple of 16.
    pub block_tokens: u32,
    /// Most requests in a step.
    pub max_batch: u32,
    /// Whether chunks can be stopped between layers.
    pub layer_preemption: bool,
    /// Tokens of prompts in a step, whatever they take; 0: as many as fit the targets.
    pub chunk_tokens: u32,
    /// ITL target by class (interactive, standard, batch), ms.
    pub itl_ms: [f64; 3],
    /// Routers.
    pub routers: usize,
}

/// What a sequence is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Prompt and output.
    Whole,
    /// Prompt, then hand-off.
    Prefill,
}

/// A request, or what is left of one, as an engine has it.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    /// Its number in the trace.
    pub request: u32,
    /// Router that sent it.
    pub router: usize,
    /// Urgency.
    pub class: Class,
    /// Virtual deadline: smaller goes first.
    pub key: f64,
    /// What it is there for.
    pub stage: Stage,
    /// Tokens whose KV must be there before the next one is made.
    pub length: u32,
    /// Output tokens still to be made; the truth.
    pub left: u32,
    /// When its client got the last token, ms.
    pub last_ms: f64,
    /// Tokens whose KV is there.
    pub computed: u32,
    /// Of these, found in the cache.
    pub cached: u32,
    /// Cached blocks that it holds, from the first on.
    pub(super) held: u32,
    /// Units that are its own.
    pub(super) own_units: u64,
    pub(super) started: bool,
    /// It waits for a prefix from another worker.
    pub(super) fetching: bool,
}

impl Sequence {
    /// One that holds nothing yet.
    #[expect(clippy::too_many_arguments, reason = "each is a fact of the request")]
    pub(crate) fn new(
        request: u32,
        router: usize,
        class: Class,
        key: f64,
        stage: Stage,
        length: u32,
        left: u32,
        last_ms: f64,
    ) -> Self {
        Self {
            request,
            router,
            class,
            key,
            stage,
            length,
            left,
            last_ms,
            computed: 0,
            cached: 0,
            held: 0,
            own_units: 0,
            started: false,
            fetching: false,
        }
    }

    pub(super) fn left_to_compute(&self) -> u32 {
        self.length - self.computed
    }
}

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Outcome {
    /// A prompt started for the first time: so many tokens were cached.
    Started {
        /// The request.
        request: u32,
        /// Tokens.
        cached: u32,
    },
    /// A chunk of a prompt that is handed on is computed.
    Chunk {
        /// The request.
        request: u32,
        /// Tokens.
        tokens: u32,
    },
    /// A first token of an attempt is made. `left` are still to come.
    Token {
        /// The request.
        request: u32,
        /// Tokens still to come.
        left: u32,
    },
    /// Its last token is made.
    Finished {
        /// The request.
        request: u32,
    },
    /// It lost its room and goes back to its router.
    Returned {
        /// The request.
        request: u32,
        /// Tokens still to come.
        left: u32,
    },
}
