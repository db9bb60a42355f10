//! An attempt's begin and end, as told and counted.

use std::{sync::Arc, time::Instant};

use kvmesh_scheduler::Place;
use kvmesh_session::{
    generation::{Cause, Event, Outcome, Plan, Stop},
    parse::Refusal,
};
use kvmesh_wire::v1;

use super::{Chosen, Open, State, Tried};

impl Open {
    /// It waits there for a plan. False: it does not, since it has ended.
    pub(in crate::mesh) fn stands_at(&self, place: &Place) -> bool {
        let mut state = self.lock();
        let ended = state.machine.ended();
        if !ended {
            state.stands = Some(place.clone());
        }
        !ended
    }

    /// Carries a plan out.
    pub(in crate::mesh) fn planned(self: &Arc<Self>, chosen: Chosen) {
        let plan = {
            let mut state = self.lock();
            if state.machine.ended() {
                return;
            }
            let event = Event::Planned(chosen.plan);
            state.placed = self
                .request
                .placements
                .then(|| Box::new(self.placed_message(&state, &chosen)));
            let attempt = state.machine.next_attempt();
            let prompt = u32::try_from(self.request.prompt_ids.len()).unwrap_or(u32::MAX);
            let (cached, pulled) = (chosen.cached_tokens, chosen.pulled_tokens);
            state.figures.expects(prompt, cached, pulled);
            state
                .figures
                .dispatched(Instant::now(), chosen.decide, attempt, chosen.predicted);
            if let Some(party) = chosen.parties.last() {
                state.figures.decodes_on(party.worker);
            }
            self.log_placed(&state, &chosen);
            self.core.counters.decided(&chosen.plan, chosen.decide);
            if matches!(chosen.plan, Plan::Mesh { .. }) {
                self.core.counters.transfers_started.add(1);
            }
            self.core.counters.attempts.add(1);
            state.chosen = Some(Box::new(chosen));
            // It is on its way from another worker than before, and waits no more.
            (state.tried, state.put_off, state.stands) = (Tried::default(), None, None);
            let waker = state.placed.is_some().then(|| state.waker.take()).flatten();
            let plan = match state.machine.apply(event) {
                Ok(actions) => self.perform(&mut state, actions),
                Err(_) => None,
            };
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
            plan
        };
        self.ask(plan);
    }

    fn placed_message(&self, state: &State, chosen: &Chosen) -> v1::Placed {
        let name = |worker| match self.request.admin {
            true => self.core.table.name(worker),
            false => String::new(),
        };
        let (prefill, decode) = match chosen.plan {
            Plan::Whole { on } => (String::new(), name(on)),
            Plan::Mesh {
                prefill, decode, ..
            }
            | Plan::Engine {
                prefill, decode, ..
            } => (name(prefill), name(decode)),
        };
        v1::Placed {
            attempt: state.machine.next_attempt(),
            cached_tokens: chosen.cached_tokens,
            pulled_tokens: chosen.pulled_tokens,
            prefill_worker: prefill,
            decode_worker: decode,
        }
    }

    /// The machine asks for a new plan.
    pub(super) fn note_plan(&self, state: &mut State, cause: Cause) {
        self.core.counters.migrates(cause);
        self.log_over(state, cause);
        state.over = state.machine.fence().attempt;
        // A worker that refuses was asked, no more. One that did not answer may
        // have begun.
        state.failed_over |= match cause {
            Cause::Start => false,
            Cause::Refused(why) => why == Refusal::Unanswered,
            Cause::Returned | Cause::Failed | Cause::Lost(_) | Cause::Claimed => true,
        };
        if !matches!(cause, Cause::Start | Cause::Refused(_)) && !state.output.is_empty() {
            let last = state.figures.last_arrival();
            state.moved = state.moved.or(last);
        }
    }

    pub(super) fn end(&self, state: &mut State, outcome: Outcome) {
        self.log_end(state, &outcome);
        if outcome == Outcome::Poisoned {
            self.core.quarantine(self);
        }
        for (_, key) in state.armed.drain(..) {
            self.core.timers.disarm(key);
        }
        let counters = &self.core.counters;
        match &outcome {
            Outcome::Finished { .. } => {
                counters.finished.add(1);
                let made = state.machine.next_index();
                self.core.dispatcher.learn_output(&self.request, made);
            }
            Outcome::Stopped(Stop::ClientGone) => counters.cancelled.add(1),
            Outcome::Stopped(Stop::SlowClient) => {
                counters.slow_clients.add(1);
                counters.failed.add(1);
            }
            _ => counters.failed.add(1),
        }
        let now = Instant::now();
        if state.taken == state.output.len() {
            state.progress = now;
        }
        state.figures.ended(now);
        state.outcome = Some(outcome);
    }
}
