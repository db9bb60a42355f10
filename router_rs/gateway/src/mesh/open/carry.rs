//! Carries out what the machine says: placements, cancels, waits, plans.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvmesh_session::{
    Command, HandOff, Placement, WorkerIndex,
    generation::{Action, Actions, Event, Loss, PlanRequest, PlannedHandOff, Timer},
};
use smallvec::SmallVec;

use super::{
    super::{
        continuation::{continuation, resume_state, tenant},
        session::Outgoing,
    },
    Open, State,
};

impl Open {
    pub(super) fn ask(self: &Arc<Self>, plan: Option<PlanRequest>) {
        if let Some(request) = plan {
            if let Some(stop_token) = self.stop_token() {
                return self.apply(Event::Complete { stop_token });
            }
            self.core.plan(self, &request);
        }
    }

    /// The stop token that the output ends with, if it does: the word that it
    /// was the last may be lost.
    fn stop_token(&self) -> Option<u32> {
        let state = self.lock();
        let last = *state.output.last()?;
        let honoured = state.output.len() >= self.request.min_tokens as usize;
        (honoured && self.request.stop_token_ids.contains(&last)).then_some(last)
    }

    /// Carries actions out; a request for a plan is returned, since the
    /// scheduler is asked without this lock.
    pub(super) fn perform(
        self: &Arc<Self>,
        state: &mut State,
        actions: Actions,
    ) -> Option<PlanRequest> {
        let mut plan = None;
        let mut queue: SmallVec<[Actions; 2]> = SmallVec::new();
        queue.push(actions);
        while let Some(actions) = queue.pop() {
            for action in actions {
                match action {
                    Action::Plan(request) => {
                        self.note_plan(state, request.cause);
                        plan = Some(request);
                    }
                    Action::Release => state.chosen = None,
                    Action::Arm(timer) => self.arm(state, timer),
                    Action::Disarm(timer) => self.disarm(state, timer),
                    Action::End(outcome) => self.end(state, outcome),
                    Action::Place {
                        to,
                        fence,
                        stage,
                        hand_off,
                    } => {
                        let placement = self.placement(state, stage, hand_off);
                        let command = Command::Place {
                            generation: self.id,
                            fence,
                            placement,
                        };
                        if !self.send(state, to, command) {
                            let event = Event::SessionLost {
                                worker: to,
                                loss: Loss::Broken,
                            };
                            queue.extend(state.machine.apply(event).ok());
                        }
                    }
                    Action::Cancel { to, fence } => {
                        let command = Command::Cancel {
                            generation: self.id,
                            fence,
                        };
                        self.send(state, to, command);
                    }
                }
            }
        }
        plan
    }

    fn send(self: &Arc<Self>, state: &State, to: WorkerIndex, command: Command) -> bool {
        let Some(chosen) = &state.chosen else {
            return false;
        };
        let Some(party) = chosen.parties.iter().find(|party| party.worker == to) else {
            return false;
        };
        let place = matches!(command, Command::Place { .. });
        let open = place.then(|| Arc::clone(self));
        let Some(number) = party.session.send(Outgoing { command, open }) else {
            return false;
        };
        if place {
            self.core.counters.placements.add(1);
            chosen.booking.placed(to, number);
        }
        true
    }

    fn placement(
        &self,
        state: &State,
        stage: kvmesh_session::Stage,
        hand_off: PlannedHandOff,
    ) -> Box<Placement> {
        let hand_off = match hand_off {
            PlannedHandOff::None => None,
            PlannedHandOff::Engine(payload) => Some(HandOff::Engine(payload)),
            PlannedHandOff::Mesh { transfer, sender } => {
                let (sender, incarnation, address) = self.core.table.sender(sender);
                Some(HandOff::Mesh {
                    transfer,
                    sender,
                    incarnation,
                    address,
                })
            }
        };
        let chosen = state.chosen.as_ref();
        // What goes on is as urgent as what should have begun when it arrived.
        let as_chosen = chosen.map_or(self.urgency_ms, |chosen| chosen.urgency_ms);
        let goes_on = state.machine.fence().attempt > 1 && self.was_begun(state);
        let urgency_ms = match goes_on {
            true => as_chosen.min(0.0),
            false => as_chosen,
        };
        let request = &self.request;
        let continuation = continuation(request, &state.output, urgency_ms, Instant::now());
        Box::new(Placement {
            tenant: tenant(request),
            resume_state: resume_state(request, &continuation),
            continuation,
            stage,
            hand_off,
            prefix_from: chosen.and_then(|chosen| chosen.prefix_from.clone()),
            traceparent: request.traceparent.clone(),
            tracestate: request.tracestate.clone(),
            baggage: request.baggage.clone(),
            request_id: request.request_id.clone(),
            predicted_start_ms: chosen.map_or(0.0, |chosen| chosen.predicted_start_ms),
            trace: request.trace || request.traced,
            alone: state.machine.alone(),
        })
    }

    fn arm(self: &Arc<Self>, state: &mut State, timer: Timer) {
        let settings = &self.core.settings;
        let after = |bound: Duration| Some(Instant::now() + bound);
        let at = match timer {
            Timer::Deadline => self.request.deadline,
            Timer::Answer { .. } => after(settings.answer_timeout),
            Timer::Orphaned { .. } => after(settings.orphan_timeout),
        };
        if let Some(at) = at {
            state
                .armed
                .push((timer, self.core.timers.arm(at, self, timer)));
        }
    }

    fn disarm(&self, state: &mut State, timer: Timer) {
        if let Some(at) = state.armed.iter().position(|(armed, _)| *armed == timer) {
            let (_, key) = state.armed.swap_remove(at);
            self.core.timers.disarm(key);
        }
    }
}
