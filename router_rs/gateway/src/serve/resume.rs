//! What a call of Resume asks for.

use kvmesh_session::GenerationId;
use kvmesh_wire::v1;

use crate::{
    access::Caller,
    door::{Admitted, CallMetadata, Permit, Refused},
    error::RequestError,
    mesh::ResumeAsked,
    telemetry::{Share, Step},
};

/// The call, and the permit for its bytes: its ids live as long as it waits for workers.
/// `share`: of the traces that this router exports.
///
/// # Errors
/// What is wrong with it. An id that cannot be one is unknown like any other.
pub(super) fn resumed(
    request: Admitted<v1::ResumeRequest>,
    call: &CallMetadata,
    caller: &Caller,
    share: Option<Share>,
) -> Result<(ResumeAsked, Permit), Refused> {
    let (request, permit) = request.split();
    let given = request.token_ids.len();
    if given > 0 && given != request.next_index as usize {
        let allowed = format!(
            "none, or as many as next_index says: {}",
            request.next_index
        );
        let invalid = RequestError::invalid("token_ids", allowed);
        return Err((Step::Validate, invalid));
    }
    let id = GenerationId::from_hex(&request.generation_id);
    let id = id.ok_or((Step::Validate, RequestError::UnknownGeneration))?;
    let asked = ResumeAsked {
        id,
        next_index: request.next_index,
        token_ids: request.token_ids.into(),
        tenant: caller.tenant,
        admin: caller.operates,
        request_id: call.request_id.clone(),
        traceparent: call.traceparent.clone(),
        tracestate: call.tracestate.clone(),
        baggage: call.baggage.clone(),
        has_parent: call.has_parent,
        traced: call.traced,
        share,
        arrived: call.arrived,
        deadline: call.deadline,
    };
    Ok((asked, permit))
}
