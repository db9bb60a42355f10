//! The Admin service: for operators, on this machine or on a port of their own.

use std::sync::Arc;

use http::Response;
use kvmesh_wire::v1;

use super::{
    body::ResponseBody,
    inference::{refuse, unary},
    service::{Call, Shared},
};
use crate::{door::Refused, error::RequestError, mesh::MeshError, telemetry::Step};

/// Answers a call of `kvmesh.v1.Admin`; `None` for an unknown method.
pub(super) async fn call(
    shared: &Arc<Shared>,
    method: &str,
    call: Call,
) -> Option<Response<ResponseBody>> {
    if let Err(error) = shared.access.operator(&call.headers, call.from, call.port) {
        return Some(refuse(shared, "Admin", &call, &(Step::Access, error)));
    }
    let mesh = &shared.mesh;
    Some(match method {
        "ListWorkers" => {
            unary(shared, "ListWorkers", call, async |ask| {
                Ok(list(shared, &ask))
            })
            .await
        }
        "DrainWorker" => {
            let drain = async |ask: v1::DrainWorkerRequest| mesh.drain(&ask).await.map_err(refused);
            unary(shared, "DrainWorker", call, drain).await
        }
        "SetWorkerRole" => {
            let set = async |ask: v1::SetWorkerRoleRequest| {
                if ask.role() == v1::Role::Unspecified {
                    let error = RequestError::invalid("role", "PREFILL, DECODE or BOTH");
                    return Err((Step::Validate, error));
                }
                let role = mesh.set_role(&ask).await.map_err(refused)?.into();
                Ok(v1::SetWorkerRoleResponse { role })
            };
            unary(shared, "SetWorkerRole", call, set).await
        }
        "Explain" => {
            let explain = async |ask: v1::ExplainRequest| {
                let known = mesh.explain(&ask.generation_id);
                known.ok_or((Step::Validate, RequestError::UnknownGeneration))
            };
            unary(shared, "Explain", call, explain).await
        }
        "AdvisePools" => {
            let advise = async |_: v1::AdvisePoolsRequest| {
                let models = mesh.advise_pools();
                Ok(v1::AdvisePoolsResponse { models })
            };
            unary(shared, "AdvisePools", call, advise).await
        }
        "GetRouterInfo" => {
            let info = async |_: v1::GetRouterInfoRequest| Ok(info(shared));
            unary(shared, "GetRouterInfo", call, info).await
        }
        _ => return None,
    })
}

fn list(shared: &Shared, ask: &v1::ListWorkersRequest) -> v1::ListWorkersResponse {
    let wanted = &ask.model;
    let mut workers = shared.mesh.workers();
    workers.retain(|worker| {
        let model = worker
            .record
            .as_ref()
            .and_then(|record| record.model.as_ref());
        wanted.is_empty() || model.is_some_and(|model| model.name == *wanted)
    });
    v1::ListWorkersResponse { workers }
}

fn info(shared: &Shared) -> v1::GetRouterInfoResponse {
    let facts = &shared.facts;
    let counters = shared.mesh.counters();
    let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    v1::GetRouterInfoResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        router_id: facts.router_id.clone(),
        incarnation: facts.incarnation,
        cluster: facts.cluster.clone(),
        uptime_s: facts.started.elapsed().as_secs_f64(),
        etcd_connected: facts
            .etcd
            .as_ref()
            .is_some_and(|status| status.borrow().connected),
        generations: small(counters.open_streams.get()),
        queued: small(shared.mesh.queued() as u64),
        undelivered_tokens: counters.undelivered_ids.get(),
    }
}

fn refused(error: MeshError) -> Refused {
    let error = match error {
        MeshError::UnknownWorker(id) => RequestError::UnknownWorker(id),
        MeshError::EmptiesRole => RequestError::Refused {
            reason: "EMPTIES_ROLE",
            message: error.to_string(),
        },
        MeshError::Unreachable(_) => RequestError::NoWorker(error.to_string()),
        MeshError::Worker(status) => RequestError::WorkerFailed {
            code: u32::try_from(status.code() as i32).unwrap_or_default(),
            reason: "WORKER_REFUSED".to_owned(),
            message: status.message().to_owned(),
            next_index: 0,
        },
    };
    (Step::Admission, error)
}
