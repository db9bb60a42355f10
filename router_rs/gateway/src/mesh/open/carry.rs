//! Carries out what the machine says: placements, cancels, waits, plans.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvmesh_session::{
    Command, Fence, HandOff, Placement, Stage, TransferId, WorkerIndex,
    generation::{Action, Actions, Event, Loss, Outcome, PlanRequest, PlannedHandOff, Timer},
};
use kvmesh_wire::v1;
use smallvec::SmallVec;

use super::{
    super::{
        continuation::{continuation, resume_state, tenant_name},
        figures::ms,
        recover::pause,
        session::Outgoing,
    },
    Open, State,
};

/// An attempt that is put off, since those before it failed.
#[derive(Clone, Copy)]
pub(super) struct PutOff {
    since: Instant,
    until: Instant,
    failures: u8,
}

impl PutOff {
    fn by(pause: Duration, request: &PlanRequest) -> Self {
        let since = Instant::now();
        Self {
            since,
            until: since + pause,
            failures: request.failures,
        }
    }
}

impl Open {
    pub(super) fn ask(self: &Arc<Self>, plan: Option<PlanRequest>) {
        if let Some(request) = plan {
            if let Some(stop_token) = self.stop_token() {
                return self.apply(Event::Complete { stop_token });
            }
            let pause = pause(&request, u128::from_le_bytes(self.id.0) as u64);
            let put_off = pause.map(|pause| PutOff::by(pause, &request));
            self.lock().put_off = put_off;
            match put_off {
                Some(PutOff { until, .. }) => self.core.timers.plan_later(until, self, request),
                None => self.core.plan(self, &request),
            }
        }
    }

    /// Since when it asks for a worker: what is put off asks from then on.
    pub(in crate::mesh) fn asks_since(&self) -> Instant {
        let put_off = self.lock().put_off;
        put_off.map_or_else(Instant::now, |put_off| put_off.since)
    }

    /// How it waits where its next attempt is put off now, and what admission predicted of
    /// its wait, ms.
    pub(in crate::mesh) fn put_off(&self) -> Option<(v1::RouterWait, f64)> {
        let now = Instant::now();
        let put_off = self.lock().put_off.filter(|put_off| put_off.until > now)?;
        let left = put_off.until - now;
        let wait = v1::RouterWait {
            ms: ms(now.saturating_duration_since(put_off.since)),
            tries: 0,
            reason: format!(
                "put off after {} failed attempts, for {} ms more",
                put_off.failures,
                left.as_millis()
            ),
        };
        (!self.ended()).then_some((wait, self.wait_ms))
    }

    /// Asks for a plan that was put off.
    pub(in crate::mesh) fn ask_now(self: &Arc<Self>, request: &PlanRequest) {
        if !self.ended() {
            self.core.plan(self, request);
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
        // Parts of the attempt in force that were left just now.
        let mut left: SmallVec<[WorkerIndex; 2]> = SmallVec::new();
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
                    Action::ReleaseTarget => self.target_released(state),
                    Action::Moved { from } => self.moved(state, from),
                    Action::Arm(timer) => self.arm(state, timer),
                    Action::Disarm(timer) => self.disarm(state, timer),
                    Action::End(outcome) => {
                        let well = matches!(outcome, Outcome::Finished { .. });
                        self.end(state, outcome);
                        if well {
                            self.owes(state, std::mem::take(&mut left));
                        }
                    }
                    Action::Place {
                        to,
                        fence,
                        stage,
                        hand_off,
                    } => {
                        let moves = state.moving_as(fence).is_some();
                        let placement = self.placement(state, stage, hand_off, moves);
                        let command = Command::Place {
                            generation: self.id,
                            fence,
                            placement,
                        };
                        if !self.send(state, (to, fence), command) {
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
                        let told = self.send(state, (to, fence), command);
                        if told && !state.stays && fence == state.machine.fence() {
                            left.push(to);
                        }
                    }
                    Action::DropHandOff {
                        on,
                        fence,
                        hand_off,
                    } => self.drop_hand_off(state, (on, fence), hand_off),
                    Action::HandOver {
                        to,
                        fence,
                        next_attempt,
                        transfer,
                        next_index,
                    } => {
                        let command = Command::HandOver {
                            generation: self.id,
                            fence,
                            next_attempt,
                            hand_off: self.mesh(transfer, to),
                            next_index,
                        };
                        // Where it cannot be sent the session is lost, and says so.
                        self.send(state, (to, fence), command);
                    }
                }
            }
        }
        plan
    }

    /// Sends a command to the part of an attempt on a worker.
    fn send(
        self: &Arc<Self>,
        state: &State,
        (to, fence): (WorkerIndex, Fence),
        command: Command,
    ) -> bool {
        if state.stays && matches!(command, Command::Cancel { .. }) {
            return true;
        }
        let (parties, booking) = if let Some(moving) = state.moving_as(fence) {
            (std::slice::from_ref(&moving.party), &moving.booking)
        } else if let Some(chosen) = &state.chosen {
            (chosen.parties.as_slice(), &chosen.booking)
        } else {
            return false;
        };
        let Some(party) = parties.iter().find(|party| party.worker == to) else {
            return false;
        };
        let place = matches!(command, Command::Place { .. });
        let open = place.then(|| Arc::clone(self));
        let Some(number) = party.session.send(Outgoing { command, open }) else {
            return false;
        };
        if place {
            self.core.counters.placements.add(1);
            booking.placed(to, number);
        }
        true
    }

    /// Has a worker accept what nobody wants, and cancels it. What was booked is
    /// released by now, so the session is that of the worker as it is.
    fn drop_hand_off(
        self: &Arc<Self>,
        state: &State,
        (on, fence): (WorkerIndex, Fence),
        hand_off: v1::EngineHandOff,
    ) {
        // Where others may resume it, it may be wanted.
        let worker = self.core.table.get(on).filter(|_| !state.stays);
        let Some(session) = worker.and_then(|worker| worker.session()) else {
            return;
        };
        let hand_off = PlannedHandOff::Engine(hand_off);
        let mut placement = self.placement(state, Stage::Decode, hand_off, false);
        placement.resume_state = Bytes::new();
        let command = Command::Place {
            generation: self.id,
            fence,
            placement,
        };
        let open = Some(Arc::clone(self));
        if session.send(Outgoing { command, open }).is_some() {
            self.core.counters.placements.add(1);
            self.core.counters.hand_offs_dropped.add(1);
            session.cancel(self.id, fence);
        }
    }

    fn placement(
        &self,
        state: &State,
        stage: Stage,
        hand_off: PlannedHandOff,
        moves: bool,
    ) -> Box<Placement> {
        let hand_off = match hand_off {
            PlannedHandOff::None => None,
            PlannedHandOff::Engine(payload) => Some(HandOff::Engine(payload)),
            PlannedHandOff::Mesh { transfer, sender } => Some(self.mesh(transfer, sender)),
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
            tenant: tenant_name(request.tenant),
            resume_state: resume_state(request, &continuation),
            continuation,
            stage,
            hand_off,
            // All of it comes from the worker that has it.
            prefix_from: chosen
                .filter(|_| !moves)
                .and_then(|chosen| chosen.prefix_from.clone()),
            traceparent: request.traceparent.clone(),
            tracestate: request.tracestate.clone(),
            baggage: request.baggage.clone(),
            request_id: request.request_id.clone(),
            predicted_start_ms: chosen.map_or(0.0, |chosen| chosen.predicted_start_ms),
            trace: self.wants_spans(),
            alone: state.machine.alone(),
        })
    }

    /// Whether its workers are asked for spans: for its client, for a collector, or for
    /// `explain`.
    fn wants_spans(&self) -> bool {
        let request = &self.request;
        request.trace || request.traced || self.core.decisions.wants_spans(self.id)
    }

    fn mesh(&self, transfer: TransferId, sender: WorkerIndex) -> HandOff {
        let (sender, incarnation, address) = self.core.table.sender(sender);
        HandOff::Mesh {
            transfer,
            sender,
            incarnation,
            address,
        }
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
