//! What is refused, and how.

use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::{
    smg::grpc::common::{
        GetTokenizerChunk, GetTokenizerRequest, KvEventBatch, SubscribeKvEventsRequest,
    },
    vllm::{
        self, RandomSampling, ResponseOptions,
        grpc::engine::{
            AbortRequest, AbortResponse, EmbedRequest, EmbedResponse, GenerateRequest,
            GenerateResponse, GetLoadsRequest, GetLoadsResponse, GetModelInfoRequest,
            GetModelInfoResponse, GetServerInfoRequest, GetServerInfoResponse, HealthCheckRequest,
            HealthCheckResponse, generate_request::Input, sampling_params::Constraint,
        },
    },
};
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{
    calls::{ABORT, GENERATE, asked, generate, params, streamed, unary, with},
    common::{
        Mesh,
        keys::{KeyFile, tenant},
        with_key,
    },
    inference,
};

async fn mesh() -> Mesh {
    Mesh::start(vec![MockConfig::default()], json!({})).await
}

/// The first field that a status names.
fn field(status: &Status, code: Code) -> String {
    assert_eq!(status.code(), code, "{status}");
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.domain, "kvmesh");
    let violations = status.get_details_bad_request().unwrap().field_violations;
    assert!(status.message().contains(&violations[0].field), "{status}");
    violations[0].field.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fields_are_refused_by_the_names_that_the_client_knows() {
    let mesh = mesh().await;
    let invalid = Code::InvalidArgument;
    let lacking = Code::Unimplemented;
    let engine = |change: fn(&mut GenerateRequest)| {
        let mut request = asked(4, false);
        change(&mut request);
        request
    };
    for (request, code, name) in [
        (
            params(asked(4, true), |p| p.top_p = 2.0),
            invalid,
            "sampling_params.top_p",
        ),
        (
            params(asked(4, true), |p| p.stop = vec![String::new()]),
            invalid,
            "sampling_params.stop[0]",
        ),
        (
            params(asked(4, true), |p| p.logprobs = Some(21)),
            invalid,
            "sampling_params.logprobs",
        ),
        (
            params(asked(4, true), |p| p.n = 129),
            invalid,
            "sampling_params.n",
        ),
        (
            asked(1_000_000, false),
            invalid,
            "sampling_params.max_tokens",
        ),
        (engine(|r| r.input = None), invalid, "input"),
        (
            engine(|r| r.input = Some(Input::Text(String::new()))),
            invalid,
            "text",
        ),
        (
            engine(|r| {
                if let Some(Input::Tokenized(prompt)) = &mut r.input {
                    prompt.input_ids[1] = 1 << 30;
                }
            }),
            invalid,
            "tokenized.input_ids[1]",
        ),
        // The mock worker has neither.
        (
            params(asked(4, true), |p| p.logprobs = Some(1)),
            lacking,
            "sampling_params.logprobs",
        ),
        (
            params(asked(4, true), |p| {
                p.constraint = Some(Constraint::JsonObject(true))
            }),
            lacking,
            "sampling_params.constraint",
        ),
        (
            engine(|r| r.kv_transfer_params_json = Some("{}".to_owned())),
            lacking,
            "kv_transfer_params_json",
        ),
    ] {
        let status = generate(&mesh, request).await.unwrap_err();
        assert_eq!(field(&status, code), name);
    }
    let own = |change: fn(&mut vllm::GenerateRequest)| {
        let mut request = inference::asked(4, ResponseOptions::default());
        change(&mut request);
        request
    };
    for (request, code, name) in [
        (own(|r| r.temperature = Some(-1.0)), invalid, "temperature"),
        (own(|r| r.prompt = None), invalid, "prompt"),
        (
            own(|r| r.lora_name = "none".to_owned()),
            invalid,
            "lora_name",
        ),
        (
            own(|r| {
                r.sampling = Some(RandomSampling {
                    num_sequences: 2,
                    ..RandomSampling::default()
                });
            }),
            invalid,
            "sampling.num_sequences",
        ),
        (
            own(|r| r.truncate_prompt_tokens = 5),
            lacking,
            "truncate_prompt_tokens",
        ),
        (
            own(|r| r.response.as_mut().unwrap().output_logprobs = true),
            lacking,
            "response.output_candidates",
        ),
    ] {
        let answer = unary::<_, vllm::GenerateResponse>(&mesh, inference::WHOLE, request);
        assert_eq!(field(&answer.await.unwrap_err(), code), name);
    }
    let mut request = inference::asked(4, ResponseOptions::default());
    request.model = "unknown".to_owned();
    let answer = unary::<_, vllm::GenerateResponse>(&mesh, inference::WHOLE, request);
    assert_eq!(answer.await.unwrap_err().code(), Code::NotFound);
    let open = mesh.figure("kvmesh_open_streams").await;
    assert_eq!(open, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_mesh_does_is_unimplemented_by_name() {
    let mesh = mesh().await;
    let path = "/vllm.grpc.engine.VllmEngine/Embed";
    let status = unary::<_, EmbedResponse>(&mesh, path, EmbedRequest::default()).await;
    assert_eq!(field(&status.unwrap_err(), Code::Unimplemented), "Embed");
    let path = "/vllm.grpc.engine.VllmEngine/SubscribeKvEvents";
    let ask = SubscribeKvEventsRequest::default();
    let status = streamed::<_, KvEventBatch>(&mesh, path, ask)
        .await
        .map(|_| ());
    assert_eq!(
        field(&status.unwrap_err(), Code::Unimplemented),
        "SubscribeKvEvents"
    );
    for path in [
        "/vllm.grpc.engine.VllmEngine/FlushCache",
        "/vllm.Control/Shutdown",
        "/vllm.Inference/Nothing",
    ] {
        let status = unary::<_, AbortResponse>(&mesh, path, AbortRequest::default()).await;
        assert_eq!(field(&status.unwrap_err(), Code::Unimplemented), path);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_and_a_lost_worker_are_told_as_ever() {
    let quick = json!({"queue_timeout": "300ms"});
    let mut mesh = Mesh::start(vec![MockConfig::default()], quick).await;
    let hour = std::time::Duration::from_secs(3_600);
    mesh.workers[0]
        .faults()
        .set(|plan| plan.delay_first_token = hour);
    let status = generate(&mesh, with(asked(4, true), "grpc-timeout", "50m"));
    assert_eq!(status.await.unwrap_err().code(), Code::DeadlineExceeded);
    let call = streamed::<_, GenerateResponse>(&mesh, GENERATE, asked(4, true));
    let mut answer = call.await.unwrap();
    mesh.wait_figure("kvmesh_open_attempts", 1).await;
    mesh.workers[0].kill();
    let status = answer.message().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.get_details_error_info().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_health_is_told_to_those_without_a_key() {
    let keys = KeyFile::new(&tenant("shop", ""));
    let mesh = Mesh::start_for("shop", vec![MockConfig::default()], keys.settings()).await;
    let service = "/vllm.grpc.engine.VllmEngine";
    let path = "/vllm.grpc.engine.VllmEngine/HealthCheck";
    let told: HealthCheckResponse = unary(&mesh, path, HealthCheckRequest {}).await.unwrap();
    assert!(told.healthy);
    macro_rules! refused {
        ($answer:ty, $path:expr, $message:expr) => {
            let answer = unary::<_, $answer>(&mesh, $path, $message).await;
            assert_eq!(
                answer.unwrap_err().code(),
                Code::Unauthenticated,
                "{}",
                $path
            );
        };
    }
    refused!(GenerateResponse, GENERATE, asked(1, false));
    refused!(AbortResponse, ABORT, AbortRequest::default());
    let path = "/vllm.grpc.engine.VllmEngine/GetModelInfo";
    refused!(GetModelInfoResponse, path, GetModelInfoRequest {});
    let path = "/vllm.grpc.engine.VllmEngine/GetServerInfo";
    refused!(GetServerInfoResponse, path, GetServerInfoRequest {});
    let path = "/vllm.grpc.engine.VllmEngine/GetLoads";
    refused!(GetLoadsResponse, path, GetLoadsRequest::default());
    let path = "/vllm.grpc.engine.VllmEngine/GetTokenizer";
    refused!(GetTokenizerChunk, path, GetTokenizerRequest {});
    let path = "/vllm.grpc.engine.VllmEngine/SubscribeKvEvents";
    refused!(KvEventBatch, path, SubscribeKvEventsRequest::default());
    let path = "/vllm.grpc.engine.VllmEngine/Embed";
    refused!(EmbedResponse, path, EmbedRequest::default());
    let request = inference::asked(1, ResponseOptions::default());
    refused!(vllm::GenerateResponse, inference::WHOLE, request.clone());
    refused!(vllm::GenerateResponse, inference::STREAM, request);
    refused!(
        vllm::AbortResponse,
        "/vllm.Control/Abort",
        vllm::AbortRequest::default()
    );
    let path = "/vllm.Control/GetServerInfo";
    refused!(vllm::ServerInfo, path, vllm::GetServerInfoRequest {});
    refused!(
        vllm::ModelInfo,
        "/vllm.Control/GetModelInfo",
        vllm::GetModelInfoRequest {}
    );
    refused!(
        vllm::ListLorasResponse,
        "/vllm.Control/ListLoras",
        vllm::ListLorasRequest {}
    );
    let path = "/vllm.Control/GetKvEventSources";
    refused!(
        vllm::GetKvEventSourcesResponse,
        path,
        vllm::GetKvEventSourcesRequest {}
    );
    assert!(GENERATE.starts_with(service));
    let (_, ends) = generate(&mesh, with_key("shop", asked(2, false)))
        .await
        .unwrap();
    assert_eq!(ends[0].completion_tokens, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_several_answers_counts_as_its_tenants() {
    let keys = KeyFile::new(&tenant("shop", "concurrency = 2"));
    let mesh = Mesh::start_for("shop", vec![MockConfig::default()], keys.settings()).await;
    let call = |n| with_key("shop", params(asked(2, false), |params| params.n = n));
    let (_, ends) = generate(&mesh, call(2)).await.unwrap();
    assert_eq!(ends.len(), 2);
    // More than may ever be open: coming back would not help.
    let status = generate(&mesh, call(3)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.get_details_retry_info().is_none());
    let bad = status.get_details_bad_request().unwrap().field_violations;
    assert_eq!(bad[0].field, "sampling_params.n");
    assert!(bad[0].description.contains("at most 2"), "{bad:?}");
    assert!(bad[0].description.contains("concurrency"), "{bad:?}");
    // What was counted for it is not any more.
    generate(&mesh, call(2)).await.unwrap();
}
