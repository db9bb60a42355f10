//! What a mock worker is told at its start.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use kvmesh_wire::v1::{Place, Role};

use crate::vocabulary::Vocabulary;

/// Settings of a mock worker. `Default` is a worker that does both stages,
/// without pauses, on a free loopback port.
#[derive(Clone, Debug)]
pub struct MockConfig {
    /// Where gRPC is served. Port 0: a free one.
    pub listen: SocketAddr,
    /// Name of the worker. Default: `mock-` and its port.
    pub worker_id: Option<String>,
    /// Random number of the process start. Default: drawn.
    pub incarnation: Option<u64>,
    /// Role at the start.
    pub role: Role,
    /// Name of the model.
    pub model: String,
    /// Digest of the model: 64 hexadecimal digits.
    pub model_digest: String,
    /// Tokeniser that `GetTokenizer` serves and that tokens are taken from.
    pub vocabulary: Arc<Vocabulary>,
    /// Context length, tokens.
    pub context_length: u32,
    /// Pause between steps. Zero: steps follow each other at once.
    pub step: Duration,
    /// From a placement to its first token, or to the end of its prefill.
    pub prefill: Duration,
    /// Blocks of 16 tokens in the pretended pool.
    pub pool_blocks: u64,
    /// Most requests in a step: those above wait.
    pub max_batch: u32,
    /// Whether prefill emits the first token; else only decode does.
    pub prefill_emits_first_token: bool,
    /// Name of an engine's connector: hand-offs are then `engine` ones, known
    /// when prefill ends. Empty: mesh hand-offs.
    pub engine_connector: String,
    /// Whether it tells that penalties are right over a continuation.
    pub penalties_over_continuation: bool,
    /// Most alternatives with log-probability; 0: none, not even the token's.
    pub max_logprobs: u32,
    /// Whether it refuses prompts with a cache salt, and says so.
    pub no_cache_salt: bool,
    /// Whether it tells that grammars are followed. It follows none: what it says is
    /// set with [`super::MockWorker::say`].
    pub grammars: bool,
    /// Whether it tells that an output can go on under a grammar that it began under
    /// elsewhere.
    pub grammars_over_continuation: bool,
    /// Whether the direct case is served over HTTP/1.1, too, at a port of its own.
    pub http: bool,
    /// Output index at which an end-of-text token comes. `None`: never.
    pub end_of_text_at: Option<u32>,
    /// Whether it tells of its cache: what [`super::MockWorker::send_cache`] is
    /// given, and nothing else.
    pub cache_events: bool,
    /// Hash scheme of its cache lane.
    pub hash_scheme: u32,
    /// Tokens of a block, as it tells; it counts in blocks of 16.
    pub block_tokens: u32,
    /// A generation that another router placed here and left: whoever claims it has it
    /// go on from its output ids.
    pub left: Option<Box<Place>>,
    /// Protocol version told in hello, as (major, minor).
    pub version: (u32, u32),
}

impl Default for MockConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            worker_id: None,
            incarnation: None,
            role: Role::Both,
            model: "mock".to_owned(),
            model_digest: "0".repeat(64),
            vocabulary: Arc::new(Vocabulary::built_in()),
            context_length: 131_072,
            step: Duration::ZERO,
            prefill: Duration::ZERO,
            pool_blocks: 1 << 20,
            max_batch: 4_096,
            prefill_emits_first_token: true,
            engine_connector: String::new(),
            penalties_over_continuation: true,
            max_logprobs: 0,
            no_cache_salt: false,
            grammars: false,
            grammars_over_continuation: false,
            http: false,
            end_of_text_at: None,
            cache_events: false,
            hash_scheme: 1,
            block_tokens: 16,
            left: None,
            version: (1, 0),
        }
    }
}
