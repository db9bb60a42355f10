//! What an attempt starts from: prompt, output so far, and how to go on.

use std::time::Instant;

use bytes::Bytes;
use kvmesh_wire::v1;
use prost::Message as _;

use super::figures::ms;
use crate::request::AdmittedRequest;

/// Longest state that is left at a worker for another router, bytes.
const MAX_RESUME_STATE: usize = 1 << 20;

/// A tenant as routers name it to workers. The same at every router.
pub(super) fn tenant_name(tenant: u128) -> String {
    format!("{tenant:032x}")
}

/// What another router needs to take a request over that is placed with this
/// continuation. Empty where its client does not ask for that, or wants
/// log-probabilities, which nobody keeps, and where it would be longer than a worker
/// has to keep.
pub(super) fn resume_state(request: &AdmittedRequest, placed: &v1::Continuation) -> Bytes {
    if !request.resumable || request.logprobs.is_some() {
        return Bytes::new();
    }
    let state = v1::ResumeState {
        continuation: Some(v1::Continuation {
            output_ids: Vec::new(),
            ..placed.clone()
        }),
        text: request.text.as_ref().map(|text| v1::ResumeText {
            special_tokens: text.special_tokens,
            stop: text.stops.clone(),
            include_stop: text.include_stop,
            kept_special_tokens: text.kept_special_tokens.clone(),
        }),
        request_id: request.request_id.clone(),
        ttft_target_ms: request.ttft_target_ms,
        expected_output_tokens: request.expected_output_tokens,
        placements: request.placements,
        trace: request.trace,
        traceparent: request.traceparent.clone(),
    };
    match state.encoded_len() {
        ..=MAX_RESUME_STATE => state.encode_to_vec().into(),
        _ => Bytes::new(),
    }
}

/// The continuation of a request whose output so far is `output`. Times in it
/// count from `now`: no clock reading is sent. `urgency_ms` is the time from
/// arrival to virtual deadline.
pub(super) fn continuation(
    request: &AdmittedRequest,
    output: &[u32],
    urgency_ms: f64,
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
        virtual_deadline_ms: urgency_ms - waited_ms,
        deadline_ms,
        waited_ms,
        cache_salt: request.cache_salt.clone(),
        adapter: request.adapter.clone(),
        itl_target_ms: request.itl_target_ms,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::mesh::tests::request;

    #[test]
    fn a_state_that_no_worker_has_to_keep_is_not_sent() {
        let of = |prompt: &[u32], resumable| {
            let asked = AdmittedRequest {
                resumable,
                ..request(prompt, 3)
            };
            let placed = continuation(&asked, &[7], 2_000.0, asked.arrived);
            resume_state(&asked, &placed)
        };
        let state = v1::ResumeState::decode(of(&[1, 2], true)).expect("it is whole");
        let kept = state.continuation.expect("it is there");
        assert_eq!((kept.prompt_ids, kept.output_ids), (vec![1, 2], vec![]));
        assert!(of(&[1, 2], false).is_empty());
        // Three bytes a token.
        assert!(!of(&[100_000; 300_000], true).is_empty());
        assert!(of(&[100_000; 400_000], true).is_empty());
    }

    #[test]
    fn a_tenants_name_is_all_of_it() {
        assert_eq!(tenant_name(1 << 64), "00000000000000010000000000000000");
    }

    #[test]
    fn times_count_from_the_placement() {
        let request = AdmittedRequest {
            deadline: None,
            ..request(&[1, 2], 3)
        };
        let later = request.arrived + Duration::from_millis(300);
        let placed = continuation(&request, &[7], 2_000.0, later);
        assert_eq!(placed.virtual_deadline_ms, 1_700.0);
        assert_eq!((placed.waited_ms, placed.deadline_ms), (300.0, 0.0));
        assert_eq!(placed.output_ids, [7]);
    }
}
