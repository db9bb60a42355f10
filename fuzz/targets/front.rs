//! What clients send to a router: bytes, gRPC messages and HTTP, to a real one
//! over real sockets, with a worker behind it. Each call gets an answer, and the
//! router lives.
#![no_main]

use bytes::Bytes;
use h2::client::SendRequest;
use kvmesh_gateway::{Router, Settings, settings::Layers};
use kvmesh_testkit::mock::{MockConfig, MockWorker};
use libfuzzer_sys::fuzz_target;
use serde_json::json;
use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

/// Longer than anything takes that does not hang.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of an answer after which a client leaves in the middle.
const ENOUGH: usize = 1 << 16;

const CALLS: [&str; 18] = [
    "/kvmesh.v1.Inference/Generate",
    "/kvmesh.v1.Inference/Resume",
    "/kvmesh.v1.Inference/Tokenize",
    "/kvmesh.v1.Inference/ListModels",
    "/kvmesh.v1.Admin/ListWorkers",
    "/kvmesh.v1.Admin/Explain",
    "/kvmesh.v1.Admin/AdvisePools",
    "/kvmesh.v1.Admin/SetWorkerRole",
    "/kvmesh.v1.Admin/GetRouterInfo",
    "/grpc.health.v1.Health/Check",
    "/vllm.grpc.engine.VllmEngine/Generate",
    "/vllm.grpc.engine.VllmEngine/Abort",
    "/vllm.grpc.engine.VllmEngine/GetTokenizer",
    "/vllm.Inference/Generate",
    "/vllm.Inference/GenerateStream",
    "/vllm.Control/Abort",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/no.such/Call",
];
const PATHS: [&str; 8] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/metrics",
    "/health",
];
const HEADERS: [&str; 8] = [
    "grpc-timeout",
    "traceparent",
    "tracestate",
    "x-request-id",
    "authorization",
    "content-type",
    "grpc-encoding",
    "accept-encoding",
];

struct World {
    runtime: Runtime,
    address: SocketAddr,
    http2: SendRequest<Bytes>,
    _router: Router,
    _worker: MockWorker,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let worker = MockWorker::start(MockConfig::default()).expect("a free port on loopback");
    let mut layers = Layers::default();
    let settings = json!({
        "listen": "127.0.0.1:0",
        "workers": [worker.addr().to_string()],
        "threads": 1,
        "max_request_bytes": "64KiB",
        "drain_delay": "0s",
    });
    let read = layers.add_json("fuzz", &settings.to_string());
    read.expect("these are settings");
    let settings = Settings::resolve(&layers).expect("which are allowed");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let router = runtime
        .block_on(async { Router::start(&settings) })
        .expect("a free port on loopback");
    let address = router.address();
    let http2 = runtime.block_on(async {
        let socket = TcpStream::connect(address).await.expect("it listens");
        let shaken = h2::client::handshake(socket).await;
        let (sender, connection) = shaken.expect("it speaks HTTP/2");
        tokio::spawn(connection);
        sender
    });
    let world = World {
        runtime,
        address,
        http2,
        _router: router,
        _worker: worker,
    };
    world.runtime.block_on(ready(world.address));
    world
});

async fn ready(address: SocketAddr) {
    for _ in 0..10_000 {
        let answer = plain(
            address,
            b"GET /ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
            false,
        );
        if answer.await.starts_with(b"HTTP/1.1 200") {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("the router does not become ready");
}

/// Sends bytes, and reads until the other side closes or has said enough. Who says that nothing
/// more will come may be taken for gone, and gets no answer.
async fn plain(address: SocketAddr, bytes: &[u8], is_all: bool) -> Vec<u8> {
    let mut answer = Vec::new();
    let Ok(mut socket) = TcpStream::connect(address).await else {
        return answer;
    };
    // It may close before it has read all of this, or in the middle of an answer.
    if socket.write_all(bytes).await.is_ok() && (!is_all || socket.shutdown().await.is_ok()) {
        let _ = socket.take(ENOUGH as u64).read_to_end(&mut answer).await;
    }
    answer
}

/// A header of the list, with whatever value is one.
fn header(which: u8, value: &[u8]) -> Option<(&'static str, http::HeaderValue)> {
    let name = HEADERS[usize::from(which) % HEADERS.len()];
    Some((name, http::HeaderValue::from_bytes(value).ok()?))
}

async fn grpc(http2: SendRequest<Bytes>, path: &str, head: &[u8], message: &[u8]) {
    let mut call = http::Request::post(format!("http://router{path}"))
        .header("te", "trailers")
        .header("content-type", "application/grpc");
    if let Some((which, value)) = head.split_first()
        && let Some((name, value)) = header(*which, value)
    {
        call = call.header(name, value);
    }
    let call = call.body(()).expect("each part is allowed");
    let mut sender = http2.ready().await.expect("the connection stands");
    let (answer, mut body) = sender.send_request(call, false).expect("as does this one");
    let mut frame = vec![0];
    frame.extend_from_slice(&(message.len() as u32).to_be_bytes());
    frame.extend_from_slice(message);
    // It may have been answered already.
    let _ = body.send_data(frame.into(), true);
    let Ok(answer) = answer.await else {
        return;
    };
    let mut stream = answer.into_body();
    let mut read = 0;
    while let Some(Ok(bytes)) = stream.data().await {
        let _ = stream.flow_control().release_capacity(bytes.len());
        read += bytes.len();
        if read > ENOUGH {
            return;
        }
    }
}

async fn http1(address: SocketAddr, path: &str, head: &[u8], body: &[u8]) {
    let mut request = format!(
        "POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    )
    .into_bytes();
    if let Some((which, value)) = head.split_first()
        && let Some((name, value)) = header(*which, value)
    {
        request.extend_from_slice(name.as_bytes());
        request.extend_from_slice(b": ");
        request.extend_from_slice(value.as_bytes());
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
    request.extend_from_slice(body);
    let answer = plain(address, &request, false).await;
    assert!(answer.starts_with(b"HTTP/1.1 "), "no answer");
}

fuzz_target!(|data: &[u8]| {
    let world = &*WORLD;
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    let which = usize::from(kind >> 2);
    let (head, body) = match rest.split_first() {
        Some((length, rest)) => rest.split_at(usize::from(*length).min(rest.len())),
        None => (rest, rest),
    };
    world.runtime.block_on(async {
        let call = async {
            match kind % 4 {
                0 => {
                    plain(world.address, rest, true).await;
                }
                1 | 2 => grpc(world.http2.clone(), CALLS[which % CALLS.len()], head, body).await,
                _ => http1(world.address, PATHS[which % PATHS.len()], head, body).await,
            }
        };
        let answered = tokio::time::timeout(PATIENCE, call).await;
        answered.expect("an answer in time");
    });
});
