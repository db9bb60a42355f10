//! The border of a request over gRPC, for what no client can bring about: a
//! panic of ours, and a peer that is another machine.
#![allow(clippy::unwrap_used)]

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use kvmesh_rpc::v1::{admin_client::AdminClient, inference_client::InferenceClient};
use kvmesh_testkit::mock::{MockConfig, MockWorker};
use kvmesh_wire::v1::{self, generate_request::Input, generate_response::Event};
use serde_json::json;
use tokio::net::TcpListener;
use tonic::{Code, Request, Status, transport::Channel};
use tonic_types::StatusExt;
use tower::ServiceExt;
use tracing::Level;

use super::{Call, Port, Shared, calls::CallEnd, inference};
use crate::{
    run::Parts,
    settings::{Layers, Settings},
    telemetry::log_lines::LogLines,
};

const IN_ITS_CALL: &str = "panics-in-its-call";
const IN_ITS_STREAM: &str = "panics-in-its-stream";

/// Panics in a request that is named so: in its call, or in its stream once
/// tokens were sent.
pub(super) fn panic_where_asked(request_id: &str, sent: Option<u64>) {
    let asked = match sent {
        None => request_id == IN_ITS_CALL,
        Some(sent) => request_id == IN_ITS_STREAM && sent > 0,
    };
    assert!(!asked, "planted");
}

/// A router's shared part whose callers all seem to come from `peer`.
struct Served {
    channel: Channel,
    _worker: MockWorker,
}

impl Served {
    async fn for_peer(peer: SocketAddr) -> Self {
        Self::with(peer, &json!({})).await
    }

    /// With more settings.
    async fn with(peer: SocketAddr, more: &serde_json::Value) -> Self {
        let worker = MockWorker::start(MockConfig {
            step: std::time::Duration::from_millis(1),
            ..MockConfig::default()
        })
        .unwrap();
        let mut layers = Layers::default();
        let settings = json!({"workers": [worker.addr().to_string()]});
        layers.add_json("test", &settings.to_string()).unwrap();
        layers.add_json("test", &more.to_string()).unwrap();
        let settings = Settings::resolve(&layers).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let parts = Parts::assemble(&settings, address).unwrap();
        tokio::spawn(serve(Arc::clone(&parts.shared), listener, peer));
        let to = Channel::from_shared(format!("http://{address}")).unwrap();
        let channel = to.connect().await.unwrap();
        while !parts.shared.mesh.models().iter().any(|model| model.ready) {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        Self {
            channel,
            _worker: worker,
        }
    }
}

async fn serve(shared: Arc<Shared>, listener: TcpListener, peer: SocketAddr) {
    let (socket, _) = listener.accept().await.unwrap();
    let service = service_fn(|request| {
        let answer = Arc::clone(&shared).answer(request, (peer, Port::Clients), CallEnd::default());
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let connection = http2::Builder::new(TokioExecutor::new());
    // It ends with its client.
    let _ = connection
        .serve_connection(TokioIo::new(socket), service)
        .await;
}

/// What the line of a panic says, by the id of its request.
fn panic_of(lines: &LogLines, request_id: &str) -> Option<String> {
    let mut lines = lines.all().into_iter();
    let line = lines.find(|line| line["event"] == "panic" && line["request_id"] == request_id)?;
    Some(line["what"].as_str()?.to_owned())
}

fn named(request_id: &str) -> Request<v1::GenerateRequest> {
    let mut request = Request::new(v1::GenerateRequest {
        input: Some(Input::TokenIds(v1::TokenIds { ids: vec![5, 6, 7] })),
        stopping: Some(v1::Stopping {
            max_tokens: 1_000,
            ..Default::default()
        }),
        ..Default::default()
    });
    let id = request_id.parse().unwrap();
    request.metadata_mut().insert("x-request-id", id);
    request
}

fn assert_internal(status: &Status, id: &str, next_index: usize, lines: &LogLines) {
    assert_eq!(status.code(), Code::Internal, "{status}");
    assert!(!status.message().contains("planted"), "{status}");
    let info = status.get_details_error_info().unwrap();
    assert_eq!(
        (info.domain.as_str(), info.reason.as_str()),
        ("kvmesh", "INTERNAL")
    );
    assert_eq!(info.metadata["next_index"], next_index.to_string());
    // The id that the client quotes finds what happened.
    assert_eq!(info.metadata["id"], id);
    assert_eq!(
        panic_of(lines, &info.metadata["id"]).as_deref(),
        Some("planted")
    );
}

#[tokio::test]
async fn a_panic_ends_one_call_with_an_id_that_the_log_has() {
    let (lines, _guard) = LogLines::at(Level::INFO);
    let served = Served::for_peer(SocketAddr::from(([127, 0, 0, 1], 1))).await;
    let mut client = InferenceClient::new(served.channel.clone());
    let status = client.generate(named(IN_ITS_CALL)).await.map(|_| ());
    assert_internal(&status.unwrap_err(), IN_ITS_CALL, 0, &lines);

    let stream = client.generate(named(IN_ITS_STREAM)).await.unwrap();
    let (mut stream, mut sent) = (stream.into_inner(), 0);
    let status = loop {
        match stream.message().await {
            Ok(message) => {
                if let Some(Event::Tokens(tokens)) = message.unwrap().event {
                    sent += tokens.ids.len();
                }
            }
            Err(status) => break status,
        }
    };
    assert!(sent > 0);
    assert_internal(&status, IN_ITS_STREAM, sent, &lines);

    let mut other = client.generate(named("other")).await.unwrap().into_inner();
    while let Some(message) = other.message().await.unwrap() {
        if let Some(Event::Finished(finished)) = message.event {
            assert_eq!(finished.usage.unwrap().output_tokens, 1_000);
        }
    }
}

/// Asks for a completion over plain HTTP; its status and its body.
async fn complete(served: &Served, request_id: &str, stream: bool) -> (u16, String) {
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 1_000, "stream": stream}).to_string();
    let asked = http::Request::post("http://router/v1/completions")
        .header("content-type", "application/json")
        .header("x-request-id", request_id)
        .body(tonic::body::Body::new(Full::from(body)))
        .unwrap();
    let answer = served.channel.clone().oneshot(asked).await.unwrap();
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn a_panic_behind_plain_http_ends_one_call_with_an_id_that_the_log_has() {
    let (lines, _guard) = LogLines::at(Level::INFO);
    let served = Served::for_peer(SocketAddr::from(([127, 0, 0, 1], 1))).await;
    for (id, stream, status) in [
        (IN_ITS_CALL, false, 500),
        (IN_ITS_STREAM, false, 500),
        (IN_ITS_STREAM, true, 200),
    ] {
        let (told, body) = complete(&served, id, stream).await;
        assert_eq!(told, status, "{body}");
        let last = body.trim_end().lines().last().unwrap();
        let last: serde_json::Value =
            serde_json::from_str(last.strip_prefix("data: ").unwrap_or(last)).unwrap();
        assert_eq!(last["error"]["code"], "internal");
        let message = last["error"]["message"].as_str().unwrap();
        assert!(message.contains(id) && !message.contains("planted"));
        assert_eq!(panic_of(&lines, id).as_deref(), Some("planted"));
    }
    assert_eq!(complete(&served, "other", false).await.0, 200);
}

/// A call of Resume of which nothing comes after its headers; its gRPC status.
async fn resume_without_a_word(served: &Served) -> String {
    let nothing = stream::pending::<Result<Frame<Bytes>, Infallible>>();
    let asked = http::Request::post("http://router/kvmesh.v1.Inference/Resume")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(StreamBody::new(nothing)))
        .unwrap();
    let answer = served.channel.clone().oneshot(asked);
    let answer = tokio::time::timeout(Duration::from_secs(20), answer).await;
    let answer = answer.expect("it is answered unread").unwrap();
    let status = answer.headers().get("grpc-status").unwrap();
    status.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_call_of_resume_over_a_rate_of_its_tenant_is_refused_unread() {
    for rate in ["tenant_resumes_per_s", "tenant_requests_per_s"] {
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        // One, and no more for a quarter of an hour.
        let served = Served::with(peer, &json!({rate: 0.001})).await;
        let mut client = InferenceClient::new(served.channel.clone());
        let first = client.resume(v1::ResumeRequest {
            generation_id: "07".repeat(16),
            ..v1::ResumeRequest::default()
        });
        let unknown = first.await.map(|_| ()).unwrap_err();
        assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
        let exhausted = (Code::ResourceExhausted as i32).to_string();
        assert_eq!(resume_without_a_word(&served).await, exhausted, "{rate}");
    }
}

#[tokio::test]
async fn admin_answers_this_machine_only_and_tells_others_nothing() {
    for (peer, may) in [([127, 0, 0, 1], true), ([203, 0, 113, 5], false)] {
        let served = Served::for_peer(SocketAddr::from((peer, 1))).await;
        let mut admin = AdminClient::new(served.channel.clone());
        let listed = admin.list_workers(v1::ListWorkersRequest::default()).await;
        assert_eq!(listed.is_ok(), may, "{peer:?}: {listed:?}");
        let Err(status) = listed else { continue };
        assert_eq!(status.code(), Code::PermissionDenied);
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.reason, "PERMISSION_DENIED");
        assert!(info.metadata.is_empty(), "{info:?}");
        // A client from there is served all the same.
        let mut client = InferenceClient::new(served.channel.clone());
        client.list_models(v1::ListModelsRequest {}).await.unwrap();
    }
}

/// Each function that has room for a future twice doubles what a call allocates and copies
/// before it does anything.
#[test]
fn a_call_takes_little_room() {
    type Came = (SocketAddr, Port);
    fn border<F>(_: impl Fn(Arc<Shared>, http::Request<Incoming>, Came, CallEnd) -> F) -> usize {
        size_of::<F>()
    }
    fn service<'a, F>(_: impl Fn(&'a Arc<Shared>, &'a str, Call) -> F) -> usize {
        size_of::<F>()
    }
    let rooms = (border(Shared::answer), service(inference::call));
    assert!(rooms.0.max(rooms.1) <= 8_192, "{rooms:?}");
}
