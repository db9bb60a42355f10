//! A request that passed every check at the door: nothing in it can be
//! invalid, so nothing behind the door checks it again.

use std::{sync::Arc, time::Instant};

use kvmesh_text::TextSettings;
use kvmesh_wire::v1;

/// A request that was admitted, with every value resolved.
#[derive(Clone, Debug)]
pub struct AdmittedRequest {
    /// The client's x-request-id, or one made here. At most 128 bytes.
    pub request_id: String,
    /// W3C trace context; may be empty.
    pub traceparent: String,
    /// W3C trace context of a request of another router that this is; empty: of none.
    pub resumes: String,
    /// W3C trace state; may be empty.
    pub tracestate: String,
    /// W3C baggage; may be empty.
    pub baggage: String,
    /// Name of the model; it is served.
    pub model: String,
    /// Prompt token ids, at least one.
    pub prompt_ids: Arc<[u32]>,
    /// Output ids that the client has from another router.
    pub output_ids: Vec<u32>,
    /// How to draw; the seed is drawn where the client gave none.
    pub sampling: v1::ResolvedSampling,
    /// Most output tokens, at least 1.
    pub max_tokens: u32,
    /// Fewest output tokens.
    pub min_tokens: u32,
    /// Token ids that end the output, end-of-text included where honoured.
    pub stop_token_ids: Vec<u32>,
    /// How text is made; `None`: the client wants none.
    pub text: Option<TextSettings>,
    /// Alternatives with log-probability to report.
    pub logprobs: Option<u32>,
    /// Output language.
    pub grammar: Option<v1::Grammar>,
    /// Whether `Placed` messages are wanted.
    pub placements: bool,
    /// Whether `Finished.trace` is wanted.
    pub trace: bool,
    /// Whether its spans are exported: workers are asked for theirs, whether or not
    /// the client wants them.
    pub traced: bool,
    /// Whether it was asked for as a chat.
    pub chat: bool,
    /// Whether worker names may be told.
    pub admin: bool,
    /// Whose it is, as a hash: tenants of a class take turns. Without keys the
    /// client's address.
    pub tenant: u128,
    /// Whether another router may take it over.
    pub resumable: bool,
    /// Urgency; never unspecified.
    pub class: v1::RequestClass,
    /// Target for the first token, milliseconds.
    pub ttft_target_ms: f64,
    /// Target between tokens, milliseconds; 0: none.
    pub itl_target_ms: f64,
    /// Keeps cached prefixes apart.
    pub cache_salt: String,
    /// Adapter by name; empty: base model.
    pub adapter: String,
    /// Expected output tokens; 0: unknown.
    pub expected_output_tokens: u32,
    /// When the request arrived.
    pub arrived: Instant,
    /// When its client stops waiting.
    pub deadline: Option<Instant>,
    /// Time that template and tokeniser took, milliseconds.
    pub tokenize_ms: f64,
}

/// A class as settings write it.
pub(crate) fn class_name(class: v1::RequestClass) -> &'static str {
    match class {
        v1::RequestClass::Interactive => "interactive",
        v1::RequestClass::Batch => "batch",
        v1::RequestClass::Standard | v1::RequestClass::Unspecified => "standard",
    }
}
