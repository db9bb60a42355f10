//! The service that SMG puts in front of an engine.

use std::{sync::Arc, time::SystemTime};

use http::Response;
use kvmesh_wire::vllm::grpc::engine::{
    AbortRequest, AbortResponse, GetLoadsRequest, GetLoadsResponse, GetModelInfoRequest,
    GetModelInfoResponse, GetServerInfoRequest, GetServerInfoResponse, HealthCheckRequest,
    HealthCheckResponse,
};

use prost::Message;

use super::{NO_EVENTS, engine_ask, lacks, load::Pool, model_of, open, tokenizer};
use crate::{
    door::Refused,
    mesh::ServedModel,
    serve::{Call, Shared, body::ResponseBody, grpc, unary},
};

/// Answers a call of `vllm.grpc.engine.VllmEngine`; `None` for an unknown method.
pub(crate) async fn call(
    shared: &Arc<Shared>,
    method: &str,
    call: Call,
) -> Option<Response<ResponseBody>> {
    Some(match method {
        "Generate" => open::generate(shared, call, "VllmEngine/Generate", engine_ask::ask).await,
        "Abort" => {
            let ids = |message: AbortRequest| message.request_ids;
            abort(shared, "VllmEngine/Abort", call, ids, AbortResponse {}).await
        }
        "HealthCheck" => {
            // As health is: without a key.
            let health = async |_: HealthCheckRequest| Ok(health(shared));
            unary(shared, "VllmEngine/HealthCheck", call, health).await
        }
        "GetModelInfo" => {
            let model = model_of(shared, &call);
            let told = async |_: GetModelInfoRequest| Ok(model_info(&*model?));
            unary(shared, "VllmEngine/GetModelInfo", call, told).await
        }
        "GetServerInfo" => {
            let model = model_of(shared, &call);
            let told = async |_: GetServerInfoRequest| Ok(server_info(shared, &*model?));
            unary(shared, "VllmEngine/GetServerInfo", call, told).await
        }
        "GetLoads" => {
            let model = model_of(shared, &call);
            let told = async |_: GetLoadsRequest| Ok(loads(shared, &*model?));
            unary(shared, "VllmEngine/GetLoads", call, told).await
        }
        "GetTokenizer" => tokenizer::answer(shared, call).await,
        "SubscribeKvEvents" => {
            let name = "VllmEngine/SubscribeKvEvents";
            lacks(shared, name, &call, ("SubscribeKvEvents", NO_EVENTS))
        }
        "Embed" => {
            let why = ("Embed", "no engine of this mesh makes embeddings");
            lacks(shared, "VllmEngine/Embed", &call, why)
        }
        _ => return None,
    })
}

/// Ends the requests that a message names. Its length is bounded as that of all messages is: a
/// caller may end as many as it has.
pub(super) async fn abort<M: Message + Default>(
    shared: &Arc<Shared>,
    name: &'static str,
    call: Call,
    ids: fn(M) -> Vec<String>,
    answer: impl Message,
) -> Response<ResponseBody> {
    let back = call.metadata.headers();
    let caller = shared.caller(&call);
    let done: Result<(), Refused> = async {
        let caller = caller?;
        let read = shared.door.read::<M>(&call.headers, call.body).await?;
        let (message, _permit) = read.split();
        let running = &shared.vllm.running;
        running.abort(&shared.mesh, caller.tenant, &ids(message));
        Ok(())
    }
    .await;
    match done {
        Ok(()) => {
            shared.telemetry.ended(name, None);
            grpc::one(&answer, &back)
        }
        Err(refused) => {
            shared.refused(name, &refused);
            grpc::refusal(&refused.1.to_status(), &back)
        }
    }
}

/// As `/ready` has it.
fn health(shared: &Shared) -> HealthCheckResponse {
    let (healthy, message) = if !shared.health.serves() {
        (false, "the router is shutting down")
    } else if !shared.mesh.models().iter().any(|model| model.ready) {
        (false, "no model can be asked for now")
    } else {
        (true, "ready")
    };
    HealthCheckResponse {
        healthy,
        message: message.to_owned(),
    }
}

/// What a router knows of a model: nothing of its weights, so neither family nor classes.
fn model_info(model: &ServedModel) -> GetModelInfoResponse {
    let record = &model.record;
    let signed = |id: &u32| i32::try_from(*id).unwrap_or(i32::MAX);
    GetModelInfoResponse {
        model_path: record.name.clone(),
        is_generation: true,
        max_context_length: record.context_length,
        vocab_size: record.vocabulary_size,
        served_model_name: record.name.clone(),
        tokenizer_path: record.name.clone(),
        eos_token_ids: record.end_of_text_ids.iter().map(signed).collect(),
        max_req_input_len: signed(&record.context_length),
        ..GetModelInfoResponse::default()
    }
}

fn server_info(shared: &Shared, model: &ServedModel) -> GetServerInfoResponse {
    let pool = Pool::of(shared, &model.record.name);
    let kv = model.capabilities.kv.as_ref();
    let dtype = kv.map(|kv| kv.dtype.clone()).unwrap_or_default();
    GetServerInfoResponse {
        active_requests: pool.open,
        is_paused: !shared.health.serves(),
        uptime_seconds: shared.facts.started.elapsed().as_secs_f64(),
        server_type: "kvmesh".to_owned(),
        data_parallel_size: 1,
        kv_cache_dtype: dtype,
        block_size: signed(model.capabilities.block_tokens.into()),
        max_num_seqs: signed(pool.max_running),
        constrained_decoding_start: match model.capabilities.grammars {
            true => "first_token".to_owned(),
            false => String::new(),
        },
        ..GetServerInfoResponse::default()
    }
}

fn loads(shared: &Shared, model: &ServedModel) -> GetLoadsResponse {
    let load = Pool::of(shared, &model.record.name).scheduler_load();
    GetLoadsResponse {
        timestamp: prost_types::Timestamp::from(SystemTime::now()).to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        dp_rank_count: 1,
        loads: vec![load],
    }
}

/// A count where a message has a signed one.
pub(super) fn signed(count: u64) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}
