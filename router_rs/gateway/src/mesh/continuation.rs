//! What an attempt starts from: prompt, output so far, and how to go on.

use std::time::Instant;

use kvmesh_wire::v1;

use super::figures::ms;
use crate::request::AdmittedRequest;

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
