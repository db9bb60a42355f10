//! The worker's life: draining, giving back, its role, its end.

use std::time::{Duration, Instant};

use bytes::Bytes;
use kvmesh_wire::v1::{
    GetInfoResponse, RefusalReason, Residue, Returned, Role, StageEnd, stage_end,
};
use tonic::Status;

use super::{State, ended};
use crate::{
    attempt::AttemptId,
    event::Event,
    report::Part,
    session::{End, Held, Session},
};

impl State {
    /// What has to be done now and then whatever happens.
    pub(crate) fn tick(&mut self, now: Instant) {
        if self
            .log
            .due(self.settings.cache_coalesce)
            .is_some_and(|due| due <= now)
        {
            self.publish();
        }
        self.mark_all();
        self.close_slow(now);
        if let Some((_, grace)) = self.grace.filter(|(ends, _)| *ends <= now) {
            self.give_back(grace, now);
        }
        self.drop_orphans(now);
        self.kept.expire(now, self.settings.orphan_ttl);
    }

    pub(super) fn close_slow(&mut self, now: Instant) {
        let slow: Vec<_> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.is_open())
            .filter_map(|(key, s)| Some((key.clone(), s.lanes.problem(&self.settings, now)?)))
            .collect();
        for (key, why) in slow {
            self.leave(&key, ended(Status::resource_exhausted(why)), now);
            if let Some(session) = self.sessions.get_mut(&key) {
                // Its stream stays until the router reads or goes; its frames need not.
                session.lanes.forget_beyond(0);
            }
        }
    }

    /// Takes no new work.
    pub(crate) fn drain(&mut self) {
        self.draining = true;
        self.mark_all();
    }

    /// Takes no new work; what still runs after the grace goes back.
    pub(crate) fn drain_within(&mut self, grace: Duration, now: Instant) {
        self.drain();
        self.grace = now.checked_add(grace).map(|ends| (ends, grace));
    }

    /// Gives running work back to its routers: the grace time has ended.
    pub(crate) fn give_back(&mut self, grace: Duration, now: Instant) {
        self.grace = None;
        let keys: Vec<_> = self.sessions.keys().cloned().collect();
        for key in keys {
            let held = match self.sessions.get(&key) {
                Some(session) if !session.attempts.is_empty() => session.attempts.clone(),
                _ => continue,
            };
            let part = Part {
                ends: held.iter().map(|id| returned(id, grace)).collect(),
                ..Part::default()
            };
            self.push_part(&key, 0, part, None, now);
            self.cancel(held.into_keys());
        }
    }

    /// Ends the streams of all sessions, whose routers attach again and are told
    /// who this worker is now. What they placed stays.
    pub(crate) fn greet_anew(&mut self) {
        let keys: Vec<_> = self.sessions.keys().cloned().collect();
        for key in keys {
            self.end(&key, End::Quiet);
        }
    }

    /// Ends all sessions once their step output has gone.
    pub(crate) fn end_all(&mut self) {
        let keys: Vec<_> = self.sessions.keys().cloned().collect();
        for key in keys {
            let status = Box::new(Status::unavailable("the worker has stopped"));
            let after_steps = true;
            self.end(
                &key,
                End::Status {
                    status,
                    after_steps,
                },
            );
        }
        self.closed = true;
        let orphaned =
            |(key, session): (&String, &Session)| session.orphaned.is_some().then(|| key.clone());
        let keys: Vec<_> = self.sessions.iter().filter_map(orphaned).collect();
        for key in keys {
            self.drop_session(&key);
        }
    }

    /// Changes the role; running work goes on.
    pub(crate) fn set_role(&mut self, role: Role) {
        self.record.role = role.into();
        self.tell(Event::RoleChanged(role.into()));
        self.mark_all();
    }

    /// The answer to `GetInfo`.
    pub(crate) fn info(&self, residue: Residue, now: Instant) -> GetInfoResponse {
        let residue = Residue {
            orphans: self.orphans() as u64,
            ..residue
        };
        GetInfoResponse {
            record: Some(self.record.clone()),
            load: Some(self.load_for(None, now)),
            routers: self.routers(),
            residue: Some(residue),
        }
    }
}

fn returned((attempt, held): (&AttemptId, &Held), grace: Duration) -> StageEnd {
    StageEnd {
        generation: Bytes::copy_from_slice(&attempt.generation),
        owner: attempt.owner,
        attempt: attempt.attempt,
        stage: held.stage,
        end: Some(stage_end::End::Returned(Returned {
            reason: RefusalReason::Draining.into(),
            message: format!(
                "the worker drains, and its grace of {} s has ended",
                grace.as_secs_f64()
            ),
        })),
        ..StageEnd::default()
    }
}
