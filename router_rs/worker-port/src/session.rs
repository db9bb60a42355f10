//! One router's session, but for the stream itself.

use std::{
    collections::{BTreeMap, VecDeque},
    task::Waker,
};

use kvmesh_wire::v1::{Opening, StageEnd, opening::Answer};
use tokio::task::AbortHandle;
use tonic::Status;

use crate::{
    attempt::{AttemptId, NamesAttempt},
    lanes::Lanes,
};

/// How a session ends for its router.
#[derive(Clone, Debug)]
pub(crate) enum End {
    /// The router closed it, or is gone.
    Quiet,
    /// The worker closes it, once what waits has gone where `after_steps` is set.
    Status {
        /// What the router is told.
        status: Box<Status>,
        /// Whether the step lane is drained first.
        after_steps: bool,
    },
}

/// An attempt that was placed and has not ended.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    /// The stage that was asked for, as on the wire.
    pub(crate) stage: i32,
}

/// A session; entered by its key, which is unique over the life of the worker:
/// answers to an old session find nobody.
pub(crate) struct Session {
    pub(crate) router_id: String,
    pub(crate) lanes: Lanes,
    /// Attempts placed here and not ended.
    pub(crate) attempts: BTreeMap<AttemptId, Held>,
    /// Set once: from then on nothing is taken in.
    pub(crate) end: Option<End>,
    /// Reads the router's commands.
    pub(crate) reader: Option<AbortHandle>,
    /// Whoever sends waits with this.
    pub(crate) waker: Option<Waker>,
    /// Numbers of places that the engine has not answered yet, with what they
    /// placed.
    pending: VecDeque<(u64, AttemptId)>,
    last_number: u64,
}

impl Session {
    pub(crate) fn new(router_id: String, next_event: u64) -> Self {
        Self {
            router_id,
            lanes: Lanes::new(next_event),
            attempts: BTreeMap::new(),
            end: None,
            reader: None,
            waker: None,
            pending: VecDeque::new(),
            last_number: 0,
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.end.is_none()
    }

    /// A command was read.
    pub(crate) fn read(&mut self, number: u64) {
        if number > 0 {
            self.last_number = number;
            self.lanes.mark_load();
        }
    }

    /// A place was handed to the engine; its number counts once it is answered.
    pub(crate) fn placed(&mut self, number: u64, attempt: AttemptId, stage: i32) {
        self.attempts.insert(attempt.clone(), Held { stage });
        if number > 0 {
            self.pending.push_back((number, attempt));
        }
    }

    /// Number of the last command that the engine's state reflects.
    pub(crate) fn reflected(&self) -> u64 {
        match self.pending.front() {
            Some((number, _)) => number - 1,
            None => self.last_number,
        }
    }

    /// The engine answered a place.
    pub(crate) fn opened(&mut self, opening: &Opening) {
        let Some(attempt) = opening.attempt_id() else {
            return;
        };
        if let Some(at) = self.pending.iter().position(|(_, id)| *id == attempt) {
            self.pending.remove(at);
        }
        if matches!(opening.answer, Some(Answer::Refused(_))) {
            self.attempts.remove(&attempt);
        }
    }

    /// A stage ended. False: that was known, or it names no attempt.
    pub(crate) fn ended(&mut self, end: &StageEnd) -> bool {
        end.attempt_id()
            .is_some_and(|attempt| self.attempts.remove(&attempt).is_some())
    }
}
