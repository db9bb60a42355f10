//! vLLM's two gRPC APIs in front of the door that our own comes through, so that who was
//! made for one vLLM engine can point at the mesh.
//!
//! ```text
//! request:  engine_ask, inference_ask (the request that ours would bring) ─▶ open ─▶ door
//! answer:   engine_answer, inference_answer (messages) ◀─ answers ◀─ serve::Generation
//! ```
//!
//! `VllmEngine` is SMG's, `Inference` with `Control` vLLM's own. Nothing behind the door
//! knows of them. What each field does is in docs/vllm-grpc.md.

mod answers;
mod control;
mod engine;
mod engine_answer;
mod engine_ask;
#[cfg(test)]
mod every_field_tests;
mod field;
mod inference_answer;
mod inference_ask;
mod load;
mod open;
mod running;
mod tokenizer;

use std::sync::Arc;

use http::{HeaderMap, Response};

pub(crate) use answers::Answers;
pub(crate) use control::call as control;
pub(crate) use engine::call as engine;
pub(crate) use tokenizer::Archive;

use crate::{
    door::Refused,
    error::RequestError,
    mesh::ServedModel,
    serve::{Call, Shared, body::ResponseBody, refuse},
    telemetry::Step,
};
use running::Running;
use tokenizer::Archives;

/// The service that SMG puts in front of an engine.
pub(crate) const ENGINE: &str = "vllm.grpc.engine.VllmEngine";
/// vLLM's own service for generation.
pub(crate) const INFERENCE: &str = "vllm.Inference";
/// vLLM's own service for control.
pub(crate) const CONTROL: &str = "vllm.Control";
/// Metadata that names a model or an adapter, for calls that have no field for it: a vLLM
/// server has one.
const MODEL: &str = "x-kvmesh-model";
/// The kind of KV cache events that we have, which are none of vLLM's.
const NO_EVENTS: &str = "a mesh keeps its index itself";

/// What these services keep between calls.
#[derive(Default)]
pub(crate) struct Vllm {
    running: Arc<Running>,
    archives: Archives,
}

/// Answers a call of `vllm.Inference`; `None` for an unknown method.
pub(crate) async fn inference(
    shared: &Arc<Shared>,
    method: &str,
    call: Call,
) -> Option<Response<ResponseBody>> {
    let (name, stream) = match method {
        "Generate" => ("vllm.Inference/Generate", false),
        "GenerateStream" => ("vllm.Inference/GenerateStream", true),
        _ => return None,
    };
    let ask = move |request, model| inference_ask::ask(request, model, stream);
    Some(open::generate(shared, call, name, ask).await)
}

/// The model or adapter that a call's metadata names; empty where it names none.
fn named_by(headers: &HeaderMap) -> String {
    let value = headers.get(MODEL).and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}

/// The model that a call is about.
fn model_of(shared: &Shared, call: &Call) -> Result<Arc<ServedModel>, Refused> {
    shared.caller(call)?;
    let invalid = |error| (Step::Validate, error);
    let named = crate::door::named(&shared.mesh, &named_by(&call.headers)).map_err(invalid)?;
    shared.mesh.model(&named.model).map_err(invalid)
}

/// Refuses what no router of ours does.
fn lacks(
    shared: &Shared,
    name: &'static str,
    call: &Call,
    (field, words): (&str, &str),
) -> Response<ResponseBody> {
    let unsupported = (Step::Validate, unsupported(field, words));
    let refused = shared.caller(call).err().unwrap_or(unsupported);
    refuse(shared, name, call, &refused)
}

/// A field or call that is not supported, and why.
fn unsupported(field: &str, words: &str) -> RequestError {
    RequestError::Unsupported {
        field: field.to_owned(),
        words: words.to_owned(),
    }
}
