//! A router over mock workers, in this process, on real sockets.
#![allow(dead_code, clippy::unwrap_used)]

pub(crate) mod keys;

use std::time::{Duration, Instant};

use bytes::Bytes;
use kvmesh_gateway::{Router, Settings, settings::Layers};
use kvmesh_rpc::v1::inference_client::InferenceClient;
use kvmesh_testkit::mock::{MockConfig, MockWorker};
use kvmesh_wire::v1::{self, generate_request::Input, generate_response::Event};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Status, transport::Channel};

pub(crate) type Client = InferenceClient<Channel>;

/// A router and its workers.
pub(crate) struct Mesh {
    pub(crate) router: Option<Router>,
    pub(crate) workers: Vec<MockWorker>,
}

impl Mesh {
    /// Starts workers and a router that knows them; waits until it can serve.
    pub(crate) async fn start(workers: Vec<MockConfig>, settings: Value) -> Self {
        Self::start_for("", workers, settings).await
    }

    /// The same where a key is needed to ask.
    pub(crate) async fn start_for(key: &str, workers: Vec<MockConfig>, settings: Value) -> Self {
        let workers: Vec<_> = workers
            .into_iter()
            .map(|c| MockWorker::start(c).unwrap())
            .collect();
        let addresses: Vec<_> = workers.iter().map(|w| w.addr().to_string()).collect();
        let mut layers = Layers::default();
        let base = json!({"listen": "127.0.0.1:0", "workers": addresses, "drain_delay": "0s",
            "local_prefill": "without-prefill-workers"});
        layers.add_json("base", &base.to_string()).unwrap();
        layers.add_json("test", &settings.to_string()).unwrap();
        let router = Router::start(&Settings::resolve(&layers).unwrap()).unwrap();
        let mesh = Self {
            router: Some(router),
            workers,
        };
        if !mesh.workers.is_empty() {
            mesh.wait_ready(key).await;
        }
        mesh
    }

    /// A figure of `/metrics`: the sum of all series that begin so.
    pub(crate) async fn figure(&self, series: &str) -> u64 {
        let text = get(self, "/metrics").await;
        let values = text.lines().filter(|line| line.starts_with(series));
        values
            .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    }

    /// Looks until a figure has a value.
    pub(crate) async fn wait_figure(&self, series: &str, wanted: u64) {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let now = self.figure(series).await;
            if now == wanted {
                return;
            }
            assert!(Instant::now() < until, "{series} is {now}, not {wanted}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub(crate) fn address(&self) -> std::net::SocketAddr {
        self.router.as_ref().unwrap().address()
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address()))
            .unwrap()
            .connect()
            .await
            .unwrap()
    }

    pub(crate) async fn client(&self) -> Client {
        InferenceClient::new(self.channel().await).max_encoding_message_size(usize::MAX)
    }

    pub(crate) async fn wait_ready(&self, key: &str) {
        let mut client = self.client().await;
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let models = client
                .list_models(with_key(key, v1::ListModelsRequest {}))
                .await
                .unwrap()
                .into_inner();
            if models.models.iter().any(|model| model.ready) {
                return;
            }
            assert!(Instant::now() < until, "no model became ready");
            tokio::task::yield_now().await;
        }
    }

    /// Ends the router as SIGTERM would.
    pub(crate) async fn stop(&mut self) {
        let router = self.router.take().unwrap();
        router.stop_token().cancel();
        router.ended().await;
    }
}

/// A call that brings a key, or none.
pub(crate) fn with_key<T>(key: &str, message: T) -> tonic::Request<T> {
    let mut call = tonic::Request::new(message);
    if !key.is_empty() {
        let value = format!("Bearer {key}").parse().unwrap();
        call.metadata_mut().insert("authorization", value);
    }
    call
}

/// Asks over HTTP/1.
pub(crate) async fn get(mesh: &Mesh, path: &str) -> String {
    let mut socket = TcpStream::connect(mesh.address()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: router\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

/// An HTTP/2 connection whose frames are the test's.
pub(crate) async fn h2_connection(mesh: &Mesh) -> h2::client::SendRequest<Bytes> {
    let socket = TcpStream::connect(mesh.address()).await.unwrap();
    let (sender, connection) = h2::client::Builder::new()
        .initial_max_send_streams(10_000)
        // Its own bound on small frames that nobody has read: some 150 by
        // default, less than a step of many streams brings.
        .data_frame_budget(64 << 20)
        .handshake(socket)
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

/// The head of a Generate call.
pub(crate) fn call() -> http::Request<()> {
    http::Request::post("http://router/kvmesh.v1.Inference/Generate")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap()
}

/// Settings with a budget for bytes that one message of 2,000 bytes spends.
pub(crate) fn narrow() -> Value {
    json!({"max_request_bytes": "2KiB", "request_bytes_budget": "2KiB"})
}

/// Spends the budget of [`narrow`]: with a message that is announced, and never
/// sent. Held until the stream is reset.
pub(crate) async fn spend_budget(mesh: &Mesh) -> h2::SendStream<Bytes> {
    let mut sender = h2_connection(mesh).await.ready().await.unwrap();
    let (_, mut body) = sender.send_request(call(), false).unwrap();
    let mut prefix = vec![0];
    prefix.extend(2_000u32.to_be_bytes());
    body.send_data(prefix.into(), false).unwrap();
    mesh.wait_figure("kvmesh_request_bytes_held", 2_048).await;
    body
}

/// A message with gRPC's prefix.
pub(crate) fn framed(message: &v1::GenerateRequest) -> Bytes {
    let message = prost::Message::encode_to_vec(message);
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend(message);
    frame.into()
}

/// A request of token ids for `max_tokens`.
pub(crate) fn request(max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: "mock".to_owned(),
        input: Some(Input::TokenIds(v1::TokenIds { ids: vec![5, 6, 7] })),
        stopping: Some(v1::Stopping {
            max_tokens,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Reads a stream to its end: token ids with checked indices, and how it ended.
pub(crate) async fn read(
    mut stream: tonic::Streaming<v1::GenerateResponse>,
) -> (Vec<u32>, Result<v1::Finished, Status>) {
    let mut ids = Vec::new();
    let mut finished = None;
    let mut first = true;
    loop {
        match stream.message().await {
            Ok(Some(message)) => {
                let event = message.event.unwrap();
                assert_eq!(
                    first,
                    matches!(event, Event::Accepted(_)),
                    "accepted comes first"
                );
                first = false;
                assert!(finished.is_none(), "nothing comes after finished");
                match event {
                    Event::Tokens(tokens) => {
                        assert_eq!(tokens.first_index as usize, ids.len());
                        ids.extend(tokens.ids);
                    }
                    Event::Finished(end) => finished = Some(end),
                    Event::Accepted(_) | Event::Placed(_) => {}
                }
            }
            Ok(None) => return (ids, Ok(finished.expect("a success ends with finished"))),
            Err(status) => return (ids, Err(status)),
        }
    }
}
