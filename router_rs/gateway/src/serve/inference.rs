//! The Inference service, and health.

use std::{future::Future, sync::Arc};

use http::Response;
use kvmesh_wire::v1;
use prost::Message;
use tonic_health::pb::HealthCheckRequest;

use super::{
    body::{GenerateBody, ResponseBody},
    grpc,
    service::{Call, Shared},
};
use crate::{
    door::{Admitted, Refused},
    error::RequestError,
    telemetry::Step,
};

/// Answers a call of `kvmesh.v1.Inference`; `None` for an unknown method.
pub(super) async fn call(
    shared: &Arc<Shared>,
    method: &str,
    call: Call,
) -> Option<Response<ResponseBody>> {
    Some(match method {
        "Generate" => generate(shared, call).await,
        "Tokenize" => {
            unary(shared, "Tokenize", call, async |request| {
                shared.door.tokenize(request).await
            })
            .await
        }
        "ListModels" => {
            let models = async |_: Admitted<v1::ListModelsRequest>| {
                Ok(v1::ListModelsResponse {
                    models: shared.mesh.models(),
                })
            };
            unary(shared, "ListModels", call, models).await
        }
        "Resume" => {
            let refused = (
                Step::Validate,
                RequestError::Unsupported("Resume".to_owned()),
            );
            refuse(shared, "Resume", &call, &refused)
        }
        _ => return None,
    })
}

async fn generate(shared: &Arc<Shared>, call: Call) -> Response<ResponseBody> {
    let Call {
        headers,
        body,
        metadata,
        end,
    } = call;
    let back = metadata.headers();
    let opened = async {
        let request = shared
            .door
            .read::<v1::GenerateRequest>(&headers, body)
            .await?;
        shared.door.generate(request, &metadata).await
    };
    match opened.await {
        Ok(stream) => {
            end.follow(stream.given_up());
            let body = GenerateBody::new(
                stream,
                Arc::clone(&shared.telemetry),
                back.clone(),
                metadata.request_id,
                metadata.arrived,
            );
            grpc::response(ResponseBody::Generate(Box::new(body)), &back)
        }
        Err((step, error)) => {
            shared.telemetry.rejected(step, &error);
            shared.telemetry.ended("Generate", Some(&error));
            tracing::debug!(event = "refused", request_id = %metadata.request_id, %error);
            grpc::refusal(&error.to_status(), &back)
        }
    }
}

/// A call with one message each way.
pub(super) async fn unary<Q, A, F>(
    shared: &Arc<Shared>,
    method: &'static str,
    call: Call,
    answer: impl FnOnce(Admitted<Q>) -> F,
) -> Response<ResponseBody>
where
    Q: Message + Default,
    A: Message,
    F: Future<Output = Result<A, Refused>>,
{
    let back = call.metadata.headers();
    let answered = async {
        let request = shared.door.read::<Q>(&call.headers, call.body).await?;
        answer(request).await
    };
    match answered.await {
        Ok(message) => {
            shared.telemetry.ended(method, None);
            grpc::one(&message, &back)
        }
        Err((step, error)) => {
            shared.telemetry.rejected(step, &error);
            shared.telemetry.ended(method, Some(&error));
            grpc::refusal(&error.to_status(), &back)
        }
    }
}

/// Refuses a call without reading it.
pub(super) fn refuse(
    shared: &Shared,
    method: &'static str,
    call: &Call,
    (step, error): &Refused,
) -> Response<ResponseBody> {
    shared.telemetry.rejected(*step, error);
    shared.telemetry.ended(method, Some(error));
    grpc::refusal(&error.to_status(), &call.metadata.headers())
}

/// Longest message on the health path, in bytes: it takes no permit.
const HEALTH_BYTES: u64 = 4_096;

/// Answers a call of `grpc.health.v1.Health`. Takes no permit and no pool.
pub(super) async fn health(
    shared: &Arc<Shared>,
    method: &str,
    call: Call,
) -> Option<Response<ResponseBody>> {
    let back = call.metadata.headers();
    let received = grpc::receive(&call.headers, call.body, HEALTH_BYTES, |_| Ok(())).await;
    let request = received.and_then(|(received, ())| {
        let bytes = match received.gzip {
            true => grpc::inflate(&received.bytes, HEALTH_BYTES)?,
            false => received.bytes,
        };
        grpc::decode::<HealthCheckRequest>(bytes)
    });
    let request = match request {
        Ok(request) => request,
        Err(error) => return Some(grpc::refusal(&error.to_status(), &back)),
    };
    Some(match method {
        "Check" => match shared.health.check(&request.service) {
            Some(response) => grpc::one(&response, &back),
            None => grpc::refusal(&tonic::Status::not_found("unknown service"), &back),
        },
        "Watch" => {
            let watch = Box::new(shared.health.watch(&request.service));
            grpc::response(ResponseBody::Watch(watch), &back)
        }
        _ => return None,
    })
}
