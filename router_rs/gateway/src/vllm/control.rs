//! vLLM's own service for control.

use std::sync::Arc;

use http::Response;
use kvmesh_wire::vllm::{
    AbortRequest, AbortResponse, GetKvEventSourcesRequest, GetKvEventSourcesResponse,
    GetModelInfoRequest, GetServerInfoRequest, ListLorasRequest, ListLorasResponse, LoraAdapter,
    ModelInfo, ParallelismInfo, ServerInfo,
};

use super::{engine::abort, load::Pool, model_of};
use crate::{
    mesh::ServedModel,
    serve::{Call, Shared, body::ResponseBody, unary},
};

/// Version of vLLM's files that `proto/vllm` was made from.
const PROTO_VERSION: &str = "0.6.0";

/// Answers a call of `vllm.Control`; `None` for an unknown method.
pub(crate) async fn call(
    shared: &Arc<Shared>,
    method: &str,
    call: Call,
) -> Option<Response<ResponseBody>> {
    Some(match method {
        "Abort" => {
            let ids = |message: AbortRequest| message.request_ids;
            abort(shared, "vllm.Control/Abort", call, ids, AbortResponse {}).await
        }
        "GetServerInfo" => {
            let model = model_of(shared, &call);
            let told = async |_: GetServerInfoRequest| Ok(server_info(shared, &*model?));
            unary(shared, "vllm.Control/GetServerInfo", call, told).await
        }
        "GetModelInfo" => {
            let model = model_of(shared, &call);
            let told = async |_: GetModelInfoRequest| Ok(model_info(&*model?));
            unary(shared, "vllm.Control/GetModelInfo", call, told).await
        }
        "ListLoras" => {
            let model = model_of(shared, &call);
            let told = async |_: ListLorasRequest| Ok(adapters(&*model?));
            unary(shared, "vllm.Control/ListLoras", call, told).await
        }
        // The mesh keeps its index itself: it publishes none.
        "GetKvEventSources" => {
            let caller = shared.caller(&call);
            let told = async |_: GetKvEventSourcesRequest| {
                caller.map(|_| GetKvEventSourcesResponse::default())
            };
            unary(shared, "vllm.Control/GetKvEventSources", call, told).await
        }
        _ => return None,
    })
}

fn server_info(shared: &Shared, model: &ServedModel) -> ServerInfo {
    let pool = Pool::of(shared, &model.record.name);
    let facts = &shared.facts;
    let block = model.capabilities.block_tokens;
    ServerInfo {
        engine_version: format!("kvmesh-{}", env!("CARGO_PKG_VERSION")),
        api_version: "vllm".to_owned(),
        instance_id: format!("{}-{:016x}", facts.router_id, facts.incarnation),
        // How workers are spread is theirs.
        parallelism: Some(ParallelismInfo {
            tensor_parallel_size: 1,
            pipeline_parallel_size: 1,
            data_parallel_size: 1,
            data_parallel_rank: 0,
            decode_context_parallel_size: 1,
            world_size: 1,
            data_parallel_size_local: 1,
        }),
        max_model_len: model.record.context_length,
        kv_block_size: block,
        total_kv_blocks: pool.blocks,
        max_running_requests: pool.max_running,
        max_loras: u32::try_from(model.record.adapters.len()).unwrap_or(u32::MAX),
        proto_version: PROTO_VERSION.to_owned(),
        effective_attention_block_size: Some(block.into()),
        ..ServerInfo::default()
    }
}

fn model_info(model: &ServedModel) -> ModelInfo {
    let record = &model.record;
    ModelInfo {
        model_id: record.name.clone(),
        served_model_name: record.name.clone(),
        supports_text_input: true,
        supports_token_ids_input: true,
        supports_lora: !record.adapters.is_empty(),
        ..ModelInfo::default()
    }
}

/// By name; their numbers are of this answer alone.
fn adapters(model: &ServedModel) -> ListLorasResponse {
    let mut names: Vec<&String> = model.record.adapters.keys().collect();
    names.sort_unstable();
    let adapter = |(lora_id, name): (i64, &String)| LoraAdapter {
        lora_id,
        lora_name: name.clone(),
        source_path: String::new(),
    };
    ListLorasResponse {
        adapters: (1..).zip(names).map(adapter).collect(),
    }
}
