//! A load client that costs little itself: HTTP/2 without a gRPC library, or
//! HTTP/1.1 without an HTTP library, one thread, messages counted and not built.

mod arrivals;
mod attach;
mod histogram;
mod replay;
mod reply;
mod sse;

use std::{
    cell::RefCell,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

pub use arrivals::{Arrival, ArrivalError, Targets, read_arrivals};
pub use attach::{AttachConfig, AttachFigures, attach};
use bytes::{BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
pub use histogram::{Histogram, Summary};
use http::{HeaderMap, Request};
use kvmesh_wire::v1::{GenerateRequest, Stopping, TokenIds, generate_request::Input};
use prost::Message;
pub use replay::{ClassFigures, ReplayConfig, ReplayFigures, replay};
use reply::{Replies, Reply};
use serde::Serialize;
use tokio::{net::TcpStream, task::LocalSet, time::sleep};

use crate::{
    process::{Usage, Watched},
    tokens::TokenFunction,
};

/// Receive windows, so that the client is never what holds a stream up.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// What load to bring.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// An endpoint that serves `kvmesh.v1.Inference`.
    pub target: SocketAddr,
    /// Requests at the same time; each that ends is followed by another.
    pub streams: usize,
    /// One connection for all, or one each.
    pub connection_each: bool,
    /// OpenAI's HTTP/1.1 instead of gRPC: completions of the mock worker, with a
    /// connection for each stream.
    pub http: bool,
    /// Model to ask for.
    pub model: String,
    /// Prompt length, tokens. Prompts differ in their first ids.
    pub prompt_tokens: u32,
    /// Output length, tokens.
    pub max_tokens: u32,
    /// Time before anything counts.
    pub warm_up: Duration,
    /// Time that counts.
    pub window: Duration,
    /// Process whose CPU time in the window is reported.
    pub watch_pid: Option<u32>,
}

/// What came of it. Counts are of the window.
#[derive(Clone, Debug, Serialize)]
pub struct LoadFigures {
    /// From sending a request to its first token, ms.
    pub first_token_ms: Summary,
    /// Between messages with tokens of a stream, ms.
    pub gap_ms: Summary,
    /// Length of the window, s.
    pub seconds: f64,
    /// Tokens received.
    pub tokens: u64,
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// Messages with tokens.
    pub messages: u64,
    /// Messages a token.
    pub messages_per_token: f64,
    /// Requests that began and brought a first token.
    pub requests: u64,
    /// Requests that ended with `finished`.
    pub finished: u64,
    /// Requests that ended otherwise.
    pub errors: u64,
    /// Text of the first error.
    pub first_error: String,
    /// The watched process.
    pub watched: Option<Watched>,
    /// CPU time of this client, share of one core.
    pub own_cpu: f64,
}

/// Why a load could not be brought at all.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The endpoint cannot be reached.
    #[error("cannot connect: {0}")]
    Connect(#[from] std::io::Error),
    /// It does not speak HTTP/2.
    #[error("HTTP/2: {0}")]
    Http(#[from] h2::Error),
    /// A worker refused the session.
    #[error("attach: {0}")]
    Attach(String),
}

#[derive(Debug, Default)]
struct Tally {
    counts: bool,
    first_token: Histogram,
    gap: Histogram,
    tokens: u64,
    messages: u64,
    requests: u64,
    finished: u64,
    errors: u64,
    first_error: String,
}

type Shared = Rc<RefCell<Tally>>;

/// Brings a load from the calling thread; needs a current-thread runtime.
///
/// # Errors
/// Where a connection cannot be made at the start.
pub async fn run(config: LoadConfig) -> Result<LoadFigures, LoadError> {
    LocalSet::new().run_until(bring(config)).await
}

async fn bring(config: LoadConfig) -> Result<LoadFigures, LoadError> {
    let tally = Shared::default();
    let mut tasks = Vec::new();
    let mut shared = None;
    let over_http = if config.http { config.streams } else { 0 };
    for number in 0..over_http {
        let stream = repeat_http(config.clone(), number as u32, Rc::clone(&tally));
        tasks.push(tokio::task::spawn_local(stream));
    }
    for number in over_http..config.streams {
        let sender = match &shared {
            Some(sender) if !config.connection_each => SendRequest::clone(sender),
            _ => {
                let (sender, task) = connect(config.target).await?;
                tasks.push(task);
                shared = Some(sender.clone());
                sender
            }
        };
        let stream = repeat(sender, config.clone(), number as u32, Rc::clone(&tally));
        tasks.push(tokio::task::spawn_local(stream));
    }
    sleep(config.warm_up).await;
    let own = std::process::id();
    let read = |pid: Option<u32>| pid.and_then(|pid| Usage::of(pid).ok());
    let (before, own_before) = (read(config.watch_pid), read(Some(own)));
    let began = Instant::now();
    tally.borrow_mut().counts = true;
    sleep(config.window).await;
    tally.borrow_mut().counts = false;
    let elapsed = began.elapsed();
    let (after, own_after) = (read(config.watch_pid), read(Some(own)));
    for task in tasks {
        task.abort();
    }
    let tally = tally.borrow();
    let seconds = elapsed.as_secs_f64();
    let own_cpu = own_before.zip(own_after).map_or(0.0, |(before, after)| {
        (after.cpu - before.cpu).as_secs_f64() / seconds
    });
    Ok(LoadFigures {
        first_token_ms: tally.first_token.summary(),
        gap_ms: tally.gap.summary(),
        seconds,
        tokens: tally.tokens,
        tokens_per_s: tally.tokens as f64 / seconds,
        messages: tally.messages,
        messages_per_token: tally.messages as f64 / tally.tokens.max(1) as f64,
        requests: tally.requests,
        finished: tally.finished,
        errors: tally.errors,
        first_error: tally.first_error.clone(),
        watched: before
            .zip(after)
            .map(|(before, after)| Watched::between(before, after, tally.tokens)),
        own_cpu,
    })
}

async fn connect(
    target: SocketAddr,
) -> Result<(SendRequest<Bytes>, tokio::task::JoinHandle<()>), LoadError> {
    let stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = h2::client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .handshake(stream)
        .await?;
    let task = tokio::task::spawn_local(async move {
        // Streams of a broken connection report it themselves.
        let _ = connection.await;
    });
    Ok((sender, task))
}

/// One request after another until the load ends.
async fn repeat(sender: SendRequest<Bytes>, config: LoadConfig, number: u32, tally: Shared) {
    let mut round = 0;
    loop {
        let body = request(&config, number, round);
        round += 1;
        if let Err(error) = one(sender.clone(), body, &config, &tally).await {
            tally.borrow_mut().failed(error);
            // A refusing server is asked again, but not in a tight loop.
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// The same over HTTP/1.1.
async fn repeat_http(config: LoadConfig, number: u32, tally: Shared) {
    let tokens = TokenFunction::built_in();
    let (mut kept, mut round) = (None, 0);
    loop {
        let asked = (number, round);
        round += 1;
        let mut counted = Counted::new(&tally);
        let asking = async {
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => sse::Connection::open(config.target)
                    .await
                    .map_err(|error| error.to_string())?,
            };
            connection
                .exchange(&config, &tokens, asked, &mut counted)
                .await?;
            Ok(connection)
        };
        match asking.await {
            Ok(connection) => kept = Some(connection),
            Err(error) => {
                tally.borrow_mut().failed(error);
                sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

impl Tally {
    fn failed(&mut self, error: String) {
        self.errors += u64::from(self.counts);
        if self.first_error.is_empty() {
            self.first_error = error;
        }
    }
}

fn request(config: &LoadConfig, number: u32, round: u32) -> Bytes {
    // Ids that any vocabulary has; the first two make prompts differ.
    let mut ids = vec![16 + number % 200, 16 + round % 200];
    ids.extend((2..config.prompt_tokens).map(|n| 16 + (n * 7 + number) % 200));
    ids.truncate(config.prompt_tokens.max(1) as usize);
    let message = GenerateRequest {
        model: config.model.clone(),
        input: Some(Input::TokenIds(TokenIds { ids })),
        stopping: Some(Stopping {
            max_tokens: config.max_tokens,
            ignore_end_of_text: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    framed(&message)
}

/// A request as a gRPC body has it.
fn framed(message: &GenerateRequest) -> Bytes {
    let mut body = BytesMut::with_capacity(message.encoded_len() + 5);
    body.put_u8(0);
    body.put_u32(message.encoded_len() as u32);
    body.put_slice(&message.encode_to_vec());
    body.freeze()
}

async fn one(
    sender: SendRequest<Bytes>,
    body: Bytes,
    config: &LoadConfig,
    tally: &Shared,
) -> Result<(), String> {
    let mut counted = Counted::new(tally);
    exchange(sender, config.target, body, &mut counted).await
}

/// Counts a request that began while the window was open.
struct Counted<'a> {
    tally: &'a Shared,
    /// When it was sent, where it counts.
    began: Option<Instant>,
    last: Option<Instant>,
}

impl<'a> Counted<'a> {
    fn new(tally: &'a Shared) -> Self {
        Self {
            tally,
            began: None,
            last: None,
        }
    }
}

impl Witness for Counted<'_> {
    fn sent(&mut self, now: Instant) {
        self.began = self.tally.borrow().counts.then_some(now);
    }

    fn came(&mut self, reply: Reply, now: Instant) {
        let mut tally = self.tally.borrow_mut();
        match reply {
            Reply::Tokens(count) => {
                match (self.last, self.began) {
                    (None, Some(began)) => {
                        tally.first_token.add(now - began);
                        tally.requests += 1;
                    }
                    (Some(last), _) if tally.counts => tally.gap.add(now - last),
                    _ => {}
                }
                self.last = Some(now);
                if tally.counts {
                    tally.tokens += count;
                    tally.messages += 1;
                }
            }
            Reply::Finished if tally.counts => tally.finished += 1,
            Reply::Finished | Reply::Other => {}
        }
    }
}

/// Is told what comes of a request.
trait Witness {
    /// It goes out now.
    fn sent(&mut self, now: Instant);
    /// A message came.
    fn came(&mut self, reply: Reply, now: Instant);
}

/// Sends one request and reads its answer to the end.
async fn exchange(
    sender: SendRequest<Bytes>,
    target: SocketAddr,
    body: Bytes,
    witness: &mut impl Witness,
) -> Result<(), String> {
    let text = |error: h2::Error| error.to_string();
    let request = Request::post(format!("http://{target}/kvmesh.v1.Inference/Generate"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(|error| error.to_string())?;
    let mut sender = sender.ready().await.map_err(text)?;
    witness.sent(Instant::now());
    let (response, mut upload) = sender.send_request(request, false).map_err(text)?;
    upload.send_data(body, true).map_err(text)?;
    let response = response.await.map_err(text)?;
    if let Some(error) = grpc_error(response.headers()) {
        return Err(error);
    }
    let mut body = response.into_body();
    let mut replies = Replies::default();
    let mut finished = false;
    while let Some(data) = body.data().await {
        let data = data.map_err(text)?;
        let now = Instant::now();
        // A window of the connection's size is given back as it is read.
        let _ = body.flow_control().release_capacity(data.len());
        let read = replies.feed(data, |reply| {
            finished |= reply == Reply::Finished;
            witness.came(reply, now);
        });
        read.ok_or("the answer is no stream of GenerateResponse")?;
    }
    let trailers = body.trailers().await.map_err(text)?.unwrap_or_default();
    match grpc_error(&trailers) {
        Some(error) => Err(error),
        None if finished => Ok(()),
        None => Err("the stream ended without `finished`".to_owned()),
    }
}

/// The status of headers or trailers, where it is there and not OK.
fn grpc_error(headers: &HeaderMap) -> Option<String> {
    let status = headers.get("grpc-status")?;
    if status == "0" {
        return None;
    }
    let message = headers
        .get("grpc-message")
        .map(|m| m.to_str().unwrap_or(""));
    Some(format!(
        "grpc-status {}: {}",
        status.to_str().unwrap_or("?"),
        message.unwrap_or_default()
    ))
}
