//! What the client's stream asks of its generation.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use kvmesh_scheduler::OWN_STEP_SHARE;
use kvmesh_session::{
    generation::{Event, Outcome, Stop},
    parse::{FinishReason, Lacks},
};
use kvmesh_wire::v1;

use super::{super::recover::quarantined, Batch, Open};
use crate::{error::RequestError, telemetry::HeldTo};

/// What a client is told whose stream nobody took up.
const NO_ROOM: &str = "the worker was lost, and no other had room in time";
/// The same where no engine can.
const NO_OTHER: &str = "the worker was lost, and no other can go on from here";

impl Open {
    /// Puts what the client has not got yet into `batch`, which is empty;
    /// registers the waker where there is nothing. Gives the time.
    pub(in crate::mesh) fn poll_take(
        &self,
        cx: &mut Context<'_>,
        reader: u32,
        batch: &mut Batch,
    ) -> Poll<Instant> {
        let mut state = self.lock();
        if state.reader != reader {
            batch.outcome = Some(Outcome::TakenOver);
            return Poll::Ready(Instant::now());
        }
        let pending = state.output.len() - state.taken;
        if pending == 0 && state.placed.is_none() && state.outcome.is_none() {
            match &mut state.waker {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        }
        batch.placed = state.placed.take().map(|placed| *placed);
        batch.ids.extend_from_slice(&state.output[state.taken..]);
        batch.logprobs.append(&mut state.logprobs);
        batch.outcome.clone_from(&state.outcome);
        state.taken = state.output.len();
        let now = Instant::now();
        state.progress = now;
        if pending > 0 {
            state.figures.tokens_taken(now);
        }
        drop(state);
        self.core.counters.undelivered_ids.sub(pending as u64);
        Poll::Ready(now)
    }

    /// Whether it waits with ids, or with its end, that nobody took since
    /// `since`, or holds more than `most` ids.
    pub(in crate::mesh) fn starved(&self, since: Option<Instant>, most: usize) -> bool {
        let state = self.lock();
        let pending = state.output.len() - state.taken;
        let owes = pending > 0 || state.outcome.is_some();
        let slow = since.is_some_and(|since| state.progress <= since);
        owes && (slow || pending > most) && !state.given_up.was_said()
    }

    /// Drops what a client did not read, and ends the stream for it.
    pub(in crate::mesh) fn give_up_on_client(self: &Arc<Self>) {
        if self.ended() {
            // The machine, which counts its own ends, has nothing to stop.
            self.core.counters.slow_clients.add(1);
        }
        self.apply(Event::Stop(Stop::SlowClient));
        let (pending, waker, given_up) = {
            let mut state = self.lock();
            let pending = state.output.len() - state.taken;
            let taken = state.taken;
            state.output.truncate(taken);
            state.logprobs = Vec::new();
            // Also where the output was complete: the client never got it.
            state.outcome = Some(Outcome::Stopped(Stop::SlowClient));
            (pending, state.waker.take(), state.given_up.clone())
        };
        self.core.counters.undelivered_ids.sub(pending as u64);
        given_up.say();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The client's stream is gone. Nothing is, where another one reads it.
    pub(in crate::mesh) fn close(self: &Arc<Self>, reader: u32) {
        if self.lock().reader != reader {
            return;
        }
        self.apply(Event::Stop(Stop::ClientGone));
        let pending = {
            let mut state = self.lock();
            let pending = state.output.len() - state.taken;
            state.taken = state.output.len();
            state.visit = None;
            self.settle(&mut state);
            pending
        };
        self.core.counters.undelivered_ids.sub(pending as u64);
        self.core.unregister(self.id);
    }

    /// The last message of a stream that ended well, with the spans that there are: also
    /// where its client wants none. `output_tokens` is what the client got.
    pub(in crate::mesh) fn finished(
        &self,
        reason: FinishReason,
        stop_token: Option<u32>,
        output_tokens: u32,
    ) -> v1::Finished {
        let state = self.lock();
        let prompt = u32::try_from(self.request.prompt_ids.len()).unwrap_or(u32::MAX);
        v1::Finished {
            reason: match reason {
                FinishReason::Stop => v1::FinishReason::Stop.into(),
                FinishReason::Length => v1::FinishReason::Length.into(),
            },
            usage: Some(
                state
                    .figures
                    .usage(prompt, output_tokens, state.machine.fence().attempt),
            ),
            timings: Some(state.figures.timings(&self.request)),
            stop_token_id: stop_token,
            trace: match self.request.trace || state.figures.has_spans() {
                true => state.figures.trace(&self.request),
                false => Vec::new(),
            },
            ..v1::Finished::default()
        }
    }

    /// What was predicted of the attempt that brought the first token, and what
    /// it took; counted as it is told.
    pub(in crate::mesh) fn measured(&self) -> Option<(u32, v1::PhaseTimes)> {
        let (attempt, predicted, actual) = self.lock().figures.prediction()?;
        self.core.counters.predicted(&predicted, &actual);
        Some((attempt, actual))
    }

    /// What the request is held to: its targets, and between tokens never less
    /// than what its decode worker can do at all.
    pub(in crate::mesh) fn held_to(&self) -> HeldTo {
        let request = &self.request;
        let (decode, context) = {
            let state = self.lock();
            (
                state.figures.decode(),
                request.prompt_ids.len() + state.output.len(),
            )
        };
        let model = decode.and_then(|worker| self.core.dispatcher.placer().step_model(worker));
        let step_ms = model.map_or(0.0, |m| m.a_ms + m.d_ms + m.e_ms * context as f64);
        let itl_ms = request.itl_target_ms.max(OWN_STEP_SHARE * step_ms);
        HeldTo {
            class: request.class,
            ttft_ms: request.ttft_target_ms,
            itl_ms: (request.itl_target_ms > 0.0).then_some(itl_ms),
        }
    }

    /// The first message of a stream.
    pub(in crate::mesh) fn accepted(&self) -> v1::Accepted {
        let request = &self.request;
        v1::Accepted {
            generation_id: self.id.to_string(),
            seed: request.sampling.seed,
            prompt_tokens: u32::try_from(request.prompt_ids.len()).unwrap_or(u32::MAX),
            max_tokens: request.max_tokens,
            model: request.model.clone(),
        }
    }

    /// A stop string of the request, by its number.
    pub(in crate::mesh) fn stop_string(&self, index: usize) -> String {
        let stops = self.request.text.as_ref().map(|text| text.stops.as_slice());
        stops
            .and_then(|stops| stops.get(index))
            .cloned()
            .unwrap_or_default()
    }

    /// No engine can do it, though their capabilities do not say so. Grammars,
    /// log-probabilities and adapters are looked at at the door: what is left of
    /// a request that an engine may lack is in its sampling.
    fn unsupported(&self) -> RequestError {
        let lacks = self.lock().lacks.clone();
        let (field, words) = lacks.map_or_else(Default::default, |lacks| {
            let Lacks { field, message } = *lacks;
            (field, message)
        });
        let field = match field.is_empty() {
            true => "sampling".to_owned(),
            false => field,
        };
        RequestError::Unsupported { field, words }
    }

    /// Why nobody takes up what a lost worker had: what engines lack, if that is known.
    fn nobody_goes_on(&self, else_told: &str) -> String {
        let state = self.lock();
        let Some(Lacks { field, message }) = state.lacks.as_deref() else {
            return else_told.to_owned();
        };
        let words = [NO_OTHER, field, message];
        let words: Vec<&str> = words.into_iter().filter(|said| !said.is_empty()).collect();
        words.join(": ")
    }

    /// What the client is told of an end that is no success.
    pub(in crate::mesh) fn error(&self, outcome: &Outcome, next_index: u32) -> RequestError {
        match outcome {
            Outcome::Stopped(Stop::ClientGone | Stop::StopString) | Outcome::Finished { .. } => {
                RequestError::Cancelled
            }
            Outcome::Stopped(Stop::SlowClient) => RequestError::SlowClient { next_index },
            Outcome::Stopped(Stop::Shutdown) => RequestError::ShuttingDown { next_index },
            Outcome::NoPlan if self.continues() => {
                let reason = self.nobody_goes_on(NO_ROOM);
                RequestError::WorkerLost { reason, next_index }
            }
            Outcome::Unsupported if self.continues() => {
                let reason = self.nobody_goes_on(NO_OTHER);
                RequestError::WorkerLost { reason, next_index }
            }
            Outcome::Stopped(Stop::Overloaded) if self.continues() => {
                let reason = NO_ROOM.to_owned();
                RequestError::WorkerLost { reason, next_index }
            }
            Outcome::Stopped(Stop::Overloaded) => RequestError::Overloaded {
                reason: "no worker had room in time",
                retry_after: self.retry_after(),
            },
            Outcome::DeadlineExceeded => RequestError::DeadlineExceeded { next_index },
            Outcome::NoPlan => RequestError::NoWorker(self.request.model.clone()),
            Outcome::Unsupported => self.unsupported(),
            Outcome::TakenOver => RequestError::TakenOver { next_index },
            Outcome::WorkerLost(_) => {
                let reason = "the worker was lost".to_owned();
                RequestError::WorkerLost { reason, next_index }
            }
            Outcome::Exhausted => {
                let reason = "too many attempts failed".to_owned();
                RequestError::WorkerLost { reason, next_index }
            }
            Outcome::Poisoned => {
                let told = quarantined(self.core.settings.quarantine_time);
                RequestError::WorkerFailed {
                    code: tonic::Code::FailedPrecondition as u32,
                    reason: told.code_and_reason().1.to_owned(),
                    message: told.to_string(),
                    next_index,
                }
            }
            Outcome::Failed(failure) => RequestError::WorkerFailed {
                code: failure.code,
                reason: failure.reason.clone(),
                message: failure.message.clone(),
                next_index,
            },
        }
    }
}
