//! Generations as the messages of one call.

use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::Frame;
use kvmesh_wire::v1::{self, generate_response::Event};

use super::running::Entered;
use crate::{
    error::RequestError,
    serve::{generation::Generation, grpc},
};

/// Bytes gathered before a frame is handed on.
const FRAME_BYTES: usize = 16 << 10;
/// Bytes that a stream keeps for its frames.
const BUFFER_BYTES: usize = 1 << 10;

/// What the messages of a call look like. Each is told what came of an answer, by its
/// number, and appends what it makes of it.
pub(super) trait Face: Send {
    /// The token ids of the prompt, where they were asked for.
    fn prompt(&mut self, _ids: Vec<u32>) {}
    /// It was admitted.
    fn accepted(&mut self, at: usize, told: &v1::Accepted, out: &mut BytesMut);
    /// More tokens of it.
    fn tokens(&mut self, at: usize, told: &v1::Tokens, out: &mut BytesMut);
    /// Its end.
    fn finished(&mut self, at: usize, told: &v1::Finished, stopped: Stopped, out: &mut BytesMut);
    /// Its caller ended it.
    fn aborted(&mut self, at: usize, out: &mut BytesMut);
}

/// What stopped an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// An end-of-text token of the model.
    EndOfText(u32),
    /// A token of the request.
    Token(u32),
    /// A string of the request, or nothing.
    Other,
}

/// The body of a call with generations.
pub(crate) struct Answers {
    /// Each until it has ended: what ended waits for no client, and is no longer its tenant's.
    generations: Vec<Option<Generation>>,
    face: Box<dyn Face>,
    entered: Entered,
    end_of_text: Vec<u32>,
    /// Those that have not ended.
    open: usize,
    /// The answer that a frame begins with.
    next: usize,
    /// Frames are cut from its front, as in `GenerateBody`.
    buffer: BytesMut,
    metadata: HeaderMap,
    trailers: Option<HeaderMap>,
    done: bool,
}

impl Answers {
    pub(super) fn new(
        generations: Vec<Generation>,
        face: Box<dyn Face>,
        entered: Entered,
        end_of_text: Vec<u32>,
        metadata: HeaderMap,
    ) -> Self {
        Self {
            open: generations.len(),
            generations: generations.into_iter().map(Some).collect(),
            face,
            entered,
            end_of_text,
            next: 0,
            buffer: BytesMut::with_capacity(BUFFER_BYTES),
            metadata,
            trailers: None,
            done: false,
        }
    }

    /// Nothing comes any more.
    pub(crate) fn is_done(&self) -> bool {
        self.done
    }

    /// The next frame.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        if self.done {
            return Poll::Ready(None);
        }
        if self.trailers.is_none() {
            let filled = self.fill(cx);
            if !self.buffer.is_empty() {
                return Poll::Ready(Some(Frame::data(self.buffer.split().freeze())));
            }
            if filled.is_pending() {
                return Poll::Pending;
            }
        }
        self.done = true;
        Poll::Ready(self.trailers.take().map(Frame::trailers))
    }

    /// Writes what is at hand. Ready: there is something to be sent, or it is over.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let mut more = false;
            let count = self.generations.len();
            let first = self.next;
            for at in (first..first + count).map(|at| at % count) {
                while self.generations[at].is_some() && self.buffer.len() < FRAME_BYTES {
                    match self.poll_one(at, cx) {
                        // Its message held all that was pending: nothing is to be waited
                        // for behind it.
                        Poll::Ready(Some(Ok(true))) => {
                            more = true;
                            // Where a frame holds not all of them, the others are in the next.
                            self.next = (at + 1) % count;
                            break;
                        }
                        Poll::Ready(Some(Ok(false))) => {}
                        Poll::Ready(Some(Err(RequestError::Cancelled)))
                            if self.entered.aborted() =>
                        {
                            self.face.aborted(at, &mut self.buffer);
                            self.close(at);
                        }
                        Poll::Ready(Some(Err(error))) => {
                            // The others are of no use to a client whose call failed.
                            self.generations.clear();
                            self.end(grpc::trailers(&error.to_status()));
                            return Poll::Ready(());
                        }
                        Poll::Ready(None) => self.close(at),
                        Poll::Pending => break,
                    }
                }
            }
            if self.open == 0 {
                self.end(grpc::ok_trailers());
                return Poll::Ready(());
            }
            if !self.buffer.is_empty() {
                return Poll::Ready(());
            }
            // Tokens that are kept for the end: who has no more wakes us.
            if !more {
                return Poll::Pending;
            }
        }
    }

    fn close(&mut self, at: usize) {
        self.generations[at] = None;
        self.open -= 1;
    }

    fn end(&mut self, mut trailers: HeaderMap) {
        trailers.extend(std::mem::take(&mut self.metadata));
        self.trailers = Some(trailers);
    }

    /// Writes the next message of an answer. True: it has tokens.
    fn poll_one(
        &mut self,
        at: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<bool, RequestError>>> {
        let Self {
            generations,
            face,
            buffer,
            end_of_text,
            ..
        } = self;
        let Some(generation) = &mut generations[at] else {
            return Poll::Ready(None);
        };
        generation.poll(cx, |message| match &message.event {
            Some(Event::Accepted(accepted)) => {
                face.accepted(at, accepted, buffer);
                false
            }
            Some(Event::Tokens(tokens)) => {
                face.tokens(at, tokens, buffer);
                true
            }
            Some(Event::Finished(finished)) => {
                let stopped = match finished.stop_token_id {
                    Some(id) if end_of_text.contains(&id) => Stopped::EndOfText(id),
                    Some(id) => Stopped::Token(id),
                    None => Stopped::Other,
                };
                face.finished(at, finished, stopped, buffer);
                false
            }
            Some(Event::Placed(_)) | None => false,
        })
    }
}

/// The number of an answer as messages have it.
pub(super) fn index(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

/// Prompt tokens that needed no computing, wherever they were.
pub(super) fn cached(usage: &v1::Usage) -> u32 {
    usage.cached_tokens.saturating_add(usage.pulled_tokens)
}
