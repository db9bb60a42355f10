//! What a client reads: pending ids become one message when it is asked for.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_util::Stream;
use kvmesh_session::{
    generation::{Event, Outcome, Stop},
    parse::FinishReason,
};
use kvmesh_text::TextStream;
use kvmesh_wire::v1::{self, generate_response::Event as Message};

use super::open::{Batch, Open};
use crate::error::RequestError;

/// One generation's answer. Dropping it cancels the generation on its workers.
pub struct GenerationStream {
    open: Arc<Open>,
    accepted: Option<v1::Accepted>,
    /// `None` where the request wants no text.
    text: Option<TextStream>,
    /// Taken from the generation, not handed out yet.
    pending: Batch,
    /// The stop string that ended the text.
    stopped: Option<String>,
    /// Tokens handed out.
    delivered: u32,
    done: bool,
}

impl GenerationStream {
    pub(super) fn new(open: Arc<Open>, text: Option<TextStream>) -> Self {
        let accepted = open.accepted();
        Self {
            open,
            accepted: Some(accepted),
            text,
            pending: Batch::default(),
            stopped: None,
            delivered: 0,
            done: false,
        }
    }

    /// The generation's id, as `Accepted` tells it.
    #[must_use]
    pub fn id(&self) -> String {
        self.open.id.to_string()
    }

    /// The next message of what is at hand.
    fn next_message(&mut self) -> Option<Result<Message, RequestError>> {
        if let Some(accepted) = self.accepted.take() {
            return Some(Ok(Message::Accepted(accepted)));
        }
        if let Some(placed) = self.pending.placed.take() {
            return Some(Ok(Message::Placed(placed)));
        }
        if !self.pending.ids.is_empty() {
            return Some(Ok(Message::Tokens(self.tokens())));
        }
        if let Some(stop) = self.stopped.take() {
            return Some(Ok(self.finished(FinishReason::Stop, None, stop)));
        }
        let (outcome, next_index) = self.pending.outcome.take()?;
        if let Outcome::Finished { reason, stop_token } = outcome {
            return Some(Ok(self.finished(reason, stop_token, String::new())));
        }
        self.done = true;
        Some(Err(self.open.error(&outcome, next_index)))
    }

    fn tokens(&mut self) -> v1::Tokens {
        let mut ids = std::mem::take(&mut self.pending.ids);
        let mut logprobs = std::mem::take(&mut self.pending.logprobs);
        let first_index = self.delivered;
        let mut text = String::new();
        let hit = self
            .text
            .as_mut()
            .and_then(|stream| stream.push(&ids, &mut text));
        if let Some(hit) = hit {
            // Ids after the one that completed the stop string are no output.
            let kept = hit.tokens.saturating_sub(first_index) as usize;
            ids.truncate(kept);
            logprobs.truncate(kept);
            self.open.apply(Event::Stop(Stop::StopString));
            self.pending.outcome = None;
            self.stopped = Some(self.open.stop_string(hit.stop));
        }
        self.delivered += u32::try_from(ids.len()).unwrap_or(u32::MAX);
        self.open.core.counters.token_messages.add(1);
        v1::Tokens {
            first_index,
            ids,
            text,
            logprobs,
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
        let finished = v1::Finished {
            stop_string,
            text,
            ..self.open.finished(reason, stop_token, self.delivered)
        };
        let first_token_ms = finished.timings.as_ref().map_or(0.0, |t| t.first_token_ms);
        self.open
            .core
            .decisions
            .finished(self.open.id, &finished, first_token_ms);
        Message::Finished(finished)
    }
}

impl Stream for GenerationStream {
    type Item = Result<v1::GenerateResponse, RequestError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.done {
                return Poll::Ready(None);
            }
            if let Some(message) = self.next_message() {
                let response = message.map(|event| v1::GenerateResponse { event: Some(event) });
                return Poll::Ready(Some(response));
            }
            self.pending = ready!(self.open.poll_take(cx));
        }
    }
}

impl Drop for GenerationStream {
    fn drop(&mut self) {
        self.open.close();
    }
}
