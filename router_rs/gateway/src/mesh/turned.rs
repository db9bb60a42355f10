//! What a client is told whose request is turned away.

use kvmesh_scheduler::{Feature, NoPlan, Rejected};

use super::placer::Turned;
use crate::{
    error::{RequestError, retry_after},
    request::AdmittedRequest,
};

/// What there is to do where no worker takes a salt, which is not the client's fault:
/// a router with keys salts every prompt.
const UNSALTED: &str = "no worker of this model can keep the cached prompts of tenants apart; an \
    operator can attach its server with --salted-prompts uncached or shared, or add a worker that \
    takes salts";

/// Why a request is not taken, as an error of its call.
pub(super) fn turned(request: &AdmittedRequest, why: Turned) -> RequestError {
    match why {
        Turned::Waits(Rejected::WaitTooLong { retry_after_ms, .. }) => RequestError::Overloaded {
            reason: "the predicted wait is too long",
            retry_after: retry_after(retry_after_ms),
        },
        Turned::Waits(Rejected::DeadlineCannotBeMet {
            ttft_ms, left_ms, ..
        }) => RequestError::Overloaded {
            reason: "the deadline cannot be met",
            retry_after: retry_after(ttft_ms - left_ms),
        },
        Turned::Never(NoPlan::TooLong { tokens, limit }) => {
            RequestError::PromptTooLong { tokens, limit }
        }
        Turned::Never(NoPlan::Unsupported(Feature::CacheSalt)) => RequestError::Unsupported {
            field: Feature::CacheSalt.to_string(),
            words: UNSALTED.to_owned(),
        },
        Turned::Never(NoPlan::Unsupported(feature)) => {
            RequestError::unsupported(feature.to_string())
        }
        Turned::Never(NoPlan::UnknownAdapter) => {
            RequestError::invalid("adapter", "no worker has this adapter")
        }
        Turned::Never(other) => RequestError::NoWorker(format!("{}: {other}", request.model)),
    }
}
