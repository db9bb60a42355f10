//! What a client reads: pending ids become one message when it is asked for.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use futures_util::Stream;
use kvmesh_session::{
    generation::{Event, Outcome, Stop},
    parse::FinishReason,
};
use kvmesh_text::TextStream;
use kvmesh_wire::v1::{self, generate_response::Event as Message};

use super::{
    GivenUp,
    open::{Batch, Open, Traced},
    resume::ResumeAsked,
};
use crate::{access::Visit, error::RequestError, telemetry::HeldTo};

/// One generation's answer. Dropping it cancels the generation on its workers, unless it
/// was said that it is left, or another stream has it now.
pub struct GenerationStream {
    open: Arc<Open>,
    /// Its number among the streams of the generation.
    reader: u32,
    given_up: GivenUp,
    /// Its connection is gone: the generation goes on for a while, with what its tenant's
    /// limit counts of it.
    left: Option<Option<Visit>>,
    /// When the call came that goes on with another one's generation.
    resumed: Option<Instant>,
    accepted: Option<v1::Accepted>,
    /// `None` where the request wants no text.
    text: Option<TextStream>,
    /// Taken from the generation, not handed out yet.
    pending: Batch,
    /// The last message. Its ids and text keep their memory, so that a message
    /// of tokens allocates nothing.
    message: v1::GenerateResponse,
    /// The stop string that ended the text.
    stopped: Option<String>,
    /// When `pending` was taken.
    taken: Instant,
    /// Tokens handed out.
    delivered: u32,
    done: bool,
}

impl GenerationStream {
    pub(super) fn new(open: Arc<Open>, text: Option<TextStream>) -> Self {
        let had = open.request.output_ids.clone();
        Self::after(open, 0, text, &had)
    }

    /// The stream of a client that had another one before.
    pub(super) fn resumed(
        open: Arc<Open>,
        reader: u32,
        text: Option<TextStream>,
        asked: &ResumeAsked,
    ) -> Self {
        let had = open.output_until(asked.next_index);
        let mut stream = Self::after(open, reader, text, &had);
        stream.resumed = Some(asked.arrived);
        stream
    }

    fn after(open: Arc<Open>, reader: u32, text: Option<TextStream>, had: &[u32]) -> Self {
        let accepted = open.accepted();
        let delivered = u32::try_from(had.len()).unwrap_or(u32::MAX);
        // The client has their text, but for what is held back after them.
        let mut text = text;
        let hit = text
            .as_mut()
            .and_then(|text| text.push(had, &mut String::new()));
        let stopped = hit.map(|hit| {
            open.apply(Event::Stop(Stop::StopString));
            open.stop_string(hit.stop)
        });
        Self {
            given_up: open.given_up(),
            open,
            reader,
            left: None,
            resumed: None,
            accepted: Some(accepted),
            text,
            pending: Batch::default(),
            message: v1::GenerateResponse::default(),
            stopped,
            taken: Instant::now(),
            delivered,
            done: false,
        }
    }

    /// The generation's id, as `Accepted` tells it.
    #[must_use]
    pub fn id(&self) -> String {
        self.open.id.to_string()
    }

    /// The ids that it goes on from.
    pub(crate) fn prompt_ids(&self) -> &[u32] {
        &self.open.request.prompt_ids
    }

    /// The same, to be kept.
    pub(crate) fn shared_prompt_ids(&self) -> Arc<[u32]> {
        Arc::clone(&self.open.request.prompt_ids)
    }

    /// When the tokens of the last message were taken from the generation.
    #[must_use]
    pub fn taken(&self) -> Instant {
        self.taken
    }

    /// Tokens handed out.
    #[must_use]
    pub fn delivered(&self) -> u32 {
        self.delivered
    }

    /// Said when its client reads nothing for too long.
    #[must_use]
    pub fn given_up(&self) -> GivenUp {
        self.given_up.clone()
    }

    /// Whether it can be resumed.
    pub(crate) fn can_be_resumed(&self) -> bool {
        self.open.can_be_resumed()
    }

    /// Its connection is gone, without a word of its client: when it is dropped the
    /// generation goes on for a while.
    pub(crate) fn leave(&mut self, visit: Option<Visit>) {
        self.left = Some(visit);
    }

    /// Its class; never unspecified.
    pub(crate) fn class(&self) -> v1::RequestClass {
        self.open.request.class
    }

    /// Attempts that it has taken so far.
    pub(crate) fn attempts(&self) -> u32 {
        self.open.attempts()
    }

    /// What it was until now, for its spans.
    pub(crate) fn traced(&self) -> Traced {
        let traced = self.open.traced(self.delivered);
        match self.resumed {
            // What was before is told by the call that it was then.
            Some(since) => traced.since(self.open.request.arrived, since),
            None => traced,
        }
    }

    /// W3C trace context of the request that its call goes on with.
    pub(crate) fn goes_on_with(&self) -> Option<&str> {
        self.resumed?;
        let request = &self.open.request;
        let of = match self.reader {
            // It was another router's.
            0 => &request.resumes,
            _ => &request.traceparent,
        };
        (!of.is_empty()).then_some(of)
    }

    /// What it is held to, by its class or its own hints.
    pub(crate) fn held_to(&self) -> HeldTo {
        self.open.held_to()
    }

    /// Whether its last message is next, and what that tells is still to come.
    fn ends(&self) -> bool {
        let pending = &self.pending;
        let more = self.accepted.is_some() || pending.placed.is_some() || !pending.ids.is_empty();
        let well = matches!(pending.outcome, Some(Outcome::Finished { .. }));
        !more && (well || self.stopped.is_some())
    }

    /// The next message of what is at hand is in `message`. False: nothing is.
    fn next_message(&mut self) -> Result<bool, RequestError> {
        if let Some(accepted) = self.accepted.take() {
            self.message.event = Some(Message::Accepted(accepted));
        } else if let Some(placed) = self.pending.placed.take() {
            self.message.event = Some(Message::Placed(placed));
        } else if !self.pending.ids.is_empty() {
            self.tokens();
        } else if let Some(stop) = self.stopped.take() {
            self.message.event = Some(self.finished(FinishReason::Stop, None, stop));
        } else if let Some(outcome) = self.pending.outcome.take() {
            let Outcome::Finished { reason, stop_token } = outcome else {
                self.done = true;
                // What it was given counts: of a slow client's ids some are gone.
                return Err(self.open.error(&outcome, self.delivered));
            };
            self.message.event = Some(self.finished(reason, stop_token, String::new()));
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// Makes the message of the pending ids.
    fn tokens(&mut self) {
        if !matches!(self.message.event, Some(Message::Tokens(_))) {
            self.message.event = Some(Message::Tokens(v1::Tokens::default()));
        }
        let Some(Message::Tokens(message)) = &mut self.message.event else {
            return;
        };
        message.first_index = self.delivered;
        message.text.clear();
        message.ids.clear();
        std::mem::swap(&mut message.ids, &mut self.pending.ids);
        message.logprobs = std::mem::take(&mut self.pending.logprobs);
        let hit = self
            .text
            .as_mut()
            .and_then(|stream| stream.push(&message.ids, &mut message.text));
        if let Some(hit) = hit {
            // Ids after the one that completed the stop string are no output.
            let kept = hit.tokens.saturating_sub(message.first_index) as usize;
            message.ids.truncate(kept);
            message.logprobs.truncate(kept);
            self.open.apply(Event::Stop(Stop::StopString));
            self.pending.outcome = None;
            self.stopped = Some(self.open.stop_string(hit.stop));
        }
        self.delivered += u32::try_from(message.ids.len()).unwrap_or(u32::MAX);
        self.open.core.counters.token_messages.add(1);
    }

    /// The next message, lent until the next call: the transport encodes it
    /// where it is.
    pub fn poll_message(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<&v1::GenerateResponse, RequestError>>> {
        loop {
            if self.done {
                return Poll::Ready(None);
            }
            if self.ends() {
                ready!(self.open.poll_settled(cx, self.reader));
            }
            match self.next_message() {
                Ok(true) => return Poll::Ready(Some(Ok(&self.message))),
                Ok(false) => {
                    self.taken = ready!(self.open.poll_take(cx, self.reader, &mut self.pending))
                }
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    fn finished(
        &mut self,
        reason: FinishReason,
        stop_token: Option<u32>,
        stop_string: String,
    ) -> Message {
        self.done = true;
        let mut text = String::new();
        if stop_string.is_empty()
            && let Some(stream) = &mut self.text
        {
            stream.finish(&mut text);
        }
        let mut finished = v1::Finished {
            stop_string,
            text,
            ..self.open.finished(reason, stop_token, self.delivered)
        };
        let measured = self.open.measured();
        let core = &self.open.core;
        let taught = core.decisions.finished(self.open.id, &finished, measured);
        if let Some((worker, seen)) = taught {
            core.dispatcher.placer().first_token(worker, &seen);
        }
        if !self.open.request.trace {
            // They are for `explain`.
            finished.trace = Vec::new();
        }
        Message::Finished(finished)
    }
}

impl Stream for GenerationStream {
    type Item = Result<v1::GenerateResponse, RequestError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let taken = ready!(self.poll_message(cx).map_ok(|_| ()));
        Poll::Ready(taken.map(|taken| taken.map(|()| std::mem::take(&mut self.message))))
    }
}

impl Drop for GenerationStream {
    fn drop(&mut self) {
        match self.left.take() {
            Some(visit) => self.open.leave(self.reader, visit),
            None => self.open.close(self.reader),
        }
    }
}
