//! What an attempt starts from: prompt, output so far, and how to go on.

use std::time::Instant;

use kvmesh_wire::v1;

use super::figures::ms;
use crate::request::AdmittedRequest;

/// Head start of a class in every queue, in milliseconds (SCHEDULING 4: A).
fn class_delay_ms(class: v1::RequestClass) -> f64 {
    match class {
        v1::RequestClass::Interactive => 0.0,
        v1::RequestClass::Batch => 30_000.0,
        v1::RequestClass::Standard | v1::RequestClass::Unspecified => 2_000.0,
    }
}

/// The continuation of a request whose output so far is `output`. Times in it
/// count from `now`: no clock reading is sent.
pub(super) fn continuation(
    request: &AdmittedRequest,
    output: &[u32],
    now: Instant,
) -> v1::Continuation {
    let waited_ms = ms(now.saturating_duration_since(request.arrived));
    let deadline_ms = request.deadline.map_or(0.0, |deadline| {
        // 0 would mean none.
        ms(deadline.saturating_duration_since(now)).max(0.001)
    });
    v1::Continuation {
        model: request.model.clone(),
        prompt_ids: request.prompt_ids.to_vec(),
        output_ids: output.to_vec(),
        sampling: Some(request.sampling.clone()),
        max_tokens: request.max_tokens,
        min_tokens: request.min_tokens,
        stop_token_ids: request.stop_token_ids.clone(),
        logprobs: request.logprobs,
        grammar: request.grammar.clone(),
        request_class: request.class.into(),
        virtual_deadline_ms: class_delay_ms(request.class) - waited_ms,
        deadline_ms,
        waited_ms,
        cache_salt: request.cache_salt.clone(),
        adapter: request.adapter.clone(),
        itl_target_ms: request.itl_target_ms,
    }
}
