//! What the engine says, handed to the sessions that it concerns.

use std::time::Instant;

use kvmesh_wire::v1::StepSample;

use super::State;
use crate::{
    cache_log::Change,
    ends::AttemptEnd,
    error::PortError,
    event::Event,
    frames::step_frames,
    report::{Part, Report},
};

impl State {
    /// Hands what the engine said to the sessions.
    pub(crate) fn report(&mut self, report: Report, now: Instant) -> Result<(), PortError> {
        self.engine.update(report.load, now);
        let mut told = Vec::with_capacity(report.parts.len());
        for (key, part) in self.passed.sort(report.parts) {
            self.push_part(&key, report.step, part, report.sample, now);
            told.push(key);
        }
        // A step without anything for a router that has work here: its sample
        // counts all the same.
        let mut idle = Vec::new();
        for (key, session) in &mut self.sessions {
            if told.contains(key) || !session.is_open() {
                continue;
            }
            if report.sample.is_some() && !session.attempts.is_empty() {
                idle.push(key.clone());
            } else {
                session.lanes.mark_load();
                self.wakers.extend(session.waker.take());
            }
        }
        for key in idle {
            self.push_part(&key, report.step, Part::default(), report.sample, now);
        }
        if let Some((first, changes)) = report.cache {
            self.append(first, changes, now)?;
        } else if self
            .log
            .due(self.settings.cache_coalesce / 2)
            .is_some_and(|due| due <= now)
        {
            // With the frames of this step, so that no timer has to wake for it.
            self.publish();
        }
        Ok(())
    }

    pub(super) fn push_part(
        &mut self,
        key: &str,
        step: u64,
        part: Part,
        sample: Option<StepSample>,
        now: Instant,
    ) {
        let Some(session) = self.sessions.get_mut(key).filter(|s| s.listens()) else {
            return;
        };
        for opening in &part.openings {
            session.opened(opening);
            self.kept.opened(opening);
        }
        if let Some(rows) = &part.tokens {
            let record = self.record.capabilities.as_ref();
            let emits = record.is_some_and(|can| can.prefill_emits_first_token);
            self.kept.made(rows, emits, self.settings.resume_bytes);
        }
        let mut ends = Vec::new();
        for end in &part.ends {
            self.kept.ended(end, now);
            if session.ended(end) {
                ends.extend(AttemptEnd::of(key, end));
            }
        }
        if !self.settings.tell_all_ends {
            ends.retain(|end| !end.is_ordinary());
        }
        let load = if session.is_open() && session.lanes.load_is_due(&self.settings, now) {
            session.lanes.load_goes(now);
            let load = self.load_for(Some(key), now);
            self.unless_held(key, load, now)
        } else {
            session.lanes.mark_load();
            None
        };
        let Some(session) = self.sessions.get_mut(key) else {
            return;
        };
        for frame in step_frames(step, part, sample, load) {
            session.lanes.push(frame, now);
        }
        self.wakers.extend(session.waker.take());
        let open = session.is_open();
        let slow = open && session.lanes.problem(&self.settings, now).is_some();
        if !ends.is_empty() {
            self.tell(Event::Ends(ends));
        }
        // Of one that is not open nobody takes anything: it is looked after with
        // the other orphans.
        if slow {
            self.close_slow(now);
        }
    }

    fn append(&mut self, first: u64, changes: Vec<Change>, now: Instant) -> Result<(), PortError> {
        let was_waiting = self.log.due(self.settings.cache_coalesce / 2);
        let many = self.log.append(first, changes, now)?;
        if many || was_waiting.is_some_and(|due| due <= now) {
            self.publish();
        } else if was_waiting.is_none()
            && let Some(session) = self.sessions.values_mut().next()
        {
            // One of them sees that it is told in time.
            self.wakers.extend(session.waker.take());
        }
        Ok(())
    }
}
