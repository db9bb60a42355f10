//! What a client asks for, and the request that another router left.

use std::{sync::Arc, time::Instant};

use kvmesh_session::GenerationId;
use kvmesh_session::parse::Left;
use kvmesh_text::TextSettings;
use kvmesh_wire::v1;
use prost::Message as _;

use crate::{
    error::RequestError,
    request::AdmittedRequest,
    telemetry::{Share, goes_on_below},
};

/// A call of Resume that passed the door.
#[derive(Clone, Debug)]
pub(crate) struct ResumeAsked {
    /// The generation.
    pub(crate) id: GenerationId,
    /// First output index wanted.
    pub(crate) next_index: u32,
    /// The ids before it; empty: the client does not say.
    pub(crate) token_ids: Arc<[u32]>,
    /// Whose call it is.
    pub(crate) tenant: u128,
    /// Whether worker names may be told.
    pub(crate) admin: bool,
    /// Id of this call, for whoever looks for it.
    pub(crate) request_id: String,
    /// W3C trace context of this call.
    pub(crate) traceparent: String,
    /// W3C trace state of this call.
    pub(crate) tracestate: String,
    /// W3C baggage of this call.
    pub(crate) baggage: String,
    /// Whether its client gave that.
    pub(crate) has_parent: bool,
    /// Whether its spans are exported.
    pub(crate) traced: bool,
    /// Which traces are exported; `None`: none.
    pub(crate) share: Option<Share>,
    /// When the call arrived.
    pub(crate) arrived: Instant,
    /// When its client stops waiting.
    pub(crate) deadline: Option<Instant>,
}

impl ResumeAsked {
    /// Whether an output is what the client has, and maybe more.
    pub(in crate::mesh) fn fits(&self, output: &[u32]) -> bool {
        let had = output.get(..self.next_index as usize);
        had.is_some_and(|had| self.token_ids.is_empty() || *self.token_ids == *had)
    }
}

/// The request of a generation, as another router left it, with the time that was left until
/// its virtual deadline, ms. Its deadline is that of the call which resumes it.
///
/// # Errors
/// [`RequestError::UnknownGeneration`] for what cannot be gone on with.
pub(super) fn request(
    left: &Left,
    asked: &ResumeAsked,
) -> Result<(AdmittedRequest, f64), RequestError> {
    let unknown = || RequestError::UnknownGeneration;
    let state = v1::ResumeState::decode(left.resume_state.clone()).map_err(|_| unknown())?;
    let from = state.continuation.ok_or_else(unknown)?;
    let class = match from.request_class() {
        v1::RequestClass::Unspecified => v1::RequestClass::Standard,
        class => class,
    };
    let valid = !from.prompt_ids.is_empty()
        && from.max_tokens > 0
        && left.output_ids.len() <= from.max_tokens as usize;
    let sampling = from.sampling.filter(|_| valid).ok_or_else(unknown)?;
    let resumes = state.traceparent;
    let below = match asked.has_parent {
        true => None,
        false => goes_on_below(&resumes, &asked.traceparent, asked.share),
    };
    let own = || (asked.traceparent.clone(), asked.traced);
    let (traceparent, traced) = below.unwrap_or_else(own);
    let text = state.text.map(|text| TextSettings {
        special_tokens: text.special_tokens,
        kept_special_tokens: text.kept_special_tokens,
        stops: text.stop,
        include_stop: text.include_stop,
        min_tokens: from.min_tokens,
    });
    let request = AdmittedRequest {
        request_id: state.request_id,
        traceparent,
        resumes,
        tracestate: asked.tracestate.clone(),
        baggage: asked.baggage.clone(),
        model: from.model,
        prompt_ids: from.prompt_ids.into(),
        output_ids: Vec::new(),
        sampling,
        max_tokens: from.max_tokens,
        min_tokens: from.min_tokens,
        stop_token_ids: from.stop_token_ids,
        text,
        logprobs: from.logprobs,
        grammar: from.grammar,
        placements: state.placements,
        trace: state.trace,
        traced,
        chat: false,
        admin: asked.admin,
        tenant: asked.tenant,
        resumable: true,
        class,
        ttft_target_ms: state.ttft_target_ms,
        itl_target_ms: from.itl_target_ms,
        cache_salt: from.cache_salt,
        adapter: from.adapter,
        expected_output_tokens: state.expected_output_tokens,
        arrived: asked.arrived,
        deadline: asked.deadline,
        tokenize_ms: 0.0,
    };
    Ok((request, from.virtual_deadline_ms))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::mesh::{
        continuation::{continuation, resume_state},
        tests::request as admitted,
    };

    pub(in crate::mesh) fn asked(next_index: u32, token_ids: &[u32]) -> ResumeAsked {
        ResumeAsked {
            id: GenerationId([7; 16]),
            next_index,
            token_ids: token_ids.into(),
            tenant: 0,
            admin: true,
            request_id: String::new(),
            traceparent: String::new(),
            tracestate: String::new(),
            baggage: String::new(),
            has_parent: false,
            traced: false,
            share: None,
            arrived: Instant::now(),
            deadline: None,
        }
    }

    #[test]
    fn what_is_left_becomes_the_request_that_it_was() {
        let mut was = AdmittedRequest {
            resumable: true,
            stop_token_ids: vec![3],
            min_tokens: 2,
            expected_output_tokens: 4,
            ..admitted(&[1, 2], 9)
        };
        was.text = was.text.map(|text| TextSettings {
            kept_special_tokens: vec!["<mark>".to_owned()],
            stops: vec!["never".to_owned()],
            min_tokens: 2,
            ..text
        });
        let placed = continuation(&was, &[7], 2_000.0, was.arrived);
        let left = Left {
            output_ids: vec![7, 8],
            resume_state: resume_state(&was, &placed),
        };
        let (now, urgency_ms) = request(&left, &asked(1, &[])).expect("it is whole");
        assert_eq!(urgency_ms, 2_000.0);
        let told = |request: &AdmittedRequest| {
            let again = continuation(request, &[], 2_000.0, request.arrived);
            (again, request.text.clone(), request.request_id.clone())
        };
        assert_eq!(told(&now), told(&was));
        // It can be resumed once more.
        let again = continuation(&now, &[7], 2_000.0, now.arrived);
        assert_eq!(resume_state(&now, &again), left.resume_state);
    }

    #[test]
    fn it_goes_on_in_the_trace_that_it_was_in_unless_its_client_gives_another() {
        let of = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let own = "00-0000000000000000000000000000000a-000000000000000b-00";
        let was = AdmittedRequest {
            resumable: true,
            traceparent: of.to_owned(),
            ..admitted(&[1, 2], 9)
        };
        let placed = continuation(&was, &[7], 2_000.0, was.arrived);
        let left = Left {
            output_ids: vec![7],
            resume_state: resume_state(&was, &placed),
        };
        let below = format!("{}-000000000000000b-01", &of[..35]);
        let own = own.to_owned();
        for (has_parent, wanted) in [(false, below), (true, own.clone())] {
            let asked = ResumeAsked {
                traceparent: own.clone(),
                has_parent,
                ..asked(1, &[])
            };
            let (now, _) = request(&left, &asked).expect("it is whole");
            assert_eq!((now.traceparent, now.resumes.as_str()), (wanted, of));
            assert!(!now.traced, "nothing is exported here");
        }
    }

    #[test]
    fn what_cannot_be_gone_on_with_is_unknown() {
        let was = AdmittedRequest {
            resumable: true,
            ..admitted(&[1, 2], 2)
        };
        let placed = continuation(&was, &[], 2_000.0, was.arrived);
        let whole = resume_state(&was, &placed);
        for (output_ids, resume_state) in [
            (vec![1, 2, 3], whole.clone()),
            (vec![1], b"\xff\xff".as_slice().into()),
            (vec![1], bytes::Bytes::new()),
        ] {
            let left = Left {
                output_ids,
                resume_state,
            };
            let refused = request(&left, &asked(0, &[])).map(|_| ());
            assert!(matches!(refused, Err(RequestError::UnknownGeneration)));
        }
    }

    #[test]
    fn an_output_fits_that_begins_with_what_the_client_has() {
        assert!(asked(2, &[]).fits(&[5, 6, 7]));
        assert!(asked(2, &[5, 6]).fits(&[5, 6]));
        assert!(!asked(2, &[5, 9]).fits(&[5, 6, 7]));
        assert!(!asked(3, &[]).fits(&[5, 6]));
    }
}
