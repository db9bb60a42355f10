//! One router's session, but for the stream itself.

use std::{
    collections::{BTreeMap, VecDeque},
    task::Waker,
    time::Instant,
};

use kvmesh_wire::v1::{Opening, StageEnd, opening::Answer};
use tokio::task::AbortHandle;
use tonic::Status;

use crate::{
    attempt::{AttemptId, NamesAttempt},
    lanes::Lanes,
    replay::Wanted,
    report::Part,
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
    /// When it was placed.
    pub(crate) placed: Instant,
    /// The stage, as on the wire.
    pub(crate) stage: i32,
    /// That it was reserved, once the engine said so.
    pub(crate) opening: Option<Opening>,
}

/// A router's session, over the streams by which it attaches; entered by its
/// key, which is unique over the life of the worker: answers to an old session
/// find nobody.
pub(crate) struct Session {
    pub(crate) router_id: String,
    pub(crate) router_incarnation: u64,
    /// Number of the stream that it has, or had last.
    pub(crate) stream: u64,
    /// Since when it has none: its router may come back.
    pub(crate) orphaned: Option<Instant>,
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
    pub(crate) fn new(router_id: String, router_incarnation: u64, next_event: u64) -> Self {
        Self {
            router_id,
            router_incarnation,
            stream: 0,
            orphaned: None,
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

    /// Whether it gets what the engine says: over its stream, or kept for when
    /// its router is back.
    pub(crate) fn listens(&self) -> bool {
        self.is_open() || self.orphaned.is_some()
    }

    /// Its router is back with another stream: its commands count anew. Gives
    /// back what said that the old one's stream waits.
    pub(crate) fn attach_anew(&mut self, next_event: u64) -> Option<Waker> {
        self.stream += 1;
        self.orphaned = None;
        self.end = None;
        self.pending.clear();
        self.last_number = 0;
        self.lanes = Lanes::new(next_event);
        if let Some(reader) = self.reader.take() {
            reader.abort();
        }
        self.waker.take()
    }

    /// Keeps what a router that is back named and what is known; gives the
    /// attempts that are dropped.
    pub(crate) fn keep_only(&mut self, kept: &[(Wanted, Part)]) -> Vec<AttemptId> {
        let named = |id: &AttemptId| kept.iter().any(|(wanted, _)| wanted.id == *id);
        let held = std::mem::take(&mut self.attempts);
        let (keep, drop): (Vec<_>, Vec<_>) = held.into_iter().partition(|(id, _)| named(id));
        self.attempts = keep.into_iter().collect();
        drop.into_iter().map(|(id, _)| id).collect()
    }

    /// A command was read.
    pub(crate) fn read(&mut self, number: u64) {
        if number > 0 {
            self.last_number = number;
            self.lanes.mark_load();
        }
    }

    /// A place was handed to the engine; its number counts once it is answered.
    pub(crate) fn placed(&mut self, number: u64, attempt: AttemptId, stage: i32, now: Instant) {
        let held = Held {
            placed: now,
            stage,
            opening: None,
        };
        self.attempts.insert(attempt.clone(), held);
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
        } else if let Some(held) = self.attempts.get_mut(&attempt) {
            held.opening = Some(opening.clone());
        }
    }

    /// Another session has an attempt from now on.
    pub(crate) fn left(&mut self, id: &AttemptId) -> Option<Held> {
        self.pending.retain(|(_, placed)| placed != id);
        self.attempts.remove(id)
    }

    /// A stage ended. False: that was known, or it names no attempt.
    pub(crate) fn ended(&mut self, end: &StageEnd) -> bool {
        end.attempt_id()
            .is_some_and(|attempt| self.attempts.remove(&attempt).is_some())
    }
}
