//! What routers say.

use std::time::Instant;

use kvmesh_wire::v1::{Cancel, RouterFrame, router_frame::Frame};
use tonic::Status;

use super::{State, resume};
use crate::{
    attempt::{AttemptId, NamesAttempt},
    command,
    event::Event,
    report::Part,
    session::Session,
};

/// Commands of routers that wait for the worker's process; then sessions are
/// not read.
const MAX_COMMANDS: usize = 1_024;

/// What became of a command.
pub(crate) enum Taken {
    /// It was taken in.
    Yes,
    /// Too many wait: it is to be brought again.
    Full(Box<RouterFrame>),
}

impl State {
    /// Takes a command in.
    pub(crate) fn command(
        &mut self,
        (key, stream): (&str, u64),
        frame: RouterFrame,
        now: Instant,
    ) -> Result<Taken, Status> {
        if self.commands >= MAX_COMMANDS {
            return Ok(Taken::Full(Box::new(frame)));
        }
        let session = self.sessions.get_mut(key);
        let Some(session) = session.filter(|s| s.stream == stream && s.is_open()) else {
            return Ok(Taken::Yes);
        };
        let number = frame.number;
        match frame.frame {
            Some(Frame::Place(mut place)) => {
                let attempt = place.attempt_id().ok_or_else(command::unnamed)?;
                session.read(number);
                let over = attempt.owner < self.kept.owner(&attempt.generation);
                let refusal = over
                    .then(resume::taken_over)
                    .or_else(|| command::refusal(&place, &self.record, self.draining));
                if let Some(refusal) = refusal {
                    let openings = vec![command::refused(&place, refusal)];
                    let part = Part {
                        openings,
                        ..Part::default()
                    };
                    self.push_part(key, 0, part, None, now);
                } else {
                    let most = self.settings.resume_bytes;
                    self.kept.placed(key, &attempt, &mut place, most);
                    session.placed(number, attempt, place.stage, now);
                    self.commands += 1;
                    self.tell(Event::Placed {
                        session: key.to_owned(),
                        place: Box::new(place),
                        received: now,
                    });
                }
            }
            Some(Frame::Cancel(cancel)) => {
                let ended = named(session, &cancel)?;
                session.read(number);
                if !ended.is_empty() {
                    self.commands += 1;
                    self.cancel(ended);
                }
            }
            Some(Frame::HandOver(hand_over)) => {
                session.read(number);
                if let Some(hand_over) = self.hand_over(hand_over)? {
                    self.commands += 1;
                    self.tell(Event::HandOver(hand_over));
                }
            }
            Some(Frame::Find(find)) => {
                session.read(number);
                self.find(key, &find, now)?;
            }
            Some(Frame::Claim(claim)) => {
                session.read(number);
                self.claim(key, &claim, now)?;
            }
            Some(Frame::Hello(_)) => {
                return Err(Status::invalid_argument(
                    "hello comes once, as the first frame",
                ));
            }
            // Of a later minor version.
            None => session.read(number),
        }
        if let Some(session) = self.sessions.get_mut(key) {
            self.wakers.extend(session.waker.take());
        }
        Ok(Taken::Yes)
    }
}

/// Attempts that a cancel names: the one, and those of the generation before it.
fn named(session: &Session, cancel: &Cancel) -> Result<Vec<AttemptId>, Status> {
    let last = cancel.attempt_id().ok_or_else(command::unnamed)?;
    let held = session.attempts.keys();
    Ok(held
        .filter(|id| id.generation == last.generation && **id <= last)
        .cloned()
        .collect())
}
