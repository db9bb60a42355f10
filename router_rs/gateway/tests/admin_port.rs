//! A port for operators alone: what is answered there, and what is not.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;

use common::{
    Mesh,
    keys::{KeyFile, sha256, tenant},
    request, with_key,
};
use kvmesh_gateway::{Router, Settings, settings::Layers};
use kvmesh_rpc::v1::{admin_client::AdminClient, inference_client::InferenceClient};
use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::v1::{self, generate_response::Event};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, transport::Channel};

async fn channel(to: SocketAddr) -> Channel {
    let channel = Channel::from_shared(format!("http://{to}")).unwrap();
    channel.connect().await.unwrap()
}

/// The status of a GET, and what it brings.
async fn got(from: SocketAddr, path: &str, key: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(from).await.unwrap();
    let ask = format!(
        "GET {path} HTTP/1.1\r\nhost: router\r\nauthorization: Bearer {key}\r\n\
         connection: close\r\n\r\n"
    );
    socket.write_all(ask.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer)
}

fn admin_of(mesh: &Mesh) -> SocketAddr {
    mesh.router.as_ref().unwrap().admin_address().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_operators_ask_for_is_answered_on_their_port_and_there_only() {
    let apart = json!({"admin_listen": "127.0.0.1:0"});
    let mesh = Mesh::start(vec![MockConfig::default()], apart).await;
    let (clients, operators) = (mesh.address(), admin_of(&mesh));

    // This caller comes from the machine itself, as all do whom a proxy brings.
    let mut admin = AdminClient::new(channel(clients).await);
    let denied = admin.list_workers(v1::ListWorkersRequest::default()).await;
    assert_eq!(denied.unwrap_err().code(), Code::PermissionDenied);
    let drain = v1::DrainWorkerRequest {
        worker_id: "mock".to_owned(),
        force: true,
        ..Default::default()
    };
    let denied = admin.drain_worker(drain).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    let mut admin = AdminClient::new(channel(operators).await);
    let listed = admin.list_workers(v1::ListWorkersRequest::default()).await;
    assert_eq!(listed.unwrap().into_inner().workers.len(), 1);

    let mut strayed = InferenceClient::new(channel(operators).await);
    let refused = strayed.generate(request(1)).await.map(|_| ()).unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    for call in [
        "/vllm.grpc.engine.VllmEngine/GetModelInfo",
        "/vllm.grpc.engine.VllmEngine/Generate",
        "/vllm.Inference/Generate",
        "/vllm.Control/GetServerInfo",
    ] {
        let mut client = tonic::client::Grpc::new(channel(operators).await);
        client.ready().await.unwrap();
        // Empty messages of whatever kind.
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        let path = http::uri::PathAndQuery::from_static(call);
        let refused = client.unary(tonic::Request::new(()), path, codec).await;
        assert_eq!(refused.unwrap_err().code(), Code::Unimplemented, "{call}");
    }

    for (path, on_clients, on_operators) in [
        ("/metrics", 404, 200),
        ("/v1/models", 200, 404),
        ("/health", 200, 200),
        ("/ready", 200, 200),
        ("/version", 200, 200),
    ] {
        assert_eq!(got(clients, path, "").await.0, on_clients, "{path}");
        assert_eq!(got(operators, path, "").await.0, on_operators, "{path}");
    }

    // Names of workers are for those who could ask Admin.
    let mut asked = request(2);
    asked.output.get_or_insert_default().placements = true;
    let mut client = mesh.client().await;
    let mut stream = client.generate(asked).await.unwrap().into_inner();
    let mut placed = 0;
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Event::Placed(place)) = message.event {
            placed += 1;
            assert_eq!(
                (place.prefill_worker, place.decode_worker),
                Default::default()
            );
        }
    }
    assert_eq!(placed, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_operators_keys_their_port_asks_for_one() {
    let section = format!("[operators]\nkeys_sha256 = ['{}']\n", sha256("root"));
    let keys = KeyFile::new(&[tenant("shop", ""), section].concat());
    let mut settings = keys.settings();
    settings["admin_listen"] = json!("127.0.0.1:0");
    let mesh = Mesh::start_for("shop", vec![MockConfig::default()], settings).await;
    let operators = admin_of(&mesh);
    let mut admin = AdminClient::new(channel(operators).await);
    for (key, code, status) in [
        ("", Some(Code::Unauthenticated), 401),
        ("nobody's", Some(Code::Unauthenticated), 401),
        ("shop", Some(Code::PermissionDenied), 403),
        ("root", None, 200),
    ] {
        let asked = with_key(key, v1::GetRouterInfoRequest {});
        let answered = admin.get_router_info(asked).await;
        assert_eq!(answered.err().map(|error| error.code()), code, "{key}");
        assert_eq!(got(operators, "/metrics", key).await.0, status, "{key}");
    }
}

fn started(settings: &Value) -> Result<Router, String> {
    let mut layers = Layers::default();
    layers.add_json("test", &settings.to_string()).unwrap();
    let settings = Settings::resolve(&layers).map_err(|error| error.to_string())?;
    Router::start(&settings).map_err(|error| error.to_string())
}

#[tokio::test]
async fn operators_whom_other_machines_can_reach_need_keys() {
    let tenants = KeyFile::new(&tenant("shop", ""));
    let file = tenants.0.to_str().unwrap();
    let reachable = json!({"listen": "127.0.0.1:0", "admin_listen": "0.0.0.0:0"});
    for keys in [None, Some(file)] {
        let mut settings = reachable.clone();
        settings["api_keys"] = keys.into();
        if keys.is_none() {
            settings.as_object_mut().unwrap().remove("api_keys");
        }
        let refused = started(&settings).err().unwrap();
        for named in [
            "admin_listen",
            "0.0.0.0:0",
            "kvmesh key --operator",
            "insecure",
        ] {
            assert!(refused.contains(named), "{named} is not in: {refused}");
        }
        settings["insecure"] = true.into();
        assert!(started(&settings).unwrap().admin_address().is_some());
    }
    let section = format!("[operators]\nkeys_sha256 = ['{}']\n", sha256("root"));
    let keys = KeyFile::new(&section);
    let mut settings = reachable;
    settings["api_keys"] = keys.0.to_str().unwrap().into();
    assert!(started(&settings).is_ok());
}
