//! A generation that was another router's, or another stream's of this one.

use std::{sync::Arc, time::Instant};

use kvmesh_session::{
    Generation, GenerationId,
    generation::{Event, Plan, Policy, Stop},
    takeover::Take,
};
use kvmesh_wire::v1;

use super::{Chosen, Open, Party};
use crate::{
    access::Visit,
    error::RequestError,
    mesh::{Core, GivenUp, admit::Urgency, resume::ResumeAsked},
    request::AdmittedRequest,
};

/// What this router goes on with.
pub(in crate::mesh) struct Claimed<'a> {
    pub(in crate::mesh) id: GenerationId,
    pub(in crate::mesh) take: &'a Take,
    pub(in crate::mesh) request: AdmittedRequest,
    /// Chain values of the prompt.
    pub(in crate::mesh) chain: Vec<u64>,
    pub(in crate::mesh) urgency_ms: f64,
    /// First output index that the client lacks.
    pub(in crate::mesh) next_index: u32,
    /// The worker that goes on with it, and the number of the claim.
    pub(in crate::mesh) party: Option<(Party, u64)>,
}

impl Open {
    /// Opens a generation that was claimed.
    pub(in crate::mesh) fn claimed(core: Arc<Core>, claimed: Claimed<'_>) -> Arc<Self> {
        let Claimed {
            id,
            take,
            request,
            chain,
            urgency_ms,
            next_index,
            party,
        } = claimed;
        let output = take.left.output_ids.clone();
        let (machine, actions) = Generation::claimed(
            take,
            request.max_tokens,
            request.deadline.is_some(),
            Policy::default(),
        );
        let chosen = party.map(|(party, claim)| {
            let booking = core.book_claimed(party.worker, &request, output.len());
            booking.placed(party.worker, claim);
            Box::new(Chosen {
                plan: Plan::Whole { on: party.worker },
                parties: [party].into_iter().collect(),
                booking,
                cached_tokens: 0,
                pulled_tokens: 0,
                prefix_from: None,
                urgency_ms,
                predicted_start_ms: 0.0,
                predicted: v1::PhaseTimes::default(),
                pulls: None,
                tail: None,
                decide: std::time::Duration::ZERO,
                retry: None,
            })
        });
        let admitted = Urgency {
            urgency_ms,
            work_ms: 0.0,
            wait_ms: 0.0,
        };
        let taken = next_index as usize;
        let pending = output.len().saturating_sub(taken) as u64;
        core.counters.undelivered_ids.add(pending);
        Self::begin(core, chain, request, admitted, id, |state| {
            state.machine = machine;
            if let Some(chosen) = &chosen {
                state.figures.decodes_on(chosen.parties[0].worker);
            }
            state.chosen = chosen;
            state.output = output;
            state.taken = taken;
            actions
        })
    }

    /// Gives the stream to another call, from where that is. The one that had it is told
    /// that it was taken over.
    ///
    /// # Errors
    /// [`RequestError::UnknownGeneration`] for what that call cannot have.
    pub(in crate::mesh) fn attach(&self, asked: &ResumeAsked) -> Result<u32, RequestError> {
        let unknown = Err(RequestError::UnknownGeneration);
        if self.request.tenant != asked.tenant || !self.can_be_resumed() {
            return unknown;
        }
        let (reader, before, pending, waker, given_up, visit) = {
            let mut state = self.lock();
            if !asked.fits(&state.output) || state.given_up.was_said() {
                return unknown;
            }
            let before = state.output.len() - state.taken;
            state.taken = asked.next_index as usize;
            state.reader += 1;
            state.left = None;
            state.progress = Instant::now();
            let given_up = std::mem::take(&mut state.given_up);
            let pending = state.output.len() - state.taken;
            (
                state.reader,
                before,
                pending,
                state.waker.take(),
                given_up,
                state.visit.take(),
            )
        };
        let ids = &self.core.counters.undelivered_ids;
        ids.add(pending as u64);
        ids.sub(before as u64);
        drop(visit);
        // Its client may read nothing any more, so that it is never asked again.
        given_up.say();
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(reader)
    }

    /// Whether [`Self::attach`] would give it now.
    pub(in crate::mesh) fn gives(&self, asked: &ResumeAsked) -> bool {
        let state = self.lock();
        let theirs = self.request.tenant == asked.tenant && self.can_be_resumed();
        theirs && asked.fits(&state.output) && !state.given_up.was_said()
    }

    /// The first output ids.
    pub(in crate::mesh) fn output_until(&self, next_index: u32) -> Vec<u32> {
        let state = self.lock();
        let had = state.output.get(..next_index as usize);
        had.unwrap_or_default().to_vec()
    }

    /// Whether somebody may go on with it.
    pub(in crate::mesh) fn can_be_resumed(&self) -> bool {
        self.request.resumable && self.request.logprobs.is_none()
    }

    /// The connection of its stream is gone, without a word: it goes on for a while. What
    /// its tenant may have at once it counts in still.
    pub(in crate::mesh) fn leave(&self, reader: u32, visit: Option<Visit>) {
        let mut state = self.lock();
        if state.reader == reader {
            state.left = Some(Instant::now());
            state.visit = visit;
            state.waker = None;
        }
    }

    /// Ends it where nobody has come for it since then.
    pub(in crate::mesh) fn expire(self: &Arc<Self>, since: Option<Instant>) {
        let over = {
            let state = self.lock();
            let over = since.is_some_and(|since| state.left.is_some_and(|left| left <= since));
            over.then_some(state.reader)
        };
        if let Some(reader) = over {
            self.close(reader);
        }
    }

    /// This router ends. What others may resume goes on at its workers, which keep it.
    pub(in crate::mesh) fn shut_down(self: &Arc<Self>) {
        self.lock().stays = self.can_be_resumed();
        self.apply(Event::Stop(Stop::Shutdown));
    }

    /// Said when the client of the stream that is read now is given up.
    pub(in crate::mesh) fn given_up(&self) -> GivenUp {
        self.lock().given_up.clone()
    }
}
