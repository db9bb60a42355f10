//! Generations as one stream of server-sent events: what is pending when the
//! transport has room becomes one frame.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http_body::Frame;
use kvmesh_wire::v1::{self, generate_response::Event};
use tokio::time::Sleep;

use super::{
    Face, Failure,
    answer::{End, Usage},
    chunk::{self, Beside, ChoiceChunks, StreamChunks},
    generate::Answered,
    logprobs::Scribe,
    parsed::Parsed,
};
use crate::{error::RequestError, mesh::GivenUp, serve::generation::Generation};

/// Bytes gathered before a frame is handed on.
const FRAME_BYTES: usize = 16 << 10;
/// Bytes that a stream keeps for its frames; a chunk of one token has some 250.
const BUFFER_BYTES: usize = 2 << 10;

/// A choice of a stream.
struct Choice {
    /// Until it has ended: what ended waits for no client, and is no longer its tenant's.
    generation: Option<Generation>,
    chunks: ChoiceChunks,
    /// Where log-probabilities are wanted.
    scribe: Option<Scribe>,
    /// Where reasoning and calls are looked for.
    parsed: Option<Parsed>,
    begun: bool,
    first_of_prompt: bool,
}

/// What a message of a choice was.
enum Wrote {
    Tokens,
    End(v1::Usage),
    Nothing,
}

/// What a stream has said.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Said {
    /// Choices run.
    Some,
    /// The last words are written.
    All,
    /// And handed on.
    Done,
}

/// The body of a streaming answer.
pub(crate) struct Events {
    choices: Vec<Choice>,
    chunks: StreamChunks,
    usage: Usage,
    /// Choices that have not ended.
    open: usize,
    /// The choice that a frame begins with.
    next: usize,
    /// Frames are cut from its front, as in `GenerateBody`.
    buffer: BytesMut,
    silence: Option<Silence>,
    said: Said,
}

impl Events {
    /// A stream whose choices answer `n` to a prompt. After `keep_alive` without
    /// an event it says that it lives; zero: never.
    pub(super) fn new(
        face: Face,
        answers: Vec<Answered>,
        n: usize,
        chunks: StreamChunks,
        keep_alive: Duration,
    ) -> Self {
        let choice = |(index, answer): (usize, Answered)| Choice {
            generation: Some(answer.generation),
            chunks: chunks.choice(face, index, answer.prompt_ids),
            scribe: answer.scribe,
            parsed: answer.parsed,
            begun: false,
            first_of_prompt: index % n == 0,
        };
        let choices: Vec<Choice> = answers.into_iter().enumerate().map(choice).collect();
        Self {
            open: choices.len(),
            next: 0,
            choices,
            chunks,
            usage: Usage::default(),
            buffer: BytesMut::with_capacity(BUFFER_BYTES),
            silence: Silence::after(keep_alive),
            said: Said::Some,
        }
    }

    /// Said when the client reads nothing for too long.
    pub(super) fn given_up(&self) -> impl Iterator<Item = GivenUp> {
        let running = self
            .choices
            .iter()
            .filter_map(|one| one.generation.as_ref());
        running.map(Generation::given_up)
    }

    /// Waits for the first event, or for the first sign of life in its place.
    ///
    /// # Errors
    /// What ended it before: nothing has been sent, so that it can be the status
    /// of the whole call.
    pub(super) async fn opened(&mut self) -> Result<(), RequestError> {
        poll_fn(|cx| match self.fill(cx) {
            Poll::Pending => self.poll_silence(cx).map(Ok),
            filled => filled,
        })
        .await
    }

    /// Nothing comes any more.
    pub(crate) fn is_done(&self) -> bool {
        self.said == Said::Done
    }

    /// The next frame.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        if self.said == Said::Done {
            return Poll::Ready(None);
        }
        match self.fill(cx) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => {
                // The others are of no use to a client whose call failed.
                self.choices.clear();
                chunk::error(&Failure::Request(error).json(), &mut self.buffer);
                self.said = Said::All;
            }
            Poll::Pending => ready!(self.poll_silence(cx)),
        }
        if self.said == Said::All {
            self.said = Said::Done;
        }
        Poll::Ready(Some(Frame::data(self.buffer.split().freeze())))
    }

    /// Writes what is at hand. Ready: there is something to be sent.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RequestError>> {
        loop {
            let mut more = false;
            let count = self.choices.len();
            let first = self.next;
            for at in (first..first + count).map(|at| at % count) {
                let choice = &mut self.choices[at];
                while choice.generation.is_some() && self.buffer.len() < FRAME_BYTES {
                    let before = self.buffer.len();
                    match choice.poll(cx, &mut self.buffer) {
                        // Its message held all that was pending: nothing is to be
                        // waited for behind it.
                        Poll::Ready(Some(Ok(Wrote::Tokens))) => {
                            more = true;
                            // Where a frame holds not all of them, the others are in the next.
                            self.next = (at + 1) % count;
                            // Text may be held until it is known what it becomes: to who
                            // waits that is silence.
                            if self.buffer.len() > before
                                && let (Some(silence), Some(taken)) =
                                    (&mut self.silence, choice.taken())
                            {
                                silence.since = taken;
                            }
                            break;
                        }
                        Poll::Ready(Some(Ok(Wrote::End(usage)))) => {
                            self.usage.add(&usage, choice.first_of_prompt);
                        }
                        Poll::Ready(Some(Ok(Wrote::Nothing))) => {}
                        Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                        Poll::Ready(None) => {
                            choice.generation = None;
                            self.open -= 1;
                        }
                        Poll::Pending => break,
                    }
                }
            }
            if self.open == 0 && self.said == Said::Some {
                self.chunks.end(&self.usage, &mut self.buffer);
                self.said = Said::All;
            }
            if !self.buffer.is_empty() {
                return Poll::Ready(Ok(()));
            }
            // Tokens without text of their own: who has no more wakes us.
            if !more {
                return Poll::Pending;
            }
        }
    }

    /// Ready: it was silent for too long, and says so.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(silence) = &mut self.silence else {
            return Poll::Pending;
        };
        ready!(silence.poll(cx));
        chunk::comment(&mut self.buffer);
        Poll::Ready(())
    }
}

impl Choice {
    /// When its last tokens were taken.
    fn taken(&self) -> Option<Instant> {
        self.generation.as_ref().map(Generation::taken)
    }

    /// Writes its next message.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut BytesMut,
    ) -> Poll<Option<Result<Wrote, RequestError>>> {
        let Self {
            generation,
            chunks,
            scribe,
            parsed,
            begun,
            ..
        } = self;
        let Some(generation) = generation else {
            return Poll::Ready(None);
        };
        generation.poll(cx, |message| {
            let mut begin = |begun: &mut bool, out: &mut BytesMut| {
                if !std::mem::replace(begun, true) {
                    chunks.role(out);
                }
            };
            match &message.event {
                Some(Event::Accepted(accepted)) => {
                    chunks.prompt(accepted.prompt_tokens);
                    Wrote::Nothing
                }
                Some(Event::Tokens(tokens)) => {
                    begin(begun, out);
                    chunks.came(tokens.ids.len());
                    let logprobs = scribe.as_mut().map(|scribe| {
                        let mut told = scribe.empty();
                        scribe.add(tokens, &mut told);
                        told
                    });
                    // To be told also where there is no text.
                    let told = logprobs.is_some() || chunks.tells_ids();
                    let ids = tokens.ids.as_slice();
                    let mut beside = told.then_some(Beside { logprobs, ids });
                    let mut rest = tokens.text.as_str();
                    if let Some(parsed) = parsed {
                        // The first part has that of all.
                        parsed.push(rest, false, |part| {
                            chunks.part(&part, beside.take().as_ref(), out);
                        });
                        rest = "";
                    }
                    if beside.is_some() || !rest.is_empty() {
                        chunks.text(rest, beside.as_ref(), out);
                    }
                    Wrote::Tokens
                }
                Some(Event::Finished(finished)) => {
                    begin(begun, out);
                    let mut rest = finished.text.as_str();
                    let mut end = End::of(finished);
                    if let Some(parsed) = parsed {
                        parsed.push(rest, true, |part| chunks.part(&part, None, out));
                        rest = "";
                        end = end.of_calls(parsed.called());
                    }
                    chunks.end(rest, &end, out);
                    Wrote::End(finished.usage.unwrap_or_default())
                }
                _ => Wrote::Nothing,
            }
        })
    }
}

/// How long nothing was said.
struct Silence {
    most: Duration,
    /// The last event, or the last sign of life.
    since: Instant,
    /// Looks now and then, and not anew for each event.
    timer: Pin<Box<Sleep>>,
}

impl Silence {
    fn after(most: Duration) -> Option<Self> {
        (!most.is_zero()).then(|| Self {
            most,
            since: Instant::now(),
            timer: Box::pin(tokio::time::sleep(most)),
        })
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            let told = now.saturating_duration_since(self.since) >= self.most;
            if told {
                self.since = now;
            }
            self.timer.as_mut().reset((self.since + self.most).into());
            if told {
                return Poll::Ready(());
            }
        }
    }
}
