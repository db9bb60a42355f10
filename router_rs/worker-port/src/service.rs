//! `kvmesh.v1.Worker` over HTTP/2.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes};
use futures_util::Stream;
use http::{Request, Response};
use kvmesh_wire::v1::{
    DrainRequest, DrainResponse, GetInfoRequest, GetInfoResponse, GetTokenizerRequest, Residue,
    Role, RouterFrame, SetRoleRequest, SetRoleResponse, WorkerPhase,
};
use prost::Message;
use tokio::time::{Sleep, sleep_until};
use tonic::{
    Status, Streaming,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::{Grpc, NamedService},
};
use tonic_prost::ProstCodec;
use tower::{Service, service_fn};

use crate::{
    command,
    event::Event,
    guard::Guard,
    shared::Shared,
    state::{Step, Taken, ended},
};

/// Its full name.
pub(crate) const SERVICE: &str = "kvmesh.v1.Worker";
/// Longest message taken: a Place is as long as routers' `--max-request-bytes`.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Frames of routers come decoded; frames of the worker are bytes, for one may
/// be encoded once and sent to many.
#[derive(Debug)]
struct AttachCodec;

impl Codec for AttachCodec {
    type Encode = Bytes;
    type Decode = RouterFrame;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for AttachCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, frame: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&frame);
        Ok(())
    }
}

impl Decoder for AttachCodec {
    type Item = RouterFrame;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<RouterFrame>, Status> {
        RouterFrame::decode(buffer)
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("not a RouterFrame: {error}")))
    }
}

/// The service; one a connection.
#[derive(Clone)]
pub(crate) struct WorkerService {
    pub(crate) shared: Arc<Shared>,
    pub(crate) guard: Guard,
}

impl NamedService for WorkerService {
    const NAME: &'static str = SERVICE;
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

impl Service<Request<Body>> for WorkerService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        let (_, method) = request.uri().path().rsplit_once('/').unwrap_or_default();
        if let Err(refused) = self.guard.admit(method, &request) {
            return Box::pin(std::future::ready(Ok(refused.into_http())));
        }
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { Ok(answer(shared, request).await) })
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Body>) -> Response<Body> {
    let (_, method) = request.uri().path().rsplit_once('/').unwrap_or_default();
    match method {
        "Attach" => {
            let call = service_fn(|request: tonic::Request<Streaming<RouterFrame>>| {
                attach(Arc::clone(&shared), request.into_inner())
            });
            Grpc::new(AttachCodec)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .streaming(call, request)
                .await
        }
        "GetInfo" => {
            let call =
                service_fn(|_: tonic::Request<GetInfoRequest>| get_info(Arc::clone(&shared)));
            unary().unary(call, request).await
        }
        "GetTokenizer" => {
            let call = service_fn(|request: tonic::Request<GetTokenizerRequest>| {
                if shared.with(|state| state.phase) == WorkerPhase::Loading {
                    return std::future::ready(Err(loading()));
                }
                let files = shared.tokenizer();
                let messages = files.messages(&request.into_inner().known_digest);
                let answers = tokio_stream::iter(messages.map(Ok));
                std::future::ready(Ok::<_, Status>(tonic::Response::new(answers)))
            });
            unary().server_streaming(call, request).await
        }
        "Drain" => {
            let call = service_fn(|request: tonic::Request<DrainRequest>| {
                std::future::ready(Ok(drain(&shared, request.get_ref())))
            });
            unary().unary(call, request).await
        }
        "SetRole" => {
            let call = service_fn(|request: tonic::Request<SetRoleRequest>| {
                std::future::ready(set_role(&shared, request.get_ref()))
            });
            unary().unary(call, request).await
        }
        _ => Status::unimplemented(format!("{SERVICE} has no {method}")).into_http(),
    }
}

fn unary<Q, A>() -> Grpc<ProstCodec<A, Q>>
where
    Q: Message + Default + Send + 'static,
    A: Message + Send + 'static,
{
    Grpc::new(ProstCodec::default()).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

// -- Attach ----------------------------------------------------------------

/// Opens a router's session; the stream that it returns is its sending side.
async fn attach(
    shared: Arc<Shared>,
    mut frames: Streaming<RouterFrame>,
) -> Result<tonic::Response<Outgoing>, Status> {
    let hello = command::hello(frames.message().await?)?;
    if shared.with(|state| state.phase) == WorkerPhase::Loading {
        // What a session begins with is not known yet.
        return Err(loading());
    }
    let (key, stream) = shared
        .with(|state| (!state.closed).then(|| state.open(&hello, Instant::now())))
        .ok_or_else(|| Status::unavailable("the worker has stopped"))??;
    let outgoing = Outgoing {
        shared: Arc::clone(&shared),
        key: key.clone(),
        stream,
        timer: Box::pin(sleep_until(tokio::time::Instant::now())),
        armed: None,
    };
    // Ended with the session, by whoever ends that.
    let reader = tokio::spawn(read(Arc::clone(&shared), (key.clone(), stream), frames));
    shared.with(|state| {
        if let Some(session) = state.streams(&key, stream) {
            session.reader = Some(reader.abort_handle());
        }
    });
    Ok(tonic::Response::new(outgoing))
}

/// Reads a router's commands until its session ends.
async fn read(
    shared: Arc<Shared>,
    (key, stream): (String, u64),
    mut frames: Streaming<RouterFrame>,
) {
    loop {
        let ended = match frames.message().await {
            Ok(Some(frame)) => take_in(&shared, (&key, stream), frame)
                .await
                .err()
                .map(ended),
            Ok(None) | Err(_) => Some(crate::session::End::Quiet),
        };
        if let Some(end) = ended {
            shared.with(|state| {
                if state.streams(&key, stream).is_some() {
                    state.end(&key, end);
                }
            });
            return;
        }
    }
}

/// Takes a command in; waits while too many others wait.
async fn take_in(
    shared: &Shared,
    session: (&str, u64),
    mut frame: RouterFrame,
) -> Result<(), Status> {
    loop {
        let taken = shared.room.notified();
        tokio::pin!(taken);
        // From here on a call for those who wait is not missed.
        taken.as_mut().enable();
        match shared.with(|state| state.command(session, frame, Instant::now()))? {
            Taken::Yes => return Ok(()),
            Taken::Full(back) => frame = *back,
        }
        taken.await;
    }
}

/// The sending side of a session. Dropped when its router is gone.
struct Outgoing {
    shared: Arc<Shared>,
    key: String,
    stream: u64,
    timer: Pin<Box<Sleep>>,
    /// When the timer ends; `None`: it does not matter.
    armed: Option<Instant>,
}

impl Stream for Outgoing {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let now = Instant::now();
            let until = match self
                .shared
                .with(|state| state.next(&self.key, self.stream, now, cx.waker()))
            {
                Step::Frame(frame) => return Poll::Ready(Some(Ok(frame))),
                Step::End(status) => return Poll::Ready(status.map(Err)),
                Step::Wait(until) => until,
            };
            let Some(until) = until else {
                return Poll::Pending;
            };
            if self.armed != Some(until) {
                self.timer.as_mut().reset(until.into());
                self.armed = Some(until);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.armed = None;
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.shared.forget(&self.key, self.stream);
    }
}

// -- unary -----------------------------------------------------------------

/// The record, the load and what is held; the last is known to the process only.
async fn get_info(shared: Arc<Shared>) -> Result<tonic::Response<GetInfoResponse>, Status> {
    let residue = match shared.with(|state| state.phase) {
        // Nothing ran yet, and nobody is there to ask.
        WorkerPhase::Loading | WorkerPhase::WarmingUp => Residue::default(),
        _ => shared
            .ask(|call| Event::InfoWanted { call })
            .await
            .ok_or_else(|| Status::unavailable("the worker does not answer"))?,
    };
    let info = shared.with(|state| state.info(residue, Instant::now()));
    Ok(tonic::Response::new(info))
}

/// Takes no new work; the process ends when idle, if it is asked to.
fn drain(shared: &Shared, request: &DrainRequest) -> tonic::Response<DrainResponse> {
    let grace = Duration::from_millis(request.grace_ms.into());
    let grace = Some(grace).filter(|grace| !grace.is_zero());
    let running = shared.with(|state| {
        if request.stop {
            state.drain();
            state.tell(Event::Stop { grace });
        } else {
            state.drain_within(grace.unwrap_or(state.settings.grace), Instant::now());
        }
        state.running()
    });
    tonic::Response::new(DrainResponse {
        running: u32::try_from(running).unwrap_or(u32::MAX),
    })
}

fn loading() -> Status {
    Status::unavailable("the worker loads its model")
}

fn set_role(
    shared: &Shared,
    request: &SetRoleRequest,
) -> Result<tonic::Response<SetRoleResponse>, Status> {
    let role = Role::try_from(request.role).unwrap_or_default();
    if role == Role::Unspecified {
        return Err(Status::invalid_argument(
            "role is not set; allowed are ROLE_PREFILL, ROLE_DECODE and ROLE_BOTH",
        ));
    }
    shared.with(|state| state.set_role(role));
    Ok(tonic::Response::new(SetRoleResponse { role: role.into() }))
}
