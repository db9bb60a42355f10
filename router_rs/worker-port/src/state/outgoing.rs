//! What a session's stream sends next, and load as its router sees it.

use std::{task::Waker, time::Instant};

use bytes::Bytes;
use kvmesh_wire::v1::{Load, WorkerFrame, worker_frame};
use prost::Message;
use tonic::Status;

use super::State;
use crate::{
    event::Event,
    lanes::Next,
    session::{End, Session},
};

/// What a session's stream does next.
pub(crate) enum Step {
    /// Sends this.
    Frame(Bytes),
    /// Ends, with a status or without.
    End(Option<Status>),
    /// Waits.
    Wait(Option<Instant>),
}

impl State {
    /// What a session's stream does next. Where it waits, `waker` is kept.
    pub(crate) fn next(&mut self, key: &str, stream: u64, now: Instant, waker: &Waker) -> Step {
        let coalesce = self.settings.cache_coalesce;
        if self.log.due(coalesce).is_some_and(|due| due <= now) {
            self.publish();
        }
        let step_ends = self.engine.step_ends(now);
        loop {
            let Some(session) = self.sessions.get_mut(key) else {
                return Step::End(None);
            };
            if session.stream != stream {
                let text = format!("router {} attached anew", session.router_id);
                return Step::End(Some(Status::resource_exhausted(text)));
            }
            match &session.end {
                Some(End::Quiet) => return Step::End(None),
                Some(End::Status {
                    status,
                    after_steps,
                }) if !after_steps || !session.lanes.has_steps() => {
                    return Step::End(Some((**status).clone()));
                }
                _ => {}
            }
            match session
                .lanes
                .next(&self.log, &self.settings, now, step_ends)
            {
                Next::Frame(frame) => return Step::Frame(frame),
                Next::Load => {
                    session.lanes.load_goes(now);
                    let load = self.load_for(Some(key), now);
                    if let Some(load) = self.unless_held(key, load, now) {
                        return Step::Frame(load_frame(load));
                    }
                }
                Next::SnapshotWanted => {
                    let session = format!("{key}#{stream}");
                    self.tell(Event::SnapshotWanted { session });
                }
                Next::Wait(until) => {
                    session.waker = Some(waker.clone());
                    return Step::Wait(until);
                }
            }
        }
    }

    /// Load as a session sees it; for `None`, all routers' work is `own`.
    pub(crate) fn load_for(&self, key: Option<&str>, now: Instant) -> Load {
        let session = key.and_then(|key| self.sessions.get(key));
        let mut load = self.engine.load(key, now);
        load.last_command = session.map_or(0, Session::reflected);
        load.role = self.record.role;
        load.phase = self.phase.into();
        load.draining = self.draining;
        load
    }

    /// A load report that goes now; where reports are delayed it waits in its
    /// session's lanes.
    pub(super) fn unless_held(&mut self, key: &str, load: Load, now: Instant) -> Option<Load> {
        let delay = self.settings.load_delay;
        if delay.is_zero() {
            return Some(load);
        }
        let session = self.sessions.get_mut(key)?;
        session.lanes.hold_load(now + delay, load_frame(load));
        None
    }

    /// Marks the load of every session.
    pub(crate) fn mark_all(&mut self) {
        for session in self.sessions.values_mut() {
            session.lanes.mark_load();
            self.wakers.extend(session.waker.take());
        }
    }

    pub(super) fn publish(&mut self) {
        self.log.publish();
        for session in self.sessions.values_mut() {
            self.wakers.extend(session.waker.take());
        }
    }
}

fn load_frame(load: Load) -> Bytes {
    let frame = WorkerFrame {
        frame: Some(worker_frame::Frame::Load(load)),
    };
    frame.encode_to_vec().into()
}
