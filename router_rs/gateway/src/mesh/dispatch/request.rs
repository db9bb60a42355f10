//! A request in the terms of scheduler, index and session.

use kvmesh_kv_index::{Matches, WorkerSlot, chain_values, namespace_root};
use kvmesh_scheduler::{Class, Feature, Needs, RequestView};
use kvmesh_session::{
    TransferId, WorkerIndex,
    generation::{Plan, PlanRequest},
    parse::{Lacks, Refusal},
};
use kvmesh_wire::v1;

use crate::request::AdmittedRequest;

/// Units of a prompt whose chain value stands for what belongs together.
const AFFINITY_UNITS: usize = 16;

/// What a request belongs to: the first 256 tokens of its prompt, or it stands
/// for itself.
pub(super) fn affinity(chain: &[u64], id: u128) -> u64 {
    let first = &chain[..chain.len().min(AFFINITY_UNITS)];
    first.last().copied().unwrap_or(id as u64)
}

/// Whether a worker said that its engine cannot do what is asked.
pub(super) fn unsupported(request: &PlanRequest) -> bool {
    let mut why = request.excluded.iter().map(|(_, why)| *why);
    why.any(|why| why == Refusal::Unsupported)
}

/// What no engine here can do, as a worker would say it.
pub(super) fn lacks(feature: Feature) -> Lacks {
    let (field, message) = match feature {
        Feature::GrammarContinuation => (
            "grammar".to_owned(),
            "no engine goes on within the grammar".to_owned(),
        ),
        Feature::PenaltiesOverContinuation => (
            "sampling".to_owned(),
            "no engine penalises what another one said".to_owned(),
        ),
        other => (other.to_string(), format!("no engine has {other}")),
    };
    Lacks { field, message }
}

/// A class in the scheduler's terms.
pub(crate) fn class_of(class: v1::RequestClass) -> Class {
    match class {
        v1::RequestClass::Interactive => Class::Interactive,
        v1::RequestClass::Batch => Class::Batch,
        v1::RequestClass::Standard | v1::RequestClass::Unspecified => Class::Standard,
    }
}

/// A request as the scheduler sees it.
pub(in crate::mesh) fn request_view<'a>(
    request: &'a AdmittedRequest,
    id: u128,
    output_tokens: u32,
    expected_output: u32,
    cached: &'a Matches,
    excluded: &'a [WorkerSlot],
) -> RequestView<'a> {
    let sampling = &request.sampling;
    let neutral = (sampling.repetition_penalty == 1.0 || sampling.repetition_penalty == 0.0)
        && sampling.frequency_penalty == 0.0
        && sampling.presence_penalty == 0.0;
    let grammar = request.grammar.as_ref();
    RequestView {
        id,
        model: &request.model,
        digest: "",
        adapter: &request.adapter,
        prompt_tokens: u32::try_from(request.prompt_ids.len()).unwrap_or(u32::MAX),
        output_tokens,
        max_tokens: request.max_tokens,
        expected_output,
        class: class_of(request.class),
        itl_target_ms: (request.itl_target_ms > 0.0).then_some(request.itl_target_ms),
        virtual_deadline_ms: f64::INFINITY,
        affinity: 0,
        needs: Needs {
            grammar: grammar.is_some(),
            grammar_continuation: grammar.is_some_and(|grammar| grammar.require_continuation),
            penalties: !neutral,
            logprobs: request.logprobs,
            cache_salt: !request.cache_salt.is_empty(),
        },
        cached,
        excluded,
    }
}

/// Chain values of a request's prompt.
pub(in crate::mesh) fn chain_of(request: &AdmittedRequest, model: &v1::ModelRecord) -> Vec<u64> {
    chain_values(root_of(request, model), &request.prompt_ids)
}

pub(super) fn root_of(request: &AdmittedRequest, model: &v1::ModelRecord) -> u64 {
    let adapter = model
        .adapters
        .get(&request.adapter)
        .map_or("", String::as_str);
    namespace_root(&model.digest, adapter, &request.cache_salt)
}

/// `left` is the number of tokens still to be made.
pub(super) fn plan_of(
    engine: Option<bool>,
    prefill: WorkerIndex,
    decode: WorkerIndex,
    left: u32,
) -> Plan {
    match engine {
        _ if prefill == decode => Plan::Whole { on: decode },
        // One token comes with the prompt: there is nothing to hand on.
        _ if left <= 1 => Plan::Whole { on: prefill },
        Some(prefill_emits) => Plan::Engine {
            prefill,
            decode,
            prefill_emits,
        },
        None => Plan::Mesh {
            prefill,
            decode,
            transfer: TransferId(rand::random()),
        },
    }
}
