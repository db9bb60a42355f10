//! What is told of the mesh as if it were one engine.

use std::io::Read;

use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::{
    smg::grpc::common::{GetTokenizerChunk, GetTokenizerRequest},
    v1::Role,
    vllm::{
        self,
        grpc::engine::{
            GenerateRequest, GenerateResponse, GetLoadsRequest, GetLoadsResponse,
            GetModelInfoRequest, GetModelInfoResponse, GetServerInfoRequest, GetServerInfoResponse,
            HealthCheckRequest, HealthCheckResponse,
        },
    },
};
use serde_json::json;
use sha2::{Digest, Sha256};
use tonic_health::pb::{
    HealthCheckRequest as Asked, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::{
    calls::{GENERATE, all_gone, asked, streamed, unary, with},
    common::Mesh,
};

const SERVICES: [&str; 3] = [
    "vllm.grpc.engine.VllmEngine",
    "vllm.Inference",
    "vllm.Control",
];

fn worker(role: Role) -> MockConfig {
    MockConfig {
        role,
        pool_blocks: 100,
        max_batch: 8,
        context_length: 4_096,
        ..MockConfig::default()
    }
}

async fn mesh() -> Mesh {
    let workers = vec![
        worker(Role::Prefill),
        worker(Role::Decode),
        worker(Role::Decode),
    ];
    let mesh = Mesh::start(workers, json!({})).await;
    mesh.wait_figure("kvmesh_sessions{state=\"live\"}", 3).await;
    mesh
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_model_is_told_as_far_as_a_router_knows_it() {
    let mesh = mesh().await;
    let path = "/vllm.grpc.engine.VllmEngine/GetModelInfo";
    let told: GetModelInfoResponse = unary(&mesh, path, GetModelInfoRequest {}).await.unwrap();
    let vocabulary = mesh.workers[0].tokens().vocabulary();
    assert_eq!(told.served_model_name, "mock");
    assert_eq!(
        (told.model_path.as_str(), told.tokenizer_path.as_str()),
        ("mock", "mock")
    );
    assert!(told.is_generation && !told.supports_vision);
    assert_eq!(
        (told.max_context_length, told.max_req_input_len),
        (4_096, 4_096)
    );
    assert_eq!(told.vocab_size, vocabulary.size());
    let ends: Vec<i32> = vocabulary
        .end_of_text_ids()
        .iter()
        .map(|id| *id as i32)
        .collect();
    assert_eq!(told.eos_token_ids, ends);

    let path = "/vllm.Control/GetModelInfo";
    let told: vllm::ModelInfo = unary(&mesh, path, vllm::GetModelInfoRequest {})
        .await
        .unwrap();
    assert_eq!(
        (told.model_id.as_str(), told.served_model_name.as_str()),
        ("mock", "mock")
    );
    assert!(told.supports_text_input && told.supports_token_ids_input);
    assert!(!told.supports_lora && !told.supports_multimodal);
    let path = "/vllm.Control/ListLoras";
    let none: vllm::ListLorasResponse =
        unary(&mesh, path, vllm::ListLorasRequest {}).await.unwrap();
    assert!(none.adapters.is_empty());
    let path = "/vllm.Control/GetKvEventSources";
    let none: vllm::GetKvEventSourcesResponse =
        unary(&mesh, path, vllm::GetKvEventSourcesRequest {})
            .await
            .unwrap();
    assert!(none.sources.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_workers_are_told_of_as_one() {
    let mesh = mesh().await;
    let path = "/vllm.grpc.engine.VllmEngine/GetServerInfo";
    let told: GetServerInfoResponse = unary(&mesh, path, GetServerInfoRequest {}).await.unwrap();
    assert_eq!((told.active_requests, told.is_paused), (0, false));
    // Those that decode run requests.
    assert_eq!((told.max_num_seqs, told.block_size), (16, 16));
    assert_eq!(
        (told.data_parallel_size, told.server_type.as_str()),
        (1, "kvmesh")
    );
    assert!(told.uptime_seconds > 0.0 && told.kv_connector.is_empty());

    let path = "/vllm.Control/GetServerInfo";
    let told: vllm::ServerInfo = unary(&mesh, path, vllm::GetServerInfoRequest {})
        .await
        .unwrap();
    assert_eq!((told.max_model_len, told.kv_block_size), (4_096, 16));
    assert_eq!((told.total_kv_blocks, told.max_running_requests), (300, 16));
    assert_eq!(told.parallelism.unwrap().data_parallel_size, 1);
    assert!(!told.instance_id.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loads_are_those_of_the_mesh() {
    let mesh = mesh().await;
    for worker in &mesh.workers {
        worker
            .faults()
            .set(|plan| plan.delay_first_token = std::time::Duration::from_secs(3_600));
    }
    let path = "/vllm.grpc.engine.VllmEngine/GetLoads";
    let loads = async || {
        let told: GetLoadsResponse = unary(&mesh, path, GetLoadsRequest::default())
            .await
            .unwrap();
        assert_eq!((told.dp_rank_count, told.loads.len()), (1, 1));
        assert!(told.timestamp.ends_with('Z'), "{}", told.timestamp);
        told.loads[0]
    };
    let before = loads().await;
    assert_eq!(
        (before.num_total_reqs, before.max_total_num_tokens),
        (0, 4_800)
    );
    assert_eq!((before.token_usage, before.max_running_requests), (0.0, 16));
    let mut running = Vec::new();
    for _ in 0..3 {
        let call = streamed::<_, GenerateResponse>(&mesh, GENERATE, asked(5, true));
        running.push(call.await.unwrap());
    }
    mesh.wait_figure("kvmesh_open_attempts", 3).await;
    // What workers report of it comes with their next loads.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let load = loads().await;
        if load.num_total_reqs >= 3 && load.num_used_tokens > 0 {
            assert!(load.token_usage > 0.0 && load.token_usage < 1.0);
            break;
        }
        assert!(std::time::Instant::now() < until, "{load:?}");
        tokio::task::yield_now().await;
    }
    let path = "/vllm.grpc.engine.VllmEngine/GetServerInfo";
    let told: GetServerInfoResponse = unary(&mesh, path, GetServerInfoRequest {}).await.unwrap();
    assert_eq!(told.active_requests, 3);
    drop(running);
    all_gone(&mesh).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_open_and_what_waits_is_told_of_the_model_that_is_asked_for() {
    let of = |model: &str| MockConfig {
        model: model.to_owned(),
        // Room for one request.
        pool_blocks: 6,
        ..worker(Role::Both)
    };
    let mesh = Mesh::start_for("", vec![of("mock"), of("other")], json!({})).await;
    mesh.wait_figure("kvmesh_sessions{state=\"live\"}", 2).await;
    for worker in &mesh.workers {
        worker
            .faults()
            .set(|plan| plan.delay_first_token = std::time::Duration::from_secs(3_600));
    }
    let mut running = Vec::new();
    for _ in 0..3 {
        let call = with(asked(100, true), "x-kvmesh-model", "mock");
        let call = streamed::<GenerateRequest, GenerateResponse>(&mesh, GENERATE, call);
        running.push(call.await.unwrap());
    }
    mesh.wait_figure("kvmesh_queued_requests", 2).await;
    for (model, open, waiting) in [("mock", 3, 2), ("other", 0, 0)] {
        let path = "/vllm.grpc.engine.VllmEngine/GetServerInfo";
        let asks = with(GetServerInfoRequest {}, "x-kvmesh-model", model);
        let told = unary::<GetServerInfoRequest, GetServerInfoResponse>(&mesh, path, asks);
        let told = told.await.unwrap();
        assert_eq!(told.active_requests, open, "{model}");
        let path = "/vllm.grpc.engine.VllmEngine/GetLoads";
        let asks = with(GetLoadsRequest::default(), "x-kvmesh-model", model);
        let told = unary::<GetLoadsRequest, GetLoadsResponse>(&mesh, path, asks);
        let told = told.await.unwrap();
        // The one that a worker has may count there as waiting, too.
        let more = told.loads[0].num_waiting_reqs - waiting;
        assert!(
            (0..=open as i32 - waiting).contains(&more),
            "{model} {more}"
        );
    }
    drop(running);
    all_gone(&mesh).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tokeniser_comes_as_an_archive_that_says_what_it_is() {
    let mesh = mesh().await;
    let path = "/vllm.grpc.engine.VllmEngine/GetTokenizer";
    let mut archives = Vec::new();
    for _ in 0..2 {
        let call = streamed::<_, GetTokenizerChunk>(&mesh, path, GetTokenizerRequest {});
        let mut parts = call.await.unwrap();
        let (mut bytes, mut sha256) = (Vec::new(), String::new());
        while let Some(part) = parts.message().await.unwrap() {
            assert!(sha256.is_empty(), "the last part has it");
            assert!(part.data.len() <= 64 << 10);
            bytes.extend_from_slice(&part.data);
            sha256 = part.sha256;
        }
        let digest = Sha256::digest(&bytes);
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, sha256);
        archives.push(bytes);
    }
    assert_eq!(archives[0], archives[1]);
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(&archives[0])).unwrap();
    for file in mesh.workers[0].tokens().vocabulary().files() {
        let mut found = Vec::new();
        let mut entry = archive.by_name(&file.name).unwrap();
        entry.read_to_end(&mut found).unwrap();
        assert_eq!(found, file.bytes);
    }
    let ok = "kvmesh_calls_total{method=\"VllmEngine/GetTokenizer\",outcome=\"OK\"}";
    mesh.wait_figure(ok, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_reflection_know_the_services() {
    let mesh = mesh().await;
    let path = "/vllm.grpc.engine.VllmEngine/HealthCheck";
    let told: HealthCheckResponse = unary(&mesh, path, HealthCheckRequest {}).await.unwrap();
    assert!(told.healthy, "{}", told.message);
    let mut health = HealthClient::new(mesh.channel().await);
    for service in SERVICES {
        let service = service.to_owned();
        let answer = health.check(Asked { service }).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);
    }
    let mut reflection = ServerReflectionClient::new(mesh.channel().await);
    let mut ask = async |question: MessageRequest| {
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(question),
        };
        let answer = reflection
            .server_reflection_info(futures_util::stream::iter([request]))
            .await
            .unwrap();
        let message = answer.into_inner().message().await.unwrap().unwrap();
        message.message_response.unwrap()
    };
    let list = MessageRequest::ListServices(String::new());
    let MessageResponse::ListServicesResponse(list) = ask(list).await else {
        panic!("no list");
    };
    let names: Vec<String> = list.service.into_iter().map(|one| one.name).collect();
    for service in SERVICES {
        assert!(names.iter().any(|name| name == service), "{names:?}");
        let file = MessageRequest::FileContainingSymbol(service.to_owned());
        let found = ask(file).await;
        assert!(matches!(found, MessageResponse::FileDescriptorResponse(_)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_model_the_engine_is_not_healthy() {
    let mesh = Mesh::start(vec![], json!({})).await;
    let path = "/vllm.grpc.engine.VllmEngine/HealthCheck";
    let told: HealthCheckResponse = unary(&mesh, path, HealthCheckRequest {}).await.unwrap();
    assert!(!told.healthy && told.message.contains("no model"));
}
