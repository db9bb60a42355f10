//! The Inference service, and health.

use std::{future::Future, sync::Arc};

use http::{HeaderMap, Response};
use hyper::body::Incoming;
use kvmesh_wire::v1;
use prost::Message;
use tonic_health::pb::HealthCheckRequest;

use super::{
    body::{GenerateBody, ResponseBody},
    calls::CallEnd,
    generation::{Asked, Generation},
    grpc,
    resume::resumed,
    service::{Call, GENERATE, RESUME, Shared},
};
use crate::{
    access::{Caller, Visit},
    door::{CallMetadata, Refused},
    error::RequestError,
    mesh::GenerationStream,
    telemetry::{RequestSpan, Step},
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
            let back = call.metadata.headers();
            let entered = shared.enter(&call);
            let answer = async {
                let _entered = entered?;
                let request = shared.door.read(&call.headers, call.body).await?;
                shared.door.tokenize(request).await
            };
            answered(shared, "Tokenize", &back, answer.await)
        }
        "ListModels" => {
            if let Err(refused) = shared.caller(&call) {
                return Some(refuse(shared, "ListModels", &call, &refused));
            }
            let models = async |_: v1::ListModelsRequest| {
                Ok(v1::ListModelsResponse {
                    models: shared.mesh.models(),
                })
            };
            unary(shared, "ListModels", call, models).await
        }
        "Resume" => resume(shared, call).await,
        _ => return None,
    })
}

async fn generate(shared: &Arc<Shared>, call: Call) -> Response<ResponseBody> {
    let back = call.metadata.headers();
    let begun = shared.begin(call);
    streamed(shared, GENERATE, (begun, back), async |call, caller| {
        let visit = shared.visit(&caller, call.metadata)?;
        let Reading {
            headers,
            body,
            metadata,
            ..
        } = call;
        let request = shared.door.read(headers, body).await?;
        let stream = shared.door.generate(request, metadata, &caller).await?;
        Ok((stream, visit))
    })
    .await
}

async fn resume(shared: &Arc<Shared>, call: Call) -> Response<ResponseBody> {
    let back = call.metadata.headers();
    let begun = shared.begin_resume(call);
    streamed(shared, RESUME, (begun, back), async |call, caller| {
        let visit = may_resume(shared, &caller, call.metadata)?;
        let Reading {
            headers,
            body,
            metadata,
            end,
        } = call;
        let request = shared.door.read(headers, body).await?;
        let (asked, _permit) = resumed(request, metadata, &caller, shared.share())?;
        let visit = match visit {
            // What it goes on with here goes: that makes room for it.
            Err(_) if shared.mesh.has(&asked) => {
                let entered = shared.access.enter_in_place(&caller, metadata.arrived);
                entered.map_err(|error| (Step::Tenant, error))?
            }
            visit => visit?,
        };
        let resumed = shared.mesh.resume(asked, || end.was_cut()).await;
        let stream = resumed.map_err(|error| (Step::Admission, error))?;
        Ok((stream, visit))
    })
    .await
}

/// Refuses a call of Resume by its tenant's rates before anything of it is read. Gives its
/// place among its tenant's requests, or why it has none: what it goes on with may be one of
/// them, which only the call itself says.
fn may_resume(
    shared: &Shared,
    caller: &Caller,
    call: &CallMetadata,
) -> Result<Result<Visit, Refused>, Refused> {
    let tenant = |error| (Step::Tenant, error);
    let visit = shared.visit(caller, call);
    if visit.is_err() {
        let rate = shared.access.has_rate(caller, call.arrived);
        rate.map_err(tenant)?;
    }
    shared.mesh.may_resume(caller.tenant).map_err(tenant)?;
    Ok(visit)
}

/// What is left to be read of a call.
struct Reading<'a> {
    headers: &'a HeaderMap,
    body: Incoming,
    metadata: &'a CallMetadata,
    end: &'a CallEnd,
}

/// A call that is answered by a generation, which `open` gives; `back`: what is told to its
/// client beside that.
async fn streamed(
    shared: &Arc<Shared>,
    method: &'static str,
    ((call, mut span), mut back): ((Call, Option<RequestSpan>), HeaderMap),
    open: impl AsyncFnOnce(Reading<'_>, Caller) -> Result<(GenerationStream, Visit), Refused>,
) -> Response<ResponseBody> {
    let caller = shared.caller(&call);
    let Call {
        headers,
        body,
        mut metadata,
        end,
        ..
    } = call;
    let opened = async {
        let caller = caller?;
        let reading = Reading {
            headers: &headers,
            body,
            metadata: &metadata,
            end: &end,
        };
        open(reading, caller).await
    }
    .await;
    match opened {
        Ok((stream, visit)) => {
            if let Some(of) = stream.goes_on_with()
                && shared.goes_on(of, &mut metadata, span.as_mut())
            {
                back = metadata.headers();
            }
            let telemetry = Arc::clone(&shared.telemetry);
            let asked = Asked {
                method,
                request_id: metadata.request_id,
                arrived: metadata.arrived,
            };
            let mut generation = Generation::new(stream, telemetry, asked, (visit, span));
            generation.outlives(&end);
            end.follow([generation.given_up()]);
            let body = GenerateBody::new(generation, back.clone());
            grpc::response(ResponseBody::Generate(Box::new(body)), &back)
        }
        Err(refused) => {
            shared.turned_away(method, &metadata.request_id, span, &refused);
            grpc::refusal(&refused.1.to_status(), &back)
        }
    }
}

/// A call with one small message each way, which takes no permit and no pool.
pub(crate) async fn unary<Q, A, F>(
    shared: &Arc<Shared>,
    method: &'static str,
    call: Call,
    answer: impl FnOnce(Q) -> F,
) -> Response<ResponseBody>
where
    Q: Message + Default,
    A: Message,
    F: Future<Output = Result<A, Refused>>,
{
    let back = call.metadata.headers();
    let made = async {
        let request = shared.door.read_small(&call.headers, call.body).await?;
        answer(request).await
    };
    answered(shared, method, &back, made.await)
}

/// The answer of a call with one message each way.
fn answered(
    shared: &Shared,
    method: &'static str,
    back: &HeaderMap,
    made: Result<impl Message, Refused>,
) -> Response<ResponseBody> {
    match made {
        Ok(message) => {
            shared.telemetry.ended(method, None);
            grpc::one(&message, back)
        }
        Err(refused) => {
            shared.refused(method, &refused);
            grpc::refusal(&refused.1.to_status(), back)
        }
    }
}

/// Refuses a call without reading it.
pub(crate) fn refuse(
    shared: &Shared,
    method: &'static str,
    call: &Call,
    refused: &Refused,
) -> Response<ResponseBody> {
    shared.refused(method, refused);
    grpc::refusal(&refused.1.to_status(), &call.metadata.headers())
}

/// Answers a call of `grpc.health.v1.Health`. Takes no permit and no pool.
pub(super) async fn health(
    shared: &Arc<Shared>,
    method: &str,
    call: Call,
) -> Option<Response<ResponseBody>> {
    let back = call.metadata.headers();
    let read = shared
        .door
        .read_small::<HealthCheckRequest>(&call.headers, call.body);
    let request = match read.await {
        Ok(request) => request,
        Err((_, error)) => return Some(grpc::refusal(&error.to_status(), &back)),
    };
    Some(match method {
        "Check" => match shared.health.check(&request.service) {
            Some(response) => grpc::one(&response, &back),
            None => grpc::refusal(&RequestError::UnknownService.to_status(), &back),
        },
        "Watch" => {
            let watch = Box::new(shared.health.watch(&request.service));
            grpc::response(ResponseBody::Watch(watch), &back)
        }
        _ => return None,
    })
}
