//! What a worker's frames do: the path of every token.

use std::{sync::Arc, time::Instant};

use kvmesh_session::{
    Fence, GenerationId, Violation,
    generation::Event as GenerationEvent,
    link::{Event, State},
    parse::{self, Answer, End, Found, Holds, Inbound, LoadReport, StageEnd, StepFrame},
};
use kvmesh_wire::v1;
use prost::Message as _;

use super::{
    super::{counters::Counters, open::Open},
    Held, Session,
};

impl Session {
    pub(super) fn frame(&mut self, frame: v1::WorkerFrame) -> Result<(), Violation> {
        let counters = &self.core.counters;
        let bytes = frame.encoded_len() as u64;
        let now = Instant::now();
        self.worker.heard(now);
        match parse::worker_frame(frame)? {
            Inbound::Step(step) => {
                counters.step_frames.add(1);
                counters.step_bytes.add(bytes);
                let actions = self.link.apply(Event::Frame(step.load.as_ref()))?;
                self.perform(actions);
                self.step(&step, now)?;
                self.ends(*step)
            }
            Inbound::Load(load) => {
                counters.load_frames.add(1);
                counters.load_bytes.add(bytes);
                let actions = self.link.apply(Event::Frame(Some(&*load)))?;
                self.perform(actions);
                self.load(&load);
                Ok(())
            }
            Inbound::Cache(events) => {
                counters.cache_frames.add(1);
                counters.cache_bytes.add(bytes);
                let actions = self.link.apply(Event::Frame(None))?;
                self.perform(actions);
                if self.link.indexed()
                    && let Some(event) = self.core.cache_events(&self.worker, &events)
                {
                    self.link.saw_event(event);
                }
                Ok(())
            }
            Inbound::Unknown => Ok(()),
        }
    }

    /// Openings and tokens of a step.
    fn step(&mut self, step: &StepFrame, now: Instant) -> Result<(), Violation> {
        let index = self.worker.index;
        for opening in &step.openings {
            let refusal = match opening.answer {
                Answer::Refused(why) => Some(why),
                Answer::Reserved { .. } => None,
            };
            if refusal.is_some() {
                self.feed(Event::Answered);
                self.core.counters.refusals.add(1);
            }
            let Some(open) = self.held(&opening.generation, opening.fence, refusal.is_some())
            else {
                self.core.counters.stale_frames.add(1);
                continue;
            };
            if let Some(reason) = refusal {
                tracing::debug!(
                    generation = %opening.generation,
                    owner = opening.fence.owner,
                    attempt = opening.fence.attempt,
                    stage = ?opening.stage,
                    worker = %self.worker.name(),
                    ?reason,
                    "refused"
                );
            }
            if let Some(lacks) = &opening.lacks {
                open.engine_lacks(lacks);
            }
            open.try_apply(GenerationEvent::Opening {
                from: index,
                fence: opening.fence,
                stage: opening.stage,
                answer: opening.answer.clone(),
            })?;
        }
        if step.rows.iter().next().is_some() {
            // Once a frame: what is half open works.
            self.works();
        }
        let mut counted = Rows::new(&self.core.counters);
        let mut violation = None;
        for row in step.rows.iter() {
            let Some(held) = self.open.get(&row.generation) else {
                counted.stale += 1;
                continue;
            };
            match held
                .open
                .tokens((index, step.step), &row, now, &mut self.brought)
            {
                Ok(Some(count)) => counted.new += count as u64,
                Ok(None) => counted.stale += 1,
                Err(broken) => {
                    violation = Some(broken);
                    break;
                }
            }
        }
        drop(counted);
        // After the counts: a stream that is woken takes from them.
        for waker in self.brought.wake.drain(..) {
            waker.wake();
        }
        violation.map_or(Ok(()), Err)
    }

    fn works(&mut self) {
        if matches!(self.link.state(), State::HalfOpen { probe: Some(_) }) {
            self.feed(Event::Answered);
        }
    }

    /// What an end says of its worker. A client's own error says nothing
    /// against it.
    fn judge(&mut self, of: &StageEnd) {
        let blamed = match &of.end {
            End::Failed(failure) if failure.retryable => self.core.may_eject(&self.worker),
            // The other worker may be to blame, or the way between them.
            End::TransferFailed => false,
            _ => return self.feed(Event::Answered),
        };
        let held = self.open.get(&of.generation);
        let placed = held.filter(|held| held.fence == of.fence);
        let number = placed.map_or(0, |held| held.command);
        self.feed(match blamed {
            true => Event::Faulted(number),
            false => Event::Undecided(number),
        });
    }

    /// The generation that a frame speaks of. With `ends` it is let go of,
    /// unless a newer attempt of it is here.
    fn held(&mut self, id: &GenerationId, fence: Fence, ends: bool) -> Option<Arc<Open>> {
        let held = self.open.get(id)?;
        if ends && held.fence <= fence {
            return self.open.remove(id).map(|held| held.open);
        }
        Some(Arc::clone(&held.open))
    }

    /// Ends of a step, and what it took.
    fn ends(&mut self, step: StepFrame) -> Result<(), Violation> {
        for found in step.found {
            self.found(found);
        }
        for end in step.ends {
            self.judge(&end);
            match self.held(&end.generation, end.fence, true) {
                Some(open) => open.stage_end(self.worker.index, end)?,
                None => self.core.counters.stale_frames.add(1),
            }
        }
        // The step during which a worker was frozen says nothing of its steps.
        if let Some(sample) = &step.sample
            && *self.link.state() == State::Live
        {
            self.core.step_sample(&self.worker, sample);
        }
        let computed = std::mem::take(&mut self.brought.computed);
        match &step.load {
            Some(load) => self.load(load),
            None if computed => self.core.prompts_computed(&self.worker),
            None => {}
        }
        Ok(())
    }

    /// A worker says what it has of a generation, or gives it. What it says of it from then
    /// on is for whoever goes on with it.
    fn found(&mut self, found: Found) {
        let id = found.generation;
        if matches!(found.what, Holds::Nothing | Holds::This(..)) {
            self.worker.answered();
        }
        if let Some(taking) = self.core.resumes.get(&id) {
            if let Some((open, fence)) = taking.found(self.worker.index, found) {
                self.open.insert(
                    id,
                    Held {
                        fence,
                        command: 0,
                        open,
                    },
                );
            }
        } else if let Holds::Claimed(held, _) = found.what
            && let Some(session) = self.worker.session()
        {
            match self.core.opened(id) {
                // Beside the one that is gone on with here.
                Some(_) => session.cancel(id, held.fence),
                // Whoever claimed it waits no longer.
                None => self.core.leave_running(&session, id, held.fence),
            }
        }
    }

    fn load(&mut self, report: &LoadReport) {
        self.worker.loaded(report);
        self.core.worker_loaded(&self.worker, report);
        self.leave(report);
    }
}

/// Counts the rows of a frame when it is dropped, also by a panic among them:
/// streams take from these counts what they were given.
struct Rows<'a> {
    counters: &'a Counters,
    new: u64,
    stale: u64,
}

impl<'a> Rows<'a> {
    fn new(counters: &'a Counters) -> Self {
        Self {
            counters,
            new: 0,
            stale: 0,
        }
    }
}

impl Drop for Rows<'_> {
    fn drop(&mut self) {
        self.counters.tokens.add(self.new);
        self.counters.undelivered_ids.add(self.new);
        if self.stale > 0 {
            self.counters.stale_frames.add(self.stale);
        }
    }
}
