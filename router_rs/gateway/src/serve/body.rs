//! Bodies of answers.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use kvmesh_wire::v1::generate_response::Event;

use super::{calls, grpc, health::Watch, tokens};
use crate::{
    access::Visit,
    error::RequestError,
    mesh::{GenerationStream, text_of},
    telemetry::{ClassEnd, RequestSpan, StreamFigures, Telemetry, Took},
};

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
    stream: GenerationStream,
    /// Frames are cut from its front. Once the transport has sent them all, the
    /// next ones take their place: no allocation a message.
    buffer: BytesMut,
    telemetry: Arc<Telemetry>,
    figures: StreamFigures,
    metadata: HeaderMap,
    request_id: String,
    generation: String,
    arrived: Instant,
    trailers: Option<HeaderMap>,
    done: bool,
    /// Where its spans are exported.
    span: Option<RequestSpan>,
    /// Counted as its tenant's until it is dropped.
    _visit: Visit,
}

impl GenerateBody {
    pub(crate) fn new(
        stream: GenerationStream,
        telemetry: Arc<Telemetry>,
        metadata: HeaderMap,
        request_id: String,
        arrived: Instant,
        (visit, span): (Visit, Option<RequestSpan>),
    ) -> Self {
        Self {
            generation: stream.id(),
            stream,
            buffer: BytesMut::with_capacity(BUFFER_BYTES),
            figures: StreamFigures::new(arrived),
            telemetry,
            metadata,
            request_id,
            arrived,
            trailers: None,
            done: false,
            span,
            _visit: visit,
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
            // The request's border: a panic of ours ends this stream only.
            let (stream, cx) = (&mut self.stream, &mut *cx);
            #[cfg(test)]
            let (asked, sent) = (self.request_id.clone(), self.figures.count());
            let next = guarded(move || {
                #[cfg(test)]
                super::border_tests::panic_where_asked(&asked, Some(sent));
                stream.poll_message(cx)
            });
            let next = match next {
                Ok(next) => next,
                Err(panic) => Poll::Ready(Some(Err(self.panicked(&*panic)))),
            };
            match next {
                Poll::Ready(Some(Ok(message))) => {
                    // A message with tokens holds all that were pending, so
                    // there is nothing to wait for behind it.
                    if let Some(Event::Tokens(tokens)) = &message.event {
                        if !tokens::encode_into(tokens, &mut self.buffer) {
                            grpc::encode_into(message, &mut self.buffer);
                        }
                        let count = tokens.ids.len();
                        let taken = self.stream.taken();
                        self.figures.tokens(count, taken, &self.telemetry);
                        break;
                    }
                    if let Some(Event::Finished(finished)) = &message.event {
                        self.telemetry.finished(finished);
                        if let Some(span) = &mut self.span {
                            span.finishes(finished.reason());
                        }
                        let took = Took::of(finished);
                        grpc::encode_into(message, &mut self.buffer);
                        self.telemetry.judged(&took, &self.stream.held_to());
                        continue;
                    }
                    grpc::encode_into(message, &mut self.buffer);
                }
                Poll::Ready(Some(Err(error))) => {
                    self.end(Some(&error));
                    break;
                }
                Poll::Ready(None) => {
                    self.end(None);
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

    fn panicked(&self, panic: &(dyn Any + Send)) -> RequestError {
        let (id, what) = (self.request_id.clone(), text_of(panic));
        let generation = &self.generation;
        tracing::error!(event = "panic", request_id = id, %generation, what, "a stream panicked");
        RequestError::Internal {
            id,
            next_index: self.stream.delivered(),
        }
    }

    fn end(&mut self, error: Option<&RequestError>) {
        let mut trailers = match error {
            None => grpc::ok_trailers(),
            Some(error) => grpc::trailers(&error.to_status()),
        };
        trailers.extend(self.metadata.clone());
        self.trailers = Some(trailers);
        self.log(error);
    }

    fn log(&mut self, error: Option<&RequestError>) {
        let outcome = error.map_or("OK", |error| error.code_and_reason().1);
        self.figures.flush(&self.telemetry);
        self.telemetry.ended("Generate", error);
        if let Some(error) = error {
            let end = match error {
                RequestError::Cancelled => ClassEnd::Cancelled,
                _ => ClassEnd::Failed,
            };
            self.telemetry.class_ended(self.stream.class(), end);
        }
        if let Some(span) = self.span.take() {
            span.ended(error, self.stream.traced());
        }
        tracing::info!(
            event = "generation_ended",
            generation = %self.generation,
            request_id = %self.request_id,
            attempts = self.stream.attempts(),
            outcome,
            tokens = self.figures.count(),
            total_ms = self.arrived.elapsed().as_secs_f64() * 1e3,
        );
    }
}

fn guarded<R>(run: impl FnOnce() -> R) -> std::thread::Result<R> {
    catch_unwind(AssertUnwindSafe(run))
}

impl Drop for GenerateBody {
    fn drop(&mut self) {
        if self.done || self.trailers.is_some() {
            return;
        }
        // The client reset the call, or its connection went, or we gave it up.
        let error = match self.stream.given_up().was_said() {
            true => RequestError::SlowClient {
                next_index: self.stream.delivered(),
            },
            false => RequestError::Cancelled,
        };
        self.log(Some(&error));
    }
}
