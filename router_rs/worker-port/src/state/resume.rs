//! Generations that another router takes over.

use std::time::Instant;

use kvmesh_wire::v1::{
    Claim, Find, Found, HandOver, Opening, RefusalReason, Refused, Returned, StageEnd, StepOutput,
    opening::Answer, stage_end,
};
use tonic::Status;

use super::State;
use crate::{
    attempt::{AttemptId, NamesAttempt},
    command,
    ends::AttemptEnd,
    event::Event,
    frames::{encode_step, step_frames},
    kept::{Claimed, Taken},
    report::Part,
    session::{End, Held},
};

/// What the router is told that had a generation.
const TAKEN_OVER: &str = "another router has taken the generation over";

impl State {
    /// Says what is here of a generation.
    pub(super) fn find(&mut self, key: &str, find: &Find, now: Instant) -> Result<(), Status> {
        let generation = find.generation.as_ref().try_into();
        let generation = generation.map_err(|_| command::unnamed())?;
        let found = self.kept.find(&generation, &find.tenant, find.next_index);
        self.push_found(key, found, now);
        Ok(())
    }

    /// Gives a session what is here of a generation.
    pub(super) fn claim(&mut self, key: &str, claim: &Claim, now: Instant) -> Result<(), Status> {
        let generation = claim.generation.as_ref().try_into();
        let generation = generation.map_err(|_| command::unnamed())?;
        let named = (generation, claim.owner);
        match self.kept.claim(named, &claim.tenant, key, now) {
            Claimed::Nothing => {}
            Claimed::Refused(owner) => {
                let found = Found {
                    generation: claim.generation.clone(),
                    owner,
                    refused: true,
                    ..Found::default()
                };
                self.push_found(key, found, now);
            }
            Claimed::Taken(taken) => self.pass(key, *taken, now),
        }
        Ok(())
    }

    /// Moves an attempt from the session that had it to another one.
    fn pass(&mut self, key: &str, taken: Taken, now: Instant) {
        let Taken {
            before: (had, before),
            id,
            stage,
            found,
            opening,
            end,
        } = taken;
        let runs = end.is_none();
        if runs {
            self.passed.pass(&before, key, id.clone());
        }
        self.tell_taken_over(&had, before, now);
        if runs && let Some(session) = self.sessions.get_mut(key) {
            let held = Held {
                placed: now,
                stage,
                opening: opening.clone(),
            };
            session.attempts.insert(id, held);
        }
        self.push_found(key, found, now);
        let said = Part {
            openings: opening.into_iter().collect(),
            ends: end.into_iter().collect(),
            ..Part::default()
        };
        if let Some(session) = self.sessions.get_mut(key)
            && !(said.openings.is_empty() && said.ends.is_empty())
        {
            for frame in step_frames(0, said, None, None) {
                session.lanes.push(frame, now);
            }
        }
    }

    /// The router that had an attempt has it no more.
    fn tell_taken_over(&mut self, key: &str, id: AttemptId, now: Instant) {
        let Some(session) = self.sessions.get_mut(key) else {
            return;
        };
        let Some(held) = session.left(&id) else {
            return;
        };
        let (generation, owner, attempt) = (id.generation.to_vec().into(), id.owner, id.attempt);
        let mut part = Part::default();
        if held.opening.is_none() {
            part.openings.push(Opening {
                generation,
                owner,
                attempt,
                stage: held.stage,
                answer: Some(Answer::Refused(taken_over())),
            });
        } else {
            part.ends.push(StageEnd {
                generation,
                owner,
                attempt,
                stage: held.stage,
                end: Some(stage_end::End::Returned(Returned {
                    reason: RefusalReason::TakenOver.into(),
                    message: TAKEN_OVER.to_owned(),
                })),
                ..StageEnd::default()
            });
        }
        let told: Vec<_> = part
            .ends
            .iter()
            .filter_map(|end| AttemptEnd::of(key, end))
            .collect();
        for frame in step_frames(0, part, None, None) {
            session.lanes.push(frame, now);
        }
        self.wakers.extend(session.waker.take());
        if !told.is_empty() {
            self.tell(Event::Ends(told));
        }
    }

    fn push_found(&mut self, key: &str, found: Found, now: Instant) {
        let frame = encode_step(StepOutput {
            last: true,
            found: vec![found],
            ..StepOutput::default()
        });
        if let Some(session) = self.sessions.get_mut(key) {
            session.lanes.push(frame, now);
        }
    }

    /// A hand-over as the engine names it; `None`: whoever asks has it no more.
    pub(super) fn hand_over(&self, asked: HandOver) -> Result<Option<HandOver>, Status> {
        let id = asked.attempt_id().ok_or_else(command::unnamed)?;
        if id.owner < self.kept.owner(&id.generation) || self.passed.is_passed(&id) {
            return Ok(None);
        }
        let engine = self.passed.engine_name(id);
        Ok(Some(HandOver {
            owner: engine.owner,
            ..asked
        }))
    }

    /// Has the engine end attempts.
    pub(super) fn cancel(&mut self, ids: impl IntoIterator<Item = AttemptId>) {
        let ids = ids.into_iter().map(|id| self.passed.engine_name(id));
        let ids: Vec<_> = ids.collect();
        if !ids.is_empty() {
            self.tell(Event::Cancelled(ids));
        }
    }

    /// Has the engine end attempts that nobody can have any more.
    pub(super) fn drop_attempts(&mut self, ids: Vec<AttemptId>) {
        for id in &ids {
            self.kept.forget(id);
        }
        self.cancel(ids);
    }

    /// The same for attempts whose session nobody hears any more.
    pub(super) fn drop_unheard(&mut self, key: &str, ids: Vec<AttemptId>) {
        if !ids.is_empty() {
            let ends = ids.iter().cloned();
            let ends = ends.map(|id| AttemptEnd::session_ended(key, id)).collect();
            self.drop_attempts(ids);
            self.tell(Event::Ends(ends));
        }
    }

    /// Its router reads no more, or another start of it replaces the session: what others
    /// may resume of it waits for them, all else ends.
    pub(super) fn leave(&mut self, key: &str, end: End, now: Instant) {
        let Some(session) = self.sessions.get_mut(key) else {
            return;
        };
        let held = std::mem::take(&mut session.attempts);
        let (keep, drop): (Vec<_>, Vec<_>) =
            held.into_iter().partition(|(id, _)| self.kept.runs(id));
        session.attempts = keep.into_iter().collect();
        let waits = !session.attempts.is_empty();
        let since = session.orphaned.unwrap_or(now);
        session.orphaned = waits.then_some(since);
        let had_stream = session.is_open();
        if had_stream {
            session.end = Some(end);
            if let Some(reader) = session.reader.take() {
                reader.abort();
            }
            self.wakers.extend(session.waker.take());
        }
        self.drop_unheard(key, drop.into_iter().map(|(id, _)| id).collect());
        if !had_stream && !waits {
            self.sessions.remove(key);
        }
    }
}

/// The answer to what a router places that has it no more.
pub(super) fn taken_over() -> Refused {
    Refused {
        reason: RefusalReason::TakenOver.into(),
        message: TAKEN_OVER.to_owned(),
        field: String::new(),
    }
}
