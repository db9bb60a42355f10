//! A generation on its way to a client, with all that is told of it: figures,
//! spans, its line in the log. What its messages become is the face's own.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use kvmesh_wire::v1::{self, generate_response::Event};

use super::calls::CallEnd;
use crate::{
    access::Visit,
    error::RequestError,
    mesh::{GenerationStream, GivenUp, text_of},
    telemetry::{ClassEnd, RequestSpan, StreamFigures, Telemetry, Took},
};

/// The request that a generation answers, for whoever tells of it.
pub(crate) struct Asked {
    /// The call, as figures name it.
    pub(crate) method: &'static str,
    pub(crate) request_id: String,
    pub(crate) arrived: Instant,
}

/// A generation that is being answered. Dropping it before its end is what a
/// client that went away does.
pub(crate) struct Generation {
    stream: GenerationStream,
    asked: Asked,
    id: String,
    telemetry: Arc<Telemetry>,
    figures: StreamFigures,
    ended: bool,
    /// Where its spans are exported.
    span: Option<RequestSpan>,
    /// Counted as its tenant's until it is dropped.
    visit: Option<Visit>,
    /// How its call ends, where the generation outlives a lost connection.
    outlives: Option<CallEnd>,
}

/// What a message is to those who count.
enum Counted {
    Tokens(usize),
    Finished(Took),
    Other,
}

impl Generation {
    pub(crate) fn new(
        stream: GenerationStream,
        telemetry: Arc<Telemetry>,
        asked: Asked,
        (visit, span): (Visit, Option<RequestSpan>),
    ) -> Self {
        Self {
            id: stream.id(),
            stream,
            figures: StreamFigures::new(asked.arrived),
            asked,
            telemetry,
            ended: false,
            span,
            visit: Some(visit),
            outlives: None,
        }
    }

    /// It outlives the connection of this call, where its client asked for that.
    pub(crate) fn outlives(&mut self, call: &CallEnd) {
        if self.stream.can_be_resumed() {
            self.outlives = Some(call.clone());
        }
    }

    /// Its id, as `Accepted` tells it.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Said when its client reads nothing for too long.
    pub(crate) fn given_up(&self) -> GivenUp {
        self.stream.given_up()
    }

    /// When the tokens of the last message were taken.
    pub(crate) fn taken(&self) -> Instant {
        self.stream.taken()
    }

    /// Lends the next message to `take`. An error and `None` are its end, and are
    /// told of.
    pub(crate) fn poll<R>(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&v1::GenerateResponse) -> R,
    ) -> Poll<Option<Result<R, RequestError>>> {
        // The request's border: a panic of ours ends this stream only.
        #[cfg(test)]
        let (asked, sent) = (self.asked.request_id.clone(), self.figures.count());
        let stream = &mut self.stream;
        let next = guarded(move || {
            #[cfg(test)]
            super::border_tests::panic_where_asked(&asked, Some(sent));
            stream.poll_message(cx)
        });
        let message = match next {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(Some(Ok(message)))) => message,
            Ok(Poll::Ready(Some(Err(error)))) => return self.failed(error),
            Ok(Poll::Ready(None)) => {
                self.end(None);
                return Poll::Ready(None);
            }
            Err(panic) => {
                let error = self.panicked(&*panic);
                return self.failed(error);
            }
        };
        let taken = take(message);
        let counted = match &message.event {
            Some(Event::Tokens(tokens)) => Counted::Tokens(tokens.ids.len()),
            Some(Event::Finished(finished)) => {
                self.telemetry.finished(finished);
                if let Some(span) = &mut self.span {
                    span.finishes(finished.reason());
                }
                Counted::Finished(Took::of(finished))
            }
            _ => Counted::Other,
        };
        match counted {
            Counted::Tokens(count) => {
                let at = self.stream.taken();
                self.figures.tokens(count, at, &self.telemetry);
            }
            Counted::Finished(took) => self.telemetry.judged(&took, &self.stream.held_to()),
            Counted::Other => {}
        }
        Poll::Ready(Some(Ok(taken)))
    }

    fn failed<R>(&mut self, error: RequestError) -> Poll<Option<Result<R, RequestError>>> {
        self.end(Some(&error));
        Poll::Ready(Some(Err(error)))
    }

    fn panicked(&self, panic: &(dyn Any + Send)) -> RequestError {
        let (id, what) = (self.asked.request_id.clone(), text_of(panic));
        let generation = &self.id;
        tracing::error!(event = "panic", request_id = id, %generation, what, "a stream panicked");
        RequestError::Internal {
            id,
            next_index: self.stream.delivered(),
        }
    }

    fn end(&mut self, error: Option<&RequestError>) {
        self.ended = true;
        let outcome = error.map_or("OK", |error| error.code_and_reason().1);
        self.figures.flush(&self.telemetry);
        self.telemetry.ended(self.asked.method, error);
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
            generation = %self.id,
            request_id = %self.asked.request_id,
            attempts = self.stream.attempts(),
            outcome,
            tokens = self.figures.count(),
            total_ms = self.asked.arrived.elapsed().as_secs_f64() * 1e3,
        );
    }
}

fn guarded<R>(run: impl FnOnce() -> R) -> std::thread::Result<R> {
    catch_unwind(AssertUnwindSafe(run))
}

impl Drop for Generation {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // The client reset the call, or its connection went, or we gave it up.
        let error = match self.stream.given_up().was_said() {
            true => RequestError::SlowClient {
                next_index: self.stream.delivered(),
            },
            false => RequestError::Cancelled,
        };
        let cut = self.outlives.as_ref().is_some_and(CallEnd::was_cut);
        if cut && matches!(error, RequestError::Cancelled) {
            self.stream.leave(self.visit.take());
        }
        self.end(Some(&error));
    }
}
