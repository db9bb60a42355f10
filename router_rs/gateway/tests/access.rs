//! Keys and the limits of tenants, over real sockets.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{
    Client, Mesh, call, h2_connection,
    keys::{KeyFile, sha256, tenant},
    narrow, read, request, with_key,
};
use kvmesh_rpc::v1::admin_client::AdminClient;
use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::v1::{self, Role};
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt;

fn reason(status: &Status) -> (Code, String) {
    let info = status
        .get_details_error_info()
        .expect("every status carries ErrorInfo");
    assert_eq!(info.domain, "kvmesh");
    (status.code(), info.reason)
}

fn unauthenticated(status: &Status) {
    assert_eq!(
        reason(status),
        (Code::Unauthenticated, "UNAUTHENTICATED".to_owned())
    );
    // Nothing about the cluster.
    assert!(status.get_details_error_info().unwrap().metadata.is_empty());
    assert!(!status.message().contains("mock"), "{status}");
}

/// The wait of one that has too much.
fn limited(status: &Status) -> Duration {
    let wanted = (Code::ResourceExhausted, "TENANT_LIMIT".to_owned());
    assert_eq!(reason(status), wanted, "{status}");
    let retry = status.get_details_retry_info().expect("RetryInfo");
    let pushback = status.metadata().get("grpc-retry-pushback-ms").unwrap();
    let ms = retry.retry_delay.unwrap().as_millis().to_string();
    assert_eq!(pushback.to_str().unwrap(), ms);
    retry.retry_delay.unwrap()
}

async fn refused(client: &mut Client, key: &str) -> Status {
    client
        .generate(with_key(key, request(1)))
        .await
        .map(|_| ())
        .unwrap_err()
}

async fn generated(client: &mut Client, key: &str) -> Vec<u32> {
    let answer = client.generate(with_key(key, request(2))).await.unwrap();
    let (ids, end) = read(answer.into_inner()).await;
    end.unwrap();
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_known_key_nothing_is_answered_and_nothing_is_told() {
    let keys = KeyFile::new(&tenant("shop", ""));
    let mesh = Mesh::start_for("shop", vec![MockConfig::default()], keys.settings()).await;
    let mut client = mesh.client().await;
    let digest = sha256("shop");
    for key in ["", "another", digest.as_str()] {
        unauthenticated(&refused(&mut client, key).await);
        let asked = with_key(key, v1::TokenizeRequest::default());
        unauthenticated(&client.tokenize(asked).await.unwrap_err());
        let asked = with_key(key, v1::ListModelsRequest {});
        unauthenticated(&client.list_models(asked).await.unwrap_err());
        let asked = with_key(key, v1::ResumeRequest::default());
        unauthenticated(&client.resume(asked).await.map(|_| ()).unwrap_err());
    }
    let mut other_scheme = tonic::Request::new(request(1));
    let value = "Basic shop".parse().unwrap();
    other_scheme.metadata_mut().insert("authorization", value);
    unauthenticated(&client.generate(other_scheme).await.map(|_| ()).unwrap_err());
    assert_eq!(generated(&mut client, "shop").await.len(), 2);
    let by_step = "kvmesh_rejected_total{step=\"access\",reason=\"UNAUTHENTICATED\"}";
    mesh.wait_figure(by_step, 13).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_key_is_asked_for_before_room_and_before_a_byte_is_read() {
    let keys = KeyFile::new(&tenant("shop", "concurrency = 1"));
    let mut settings = narrow();
    settings["api_keys"] = keys.settings()["api_keys"].clone();
    let mesh = Mesh::start_for("shop", vec![MockConfig::default()], settings).await;
    // Announced, never sent, and far beyond what may be sent.
    let mut sender = h2_connection(&mesh).await.ready().await.unwrap();
    let (response, mut body) = sender.send_request(call(), false).unwrap();
    let mut prefix = vec![0];
    prefix.extend((20u32 << 20).to_be_bytes());
    // Refused for its head alone, it may be over by now.
    let _ = body.send_data(prefix.into(), false);
    assert_eq!(response.await.unwrap().headers()["grpc-status"], "16");
    // The budget is spent by nobody's call: there is no key to it.
    assert_eq!(mesh.figure("kvmesh_request_bytes_held").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_over_its_limit_hears_when_to_come_back_and_others_feel_nothing() {
    let keys = KeyFile::new(&[tenant("busy", "concurrency = 2"), tenant("other", "")].concat());
    let slow = MockConfig {
        step: Duration::from_millis(5),
        ..MockConfig::default()
    };
    let mesh = Mesh::start_for("other", vec![slow], keys.settings()).await;
    let mut client = mesh.client().await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let call = with_key("busy", request(2_000));
        streams.push(client.generate(call).await.unwrap().into_inner());
    }
    limited(&refused(&mut client, "busy").await);
    assert_eq!(generated(&mut client, "other").await.len(), 2);
    // One whose stream is reset gives its place back.
    drop(streams.pop());
    mesh.wait_figure("kvmesh_open_streams", 1).await;
    let until = Instant::now() + Duration::from_secs(60);
    let answer = loop {
        match client.generate(with_key("busy", request(2))).await {
            Ok(answer) => break answer,
            Err(status) => limited(&status),
        };
        assert!(Instant::now() < until, "its place never came back");
    };
    assert_eq!(read(answer.into_inner()).await.0.len(), 2);
    assert!(mesh.figure("kvmesh_rejected_total{step=\"tenant\"").await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_keys_an_address_is_a_tenant_with_the_routers_limits() {
    let mesh = Mesh::start(
        vec![MockConfig::default()],
        json!({"tenant_requests_per_s": 0.001}),
    )
    .await;
    let mut client = mesh.client().await;
    assert_eq!(generated(&mut client, "").await.len(), 2);
    // A thousand seconds from now; nobody is told to wait for more than a minute.
    assert_eq!(
        limited(&refused(&mut client, "").await),
        Duration::from_secs(60)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_share_no_prefix_unless_their_salts_are_one() {
    let keys = KeyFile::new(
        &[
            tenant("one", ""),
            tenant("two", ""),
            tenant("three", "salt = 'one'"),
        ]
        .concat(),
    );
    let mesh = Mesh::start_for("one", vec![MockConfig::default()], keys.settings()).await;
    let mut client = mesh.client().await;
    let mut seen = Vec::new();
    for (key, salt) in [("one", ""), ("one", "mine"), ("two", ""), ("three", "")] {
        let mut asked = request(1);
        asked.hints.get_or_insert_default().cache_salt = salt.to_owned();
        let answer = client.generate(with_key(key, asked)).await.unwrap();
        read(answer.into_inner()).await.1.unwrap();
        let place = mesh.workers[0].last_place().unwrap();
        seen.push((place.continuation.unwrap().cache_salt, place.tenant));
    }
    let [plain, own, other, same] = seen.as_slice() else {
        panic!("four were asked");
    };
    assert!(!plain.0.is_empty());
    assert_ne!(plain.0, own.0);
    assert_ne!(plain.0, other.0);
    assert_eq!(plain.0, same.0);
    assert_eq!(plain.1, own.1);
    assert_ne!(plain.1, other.1);
    assert_ne!(plain.1, same.1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_is_taken_and_a_broken_one_changes_nothing() {
    let keys = KeyFile::new(&tenant("old", ""));
    let mesh = Mesh::start_for("old", vec![MockConfig::default()], keys.settings()).await;
    let mut client = mesh.client().await;
    // An empty one is what somebody who is writing leaves for a moment.
    let refused_files = "kvmesh_api_keys_reloads_total{outcome=\"refused\"}";
    for (n, broken) in (1..).zip(["[tenants.x]\nkeys = []", "not toml", ""]) {
        keys.write(broken);
        mesh.wait_figure(refused_files, n).await;
        assert_eq!(generated(&mut client, "old").await.len(), 2);
    }
    keys.write(&tenant("new", ""));
    let until = Instant::now() + Duration::from_secs(60);
    while client
        .list_models(with_key("new", v1::ListModelsRequest {}))
        .await
        .is_err()
    {
        assert!(Instant::now() < until, "the new key never worked");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    unauthenticated(&refused(&mut client, "old").await);
    assert_eq!(generated(&mut client, "new").await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_and_tenants_have_keys_apart() {
    let operators = format!("[operators]\nkeys_sha256 = ['{}']\n", sha256("root"));
    let keys = KeyFile::new(&[tenant("shop", ""), operators].concat());
    let workers = [Role::Prefill, Role::Decode].map(|role| MockConfig {
        role,
        ..MockConfig::default()
    });
    let mesh = Mesh::start_for("shop", workers.into(), keys.settings()).await;
    let mut admin = AdminClient::new(mesh.channel().await);
    let ask = |key| with_key(key, v1::GetRouterInfoRequest {});
    unauthenticated(&admin.get_router_info(ask("")).await.unwrap_err());
    unauthenticated(&admin.get_router_info(ask("nobody's")).await.unwrap_err());
    let denied = (Code::PermissionDenied, "PERMISSION_DENIED".to_owned());
    let status = admin.get_router_info(ask("shop")).await.unwrap_err();
    assert_eq!(reason(&status), denied);
    admin.get_router_info(ask("root")).await.unwrap();
    let mut client = mesh.client().await;
    assert_eq!(reason(&refused(&mut client, "root").await), denied);
    // A file that lacks their section takes no key from them.
    keys.write(&tenant("shop", ""));
    let refused_files = "kvmesh_api_keys_reloads_total{outcome=\"refused\"}";
    mesh.wait_figure(refused_files, 1).await;
    unauthenticated(&admin.get_router_info(ask("")).await.unwrap_err());
    admin.get_router_info(ask("root")).await.unwrap();
    // Names of workers are for operators, from wherever a tenant calls.
    let mut asked = request(2);
    asked.output.get_or_insert_default().placements = true;
    let mut stream = client
        .generate(with_key("shop", asked))
        .await
        .unwrap()
        .into_inner();
    let mut placed = 0;
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(v1::generate_response::Event::Placed(place)) = message.event {
            placed += 1;
            assert_eq!(
                (place.prefill_worker.as_str(), place.decode_worker.as_str()),
                ("", "")
            );
        }
    }
    assert_eq!(placed, 1);
}

#[tokio::test]
async fn a_router_does_not_start_with_keys_that_it_cannot_read() {
    use kvmesh_gateway::{Router, Settings, settings::Layers};
    let broken = KeyFile::new("[tenants.x]");
    let gone = broken.0.with_extension("gone");
    for file in [broken.0.clone(), gone] {
        let mut layers = Layers::default();
        let settings = json!({"listen": "127.0.0.1:0", "api_keys": file.to_str().unwrap()});
        layers.add_json("test", &settings.to_string()).unwrap();
        let error = Router::start(&Settings::resolve(&layers).unwrap())
            .err()
            .unwrap();
        let text = error.to_string();
        assert!(text.starts_with("api_keys: "), "{text}");
        assert!(text.contains(file.to_str().unwrap()), "{text}");
    }
}
