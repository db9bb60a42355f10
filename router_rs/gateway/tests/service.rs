//! Health, metrics, admin, shutdown, over real sockets.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use common::{Mesh, get, narrow, read, request, spend_budget};
use kvmesh_rpc::v1::admin_client::AdminClient;
use kvmesh_testkit::{
    mock::{MockConfig, MockWorker},
    vocabulary::Vocabulary,
};
use kvmesh_wire::v1;
use serde_json::json;
use tonic::{Code, codec::CompressionEncoding};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt;

fn ask(service: &str) -> HealthCheckRequest {
    HealthCheckRequest {
        service: service.to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_needs_no_worker_and_knows_what_it_does_not_know() {
    let mesh = Mesh::start(vec![], json!({})).await;
    let mut health = HealthClient::new(mesh.channel().await);
    for service in ["", "kvmesh.v1.Inference", "kvmesh.v1.Admin"] {
        let answer = health.check(ask(service)).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);
    }
    let unknown = health.check(ask("nobody")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    let info = unknown.get_details_error_info().unwrap();
    assert_eq!(
        (info.domain.as_str(), info.reason.as_str()),
        ("kvmesh", "UNKNOWN_SERVICE")
    );
    let mut watch = health.watch(ask("nobody")).await.unwrap().into_inner();
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        ServingStatus::ServiceUnknown
    );
    assert!(get(&mesh, "/health").await.starts_with("HTTP/1.1 200"));
    assert!(get(&mesh, "/ready").await.starts_with("HTTP/1.1 503"));
    assert!(
        get(&mesh, "/version")
            .await
            .contains(env!("CARGO_PKG_VERSION"))
    );
    assert!(get(&mesh, "/nothing").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_other_models_wait_for_no_tokeniser_whose_fetch_hangs() {
    let marks = "<|another|>";
    let late = MockWorker::start(MockConfig {
        model: "late".to_owned(),
        vocabulary: Arc::new(Vocabulary::built_in_for("", &[marks])),
        ..MockConfig::default()
    })
    .unwrap();
    for others in [0, 1] {
        late.faults().set(|plan| plan.hold_tokenizer = true);
        let others: Vec<_> = (0..others)
            .map(|_| MockWorker::start(MockConfig::default()).unwrap())
            .collect();
        let all = others.iter().chain([&late]);
        let workers: Vec<_> = all.map(|worker| worker.addr().to_string()).collect();
        let mesh = Mesh::start(vec![], json!({"workers": workers})).await;
        let live = "kvmesh_sessions{state=\"live\"}";
        mesh.wait_figure(live, workers.len() as u64).await;
        let fetches = "kvmesh_tokenizer_fetches_total";
        mesh.wait_figure(fetches, workers.len() as u64).await;

        let mut health = HealthClient::new(mesh.channel().await);
        for service in ["", "kvmesh.v1.Inference", "kvmesh.v1.Admin"] {
            let answer = health.check(ask(service)).await.unwrap().into_inner();
            assert_eq!(answer.status(), ServingStatus::Serving);
        }
        assert!(get(&mesh, "/health").await.starts_with("HTTP/1.1 200"));
        let mut client = mesh.client().await;
        if others.is_empty() {
            assert!(get(&mesh, "/ready").await.starts_with("HTTP/1.1 503"));
        } else {
            mesh.wait_ready("").await;
            assert!(get(&mesh, "/ready").await.starts_with("HTTP/1.1 200"));
            let stream = client.generate(request(4)).await.unwrap().into_inner();
            assert_eq!(read(stream).await.0.len(), 4);
        }
        let asked = v1::GenerateRequest {
            model: "late".to_owned(),
            ..request(4)
        };
        let told = client.generate(asked.clone()).await.map(|_| ());
        assert_eq!(told.unwrap_err().code(), Code::Unavailable);

        // It was waited for all the same.
        assert_eq!(mesh.figure("kvmesh_tokenizer_failures_total").await, 0);
        late.faults().set(|plan| plan.hold_tokenizer = false);
        let until = Instant::now() + Duration::from_secs(60);
        let stream = loop {
            match client.generate(asked.clone()).await {
                Ok(stream) => break stream.into_inner(),
                Err(status) => assert!(Instant::now() < until, "{status}"),
            }
        };
        assert_eq!(read(stream).await.0.len(), 4);
        assert_eq!(mesh.figure(fetches).await, workers.len() as u64);
    }
}

/// A run of blocks that no other one begins like.
fn stored(number: u64, blocks: u64) -> v1::CacheEvents {
    let chain = (number * blocks..).take(blocks as usize);
    let run = v1::BlocksStored {
        chain: chain
            .map(|at| (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect(),
        ..Default::default()
    };
    let kind = Some(v1::cache_event::Kind::Stored(run));
    v1::CacheEvents {
        first_event: number + 1,
        events: vec![v1::CacheEvent { kind }],
        snapshot: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_memory_of_the_index_is_told_and_stays_below_its_bound() {
    const BOUND: u64 = 1 << 20;
    const RUN: u64 = 1_000;
    let tells = MockConfig {
        cache_events: true,
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![tells], json!({"index_bytes": "1MiB"})).await;
    let [bytes, blocks, gone] =
        ["bytes ", "blocks ", "evicted_blocks_total "].map(|name| format!("kvmesh_index_{name}"));
    let (empty, mut before) = (mesh.figure(&bytes).await, 0);
    for number in 0..100 {
        mesh.workers[0].send_cache(stored(number, RUN));
        let told = (number + 1) * RUN;
        let until = Instant::now() + Duration::from_secs(60);
        // What is known and what went is all that was told.
        loop {
            let text = get(&mesh, "/metrics").await;
            let [held, known, went] = [&bytes, &blocks, &gone].map(|name| {
                let line = text.lines().find(|line| line.starts_with(name.as_str()));
                line.unwrap()
                    .rsplit(' ')
                    .next()
                    .unwrap()
                    .parse::<u64>()
                    .unwrap()
            });
            assert!(held <= BOUND, "{held} bytes after {number} runs");
            if known + went == told {
                if went == 0 {
                    // Eight bytes a value at the least.
                    assert!(held >= empty + 8 * told, "{held} bytes for {told} blocks");
                }
                before = went;
                break;
            }
            assert!(Instant::now() < until, "{known} and {went} of {told}");
        }
    }
    assert!(before > 50 * RUN, "{before} went");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_says_so_first_and_ends_streams_with_their_index() {
    let slow = MockConfig {
        step: Duration::from_millis(5),
        ..MockConfig::default()
    };
    let mut mesh = Mesh::start(vec![slow], json!({"grace": "100ms", "drain_delay": "50ms"})).await;
    let mut health = HealthClient::new(mesh.channel().await);
    let mut watch = health.watch(ask("")).await.unwrap().into_inner();
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        ServingStatus::Serving
    );
    let stream = mesh
        .client()
        .await
        .generate(request(100_000))
        .await
        .unwrap()
        .into_inner();
    let reader = tokio::spawn(read(stream));
    let watcher = tokio::spawn(async move { watch.message().await.unwrap().unwrap().status() });
    mesh.stop().await;
    assert_eq!(watcher.await.unwrap(), ServingStatus::NotServing);
    let (ids, end) = reader.await.unwrap();
    let status = end.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.reason, "SHUTTING_DOWN");
    assert_eq!(info.metadata["next_index"], ids.len().to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_that_it_stops_serves_on_for_the_drain_delay() {
    let mesh = Mesh::start(vec![MockConfig::default()], json!({"drain_delay": "1h"})).await;
    let mut health = HealthClient::new(mesh.channel().await);
    let mut watch = health.watch(ask("")).await.unwrap().into_inner();
    let mut status = async || watch.message().await.unwrap().unwrap().status();
    assert_eq!(status().await, ServingStatus::Serving);
    mesh.router.as_ref().unwrap().stop_token().cancel();
    assert_eq!(status().await, ServingStatus::NotServing);
    assert!(get(&mesh, "/ready").await.starts_with("HTTP/1.1 503"));
    // Balancers need time to hear of it: what they still send is served, also
    // over connections that are new.
    for _ in 0..3 {
        let mut client = mesh.client().await;
        let stream = client.generate(request(4)).await.unwrap().into_inner();
        let (ids, end) = read(stream).await;
        assert_eq!(end.unwrap().reason(), v1::FinishReason::Length);
        assert_eq!(ids.len(), 4);
    }
    let now = health.check(ask("")).await.unwrap().into_inner();
    assert_eq!(now.status(), ServingStatus::NotServing);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_stay_within_their_bound_at_64_workers() {
    let workers = (0..64).map(|_| MockConfig::default()).collect();
    let mesh = Mesh::start(workers, json!({})).await;
    // A model is unknown once every worker has said its own.
    mesh.wait_figure("kvmesh_sessions{state=\"live\"}", 64)
        .await;
    let mut client = mesh.client().await;
    for tokens in 1..20 {
        read(client.generate(request(tokens)).await.unwrap().into_inner())
            .await
            .1
            .unwrap();
        let mut wrong = request(1);
        wrong.model = format!("unknown-{tokens}");
        client.generate(wrong).await.map(|_| ()).unwrap_err();
    }
    let text = get(&mesh, "/metrics").await;
    let series = text
        .lines()
        .filter(|line| line.starts_with("kvmesh_"))
        .count();
    assert!(series > 50, "{text}");
    assert!(series <= 2_000, "{series} series");
    for name in [
        "kvmesh_open_streams 0",
        "kvmesh_open_attempts 0",
        "kvmesh_transfers{state=\"flowing\"} 0",
        "kvmesh_tokenizer_failures_total 0",
        "kvmesh_attempts_total",
        "kvmesh_stale_frames_total",
        "kvmesh_sessions{state=\"live\"}",
        "kvmesh_lane_bytes_total{lane=\"step\"}",
        "kvmesh_rejected_total{step=\"validate\",reason=\"UNKNOWN_MODEL\"} 19",
        "kvmesh_first_token_seconds_bucket",
        "kvmesh_request_bytes_held 0",
    ] {
        assert!(text.contains(name), "{name} is not in\n{text}");
    }
    assert!(!text.contains("unknown-1"), "a client's words are no label");
    assert!(!text.contains("microseconds"), "times are told in seconds");
    let decide = "\nkvmesh_decide_seconds_total ";
    let (_, rest) = text.split_once(decide).expect(decide);
    let decide: f64 = rest.lines().next().unwrap().parse().unwrap();
    // 19 decisions, each of them a good deal shorter than the test may take.
    assert!(decide > 0.0 && decide < 60.0, "{decide} s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_first_token_says_how_far_its_prediction_was_off() {
    // Of these 300 ms the worker's step model knows nothing: a few are predicted.
    let late = MockConfig {
        prefill: Duration::from_millis(300),
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![late], json!({})).await;
    let (name, asked) = ("kvmesh_ttft_prediction_error_ratio", 3);
    let count = format!("{name}_count");
    assert_eq!(mesh.figure(&count).await, 0);
    let mut client = mesh.client().await;
    for _ in 0..asked {
        let stream = client.generate(request(4)).await.unwrap().into_inner();
        read(stream).await.1.unwrap();
    }
    // One that never got a place predicted nothing.
    let mut wrong = request(1);
    wrong.model = "unknown".to_owned();
    client.generate(wrong).await.map(|_| ()).unwrap_err();
    mesh.wait_figure(&count, asked).await;
    let text = get(&mesh, "/metrics").await;
    let sum = format!("\n{name}_sum ");
    let (_, rest) = text.split_once(&sum).expect(&sum);
    let sum: f64 = rest.lines().next().unwrap().parse().unwrap();
    // |predicted / measured - 1|, and nothing takes less than it is made to.
    let mean = sum / asked as f64;
    assert!(mean > 0.8 && mean <= 1.0, "{mean}\n{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_worker_of_a_role_is_drained_only_by_force() {
    let mesh = Mesh::start(vec![MockConfig::default()], json!({"router_id": "r1"})).await;
    let mut admin = AdminClient::new(mesh.channel().await);
    let info = admin
        .get_router_info(v1::GetRouterInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.router_id, "r1");
    let workers = admin
        .list_workers(v1::ListWorkersRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(workers.workers.len(), 1);
    let worker_id = mesh.workers[0].worker_id().to_owned();
    let mut drain = v1::DrainWorkerRequest {
        worker_id,
        ..Default::default()
    };
    let refused = admin.drain_worker(drain.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    drain.force = true;
    admin.drain_worker(drain).await.unwrap();
    let unknown = v1::ExplainRequest {
        generation_id: "0".repeat(32),
    };
    assert_eq!(
        admin.explain(unknown).await.unwrap_err().code(),
        Code::NotFound
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn admin_and_the_list_of_models_answer_while_the_budget_for_bytes_is_spent() {
    let mesh = Mesh::start(vec![MockConfig::default(), MockConfig::default()], narrow()).await;
    let _held = spend_budget(&mesh).await;

    let mut client = mesh.client().await;
    let refused = client.generate(request(1)).await.map(|_| ()).unwrap_err();
    assert_eq!(
        refused.get_details_error_info().unwrap().reason,
        "OVERLOADED"
    );
    let models = client.list_models(v1::ListModelsRequest {}).await.unwrap();
    assert_eq!(models.into_inner().models.len(), 1);
    // Packed messages too: no thread of the text pool is asked.
    let mut admin =
        AdminClient::new(mesh.channel().await).send_compressed(CompressionEncoding::Gzip);
    let listed = admin.list_workers(v1::ListWorkersRequest::default()).await;
    assert_eq!(listed.unwrap().into_inner().workers.len(), 2);
    let drain = v1::DrainWorkerRequest {
        worker_id: mesh.workers[0].worker_id().to_owned(),
        ..Default::default()
    };
    admin.drain_worker(drain).await.unwrap();
    let mut health = HealthClient::new(mesh.channel().await);
    let answer = health.check(ask("")).await.unwrap().into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
    // What stands in for the permit is a bound that no name comes near.
    let long = v1::ExplainRequest {
        generation_id: "0".repeat(5_000),
    };
    let status = admin.explain(long).await.unwrap_err();
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.reason, "MESSAGE_TOO_LARGE");
    assert_eq!(info.metadata["limit"], "4096");
}
