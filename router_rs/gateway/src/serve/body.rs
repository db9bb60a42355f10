//! Bodies of answers.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use kvmesh_wire::v1::{self, generate_response::Event};

use super::{calls, generation::Generation, grpc, health::Watch, tokens};
use crate::{openai::Events, vllm};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Bytes gathered before a frame is handed on.
const FRAME_BYTES: usize = 16 << 10;
/// Bytes that a stream keeps for its frames; a message of one token has some 20.
const BUFFER_BYTES: usize = 1 << 10;

/// The body of any answer.
pub(crate) enum ResponseBody {
    /// Known bytes, perhaps trailers.
    Bytes(Option<Bytes>, Option<HeaderMap>),
    /// A generation.
    Generate(Box<GenerateBody>),
    /// Generations as server-sent events.
    Events(Box<Events>),
    /// Generations in messages of vLLM's.
    Answers(Box<vllm::Answers>),
    /// A tokeniser's files.
    Archive(Box<vllm::Archive>),
    /// A health watch.
    Watch(Box<Watch>),
    /// What tonic's reflection service answers.
    Reflection(tonic::body::Body),
}

impl ResponseBody {
    pub(crate) fn empty() -> Self {
        Self::Bytes(None, None)
    }

    pub(crate) fn bytes(data: Bytes, trailers: Option<HeaderMap>) -> Self {
        Self::Bytes(Some(data).filter(|data| !data.is_empty()), trailers)
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut *self {
            Self::Bytes(data, trailers) => {
                let data = data.take().map(Frame::data);
                let frame = data.or_else(|| trailers.take().map(Frame::trailers));
                Poll::Ready(frame.map(Ok))
            }
            Self::Generate(body) => {
                let polled = body.poll(cx).map(|frame| frame.map(Ok));
                calls::body_was_polled(polled.is_pending());
                polled
            }
            Self::Events(events) => {
                let polled = events.poll(cx).map(|frame| frame.map(Ok));
                calls::body_was_polled(polled.is_pending());
                polled
            }
            Self::Answers(answers) => {
                let polled = answers.poll(cx).map(|frame| frame.map(Ok));
                calls::body_was_polled(polled.is_pending());
                polled
            }
            Self::Archive(archive) => Poll::Ready(archive.next().map(Ok)),
            Self::Watch(watch) => watch.poll(cx).map(|frame| frame.map(Ok)),
            Self::Reflection(body) => Pin::new(body)
                .poll_frame(cx)
                .map(|frame| frame.map(|f| f.map_err(Into::into))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Bytes(data, trailers) => data.is_none() && trailers.is_none(),
            Self::Generate(body) => body.done,
            Self::Events(events) => events.is_done(),
            Self::Answers(answers) => answers.is_done(),
            Self::Archive(archive) => archive.is_done(),
            Self::Watch(_) => false,
            Self::Reflection(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Bytes(data, _) => {
                SizeHint::with_exact(data.as_ref().map_or(0, |data| data.len() as u64))
            }
            _ => SizeHint::default(),
        }
    }
}

/// A generation as the body of an answer: what is pending when the transport
/// has room becomes one frame.
pub(crate) struct GenerateBody {
    generation: Generation,
    /// Frames are cut from its front. Once the transport has sent them all, the
    /// next ones take their place: no allocation a message.
    buffer: BytesMut,
    metadata: HeaderMap,
    trailers: Option<HeaderMap>,
    done: bool,
}

impl GenerateBody {
    pub(crate) fn new(generation: Generation, metadata: HeaderMap) -> Self {
        Self {
            generation,
            buffer: BytesMut::with_capacity(BUFFER_BYTES),
            metadata,
            trailers: None,
            done: false,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        if let Some(trailers) = self.trailers.take() {
            self.done = true;
            return Poll::Ready(Some(Frame::trailers(trailers)));
        }
        if self.done {
            return Poll::Ready(None);
        }
        while self.buffer.len() < FRAME_BYTES {
            let buffer = &mut self.buffer;
            match self.generation.poll(cx, |message| write(message, buffer)) {
                // A message with tokens holds all that were pending, so
                // there is nothing to wait for behind it.
                Poll::Ready(Some(Ok(true))) => break,
                Poll::Ready(Some(Ok(false))) => {}
                Poll::Ready(Some(Err(error))) => {
                    self.end(grpc::trailers(&error.to_status()));
                    break;
                }
                Poll::Ready(None) => {
                    self.end(grpc::ok_trailers());
                    break;
                }
                Poll::Pending if self.buffer.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        if self.buffer.is_empty() {
            return self.poll(cx);
        }
        Poll::Ready(Some(Frame::data(self.buffer.split().freeze())))
    }

    fn end(&mut self, mut trailers: HeaderMap) {
        trailers.extend(std::mem::take(&mut self.metadata));
        self.trailers = Some(trailers);
    }
}

/// Appends a message. True: it has tokens.
fn write(message: &v1::GenerateResponse, buffer: &mut BytesMut) -> bool {
    let tokens = match &message.event {
        Some(Event::Tokens(tokens)) => Some(tokens),
        _ => None,
    };
    if !tokens.is_some_and(|tokens| tokens::encode_into(tokens, buffer)) {
        grpc::encode_into(message, buffer);
    }
    tokens.is_some()
}
