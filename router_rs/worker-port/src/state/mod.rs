//! All state of a port, behind one lock.
//!
//! Whoever holds it does microseconds of work and never waits, so a session
//! can neither hold up another one nor the engine.

mod commands;
mod life;
mod outgoing;
mod report;
mod resume;

use std::{
    collections::{HashMap, VecDeque},
    task::Waker,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvmesh_wire::v1::{
    ProtocolVersion, Reattach, RouterHello, WorkerFrame, WorkerHello, WorkerPhase, WorkerRecord,
    worker_frame,
};
use prost::Message;
use tonic::Status;

pub(crate) use self::{commands::Taken, outgoing::Step};
use crate::{
    attempt::AttemptId,
    cache_log::CacheLog,
    command,
    event::Event,
    frames::step_frames,
    kept::Kept,
    load::EngineState,
    passed::Passed,
    replay::Wanted,
    report::Part,
    session::{End, Session},
    settings::Settings,
};

/// State of a port.
pub(crate) struct State {
    pub(crate) settings: Settings,
    pub(crate) record: WorkerRecord,
    pub(crate) draining: bool,
    pub(crate) phase: WorkerPhase,
    /// When what still runs goes back to its routers, and the grace it had.
    grace: Option<(Instant, Duration)>,
    pub(crate) sessions: HashMap<String, Session>,
    by_router: HashMap<String, String>,
    opened: u64,
    pub(crate) log: CacheLog,
    pub(crate) engine: EngineState,
    events: VecDeque<Event>,
    commands: usize,
    kept: Kept,
    passed: Passed,
    pub(crate) closed: bool,
    /// To be woken once the lock is free.
    wakers: Vec<Waker>,
}

impl State {
    pub(crate) fn new(settings: Settings) -> Self {
        Self {
            log: CacheLog::new(settings.cache_ring_events),
            settings,
            record: WorkerRecord::default(),
            draining: false,
            phase: WorkerPhase::Loading,
            grace: None,
            sessions: HashMap::new(),
            by_router: HashMap::new(),
            opened: 0,
            engine: EngineState::default(),
            events: VecDeque::new(),
            commands: 0,
            kept: Kept::default(),
            passed: Passed::default(),
            closed: false,
            wakers: Vec::new(),
        }
    }

    /// Who is to be woken now.
    pub(crate) fn take_wakers(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.wakers)
    }

    // -- events ------------------------------------------------------------

    /// Adds what the process is told, but for commands of routers: these few
    /// are bounded by sessions and calls.
    pub(crate) fn tell(&mut self, event: Event) {
        self.events.push_back(event);
    }

    /// All that has come.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        self.commands = 0;
        self.events.drain(..).collect()
    }

    pub(crate) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    // -- sessions ----------------------------------------------------------

    /// Opens a router's stream; one that it has ends. What this start of the
    /// router names of its attempts goes on, all else that it has here is
    /// dropped. Returns the session's key and the stream's number.
    pub(crate) fn open(
        &mut self,
        hello: &RouterHello,
        now: Instant,
    ) -> Result<(String, u64), Status> {
        let wanted = command::reattached(hello)?;
        let known = hello.known_worker_incarnation == self.record.incarnation;
        let mut next_event = if known {
            hello.known_event.saturating_add(1)
        } else {
            0
        };
        if !self.log.covers(next_event) {
            // An empty cache needs no snapshot; any other does.
            next_event = u64::from(self.log.last_event() == 0);
        }
        let before = self.by_router.get(&hello.router_id).cloned();
        let same = before.filter(|key| {
            let session = self.sessions.get(key);
            let incarnation = session.map(|session| session.router_incarnation);
            let same = incarnation == Some(hello.router_incarnation);
            if !same {
                self.drop_router(key, &hello.router_id, now);
            }
            same
        });
        let key = same.unwrap_or_else(|| self.add_session(hello, next_event));
        let Some(session) = self.sessions.get_mut(&key) else {
            return Err(Status::internal("a session that was just there"));
        };
        let kept = session.lanes.replay(&wanted, &session.attempts);
        let dropped = session.keep_only(&kept);
        self.wakers.extend(session.attach_anew(next_event));
        let reattached = |(wanted, _): &(Wanted, Part)| Reattach {
            generation: Bytes::copy_from_slice(&wanted.id.generation),
            owner: wanted.id.owner,
            attempt: wanted.id.attempt,
            next_index: wanted.next_index,
        };
        let answer = WorkerHello {
            version: Some(ProtocolVersion {
                major: command::MAJOR,
                minor: command::MINOR,
            }),
            record: Some(self.record.clone()),
            last_event: self.log.last_event(),
            resume_event: next_event,
            step_model: self.record.step_model,
            reattached: kept.iter().map(reattached).collect(),
        };
        let answer = WorkerFrame {
            frame: Some(worker_frame::Frame::Hello(answer)),
        };
        session.lanes.push(answer.encode_to_vec().into(), now);
        for (_, part) in kept {
            for frame in step_frames(0, part, None, None) {
                session.lanes.push(frame, now);
            }
        }
        let stream = session.stream;
        self.drop_attempts(dropped);
        Ok((key, stream))
    }

    fn add_session(&mut self, hello: &RouterHello, next_event: u64) -> String {
        self.opened += 1;
        let key = format!("{}/{}", hello.router_id, self.opened);
        let (router, incarnation) = (hello.router_id.clone(), hello.router_incarnation);
        let session = Session::new(router.clone(), incarnation, next_event);
        self.by_router.insert(router, key.clone());
        self.sessions.insert(key.clone(), session);
        key
    }

    /// Ends a session that another start of its router replaces.
    fn drop_router(&mut self, key: &str, router_id: &str, now: Instant) {
        let text = format!("router {router_id} attached anew");
        self.leave(key, ended(Status::resource_exhausted(text)), now);
    }

    /// Ends a session. One whose stream is gone waits for its router; of any
    /// other what its router has here is cancelled.
    pub(crate) fn end(&mut self, key: &str, end: End) {
        let Some(session) = self.sessions.get_mut(key).filter(|s| s.is_open()) else {
            return;
        };
        let waits = matches!(end, End::Quiet) && !self.closed;
        session.orphaned = waits.then(Instant::now);
        session.end = Some(end);
        if let Some(reader) = session.reader.take() {
            reader.abort();
        }
        self.wakers.extend(session.waker.take());
        if !waits {
            self.cancel_all(key);
        }
    }

    /// Cancels what a session has, and forgets whose it is.
    fn cancel_all(&mut self, key: &str) {
        let Some(session) = self.sessions.get_mut(key) else {
            return;
        };
        session.orphaned = None;
        let attempts = std::mem::take(&mut session.attempts);
        if self
            .by_router
            .get(&session.router_id)
            .is_some_and(|current| current == key)
        {
            self.by_router.remove(&session.router_id);
        }
        self.drop_unheard(key, attempts.into_keys().collect());
    }

    fn drop_session(&mut self, key: &str) {
        self.cancel_all(key);
        self.sessions.remove(key);
    }

    /// A stream of a session is gone.
    pub(crate) fn forget(&mut self, key: &str, stream: u64) {
        if self.streams(key, stream).is_none() {
            return;
        }
        self.end(key, End::Quiet);
        if self
            .sessions
            .get(key)
            .is_some_and(|session| session.orphaned.is_none())
        {
            self.sessions.remove(key);
        }
    }

    /// A session, as long as this is its stream.
    pub(crate) fn streams(&mut self, key: &str, stream: u64) -> Option<&mut Session> {
        self.sessions.get_mut(key).filter(|s| s.stream == stream)
    }

    /// The session of a snapshot that was asked for, while its stream wants it.
    pub(crate) fn snapshots(&mut self, name: &str) -> Option<&mut Session> {
        let (key, stream) = name.rsplit_once('#')?;
        let stream = stream.parse().ok()?;
        self.streams(key, stream).filter(|s| s.is_open())
    }

    /// Sessions with a stream.
    pub(crate) fn streaming(&self) -> usize {
        let with = |session: &&Session| session.orphaned.is_none();
        self.sessions.values().filter(with).count()
    }

    /// Attempts whose routers may come back.
    fn orphans(&self) -> usize {
        let orphaned = |session: &&Session| session.orphaned.is_some();
        let sessions = self.sessions.values().filter(orphaned);
        sessions.map(|session| session.attempts.len()).sum()
    }

    /// Drops what no router came back for. Where more waits for one that is away than is
    /// kept, the oldest is forgotten: what others may resume goes on, within what is kept
    /// for them, all else ends.
    fn drop_orphans(&mut self, now: Instant) {
        let (ttl, most) = (self.settings.orphan_ttl, self.settings.replay_bytes);
        let (mut over, mut forgotten) = (Vec::new(), Vec::new());
        for (key, session) in &mut self.sessions {
            let Some(since) = session.orphaned else {
                continue;
            };
            if now.saturating_duration_since(since) > ttl {
                over.push(key.clone());
            } else if session.lanes.forget_beyond(most) {
                let held = std::mem::take(&mut session.attempts);
                let (keep, lost): (Vec<_>, Vec<_>) =
                    held.into_iter().partition(|(id, _)| self.kept.runs(id));
                session.attempts = keep.into_iter().collect();
                let lost: Vec<AttemptId> = lost.into_iter().map(|(id, _)| id).collect();
                forgotten.push((key.clone(), lost));
            }
        }
        for (key, lost) in forgotten {
            self.drop_unheard(&key, lost);
        }
        for key in over {
            self.drop_session(&key);
        }
    }

    /// Attempts that have not ended.
    pub(crate) fn running(&self) -> usize {
        self.sessions.values().map(|s| s.attempts.len()).sum()
    }

    /// Ids of routers with an open session, sorted.
    pub(crate) fn routers(&self) -> Vec<String> {
        let open = self.by_router.iter().filter(|(_, key)| {
            let session = self.sessions.get(*key);
            session.is_some_and(Session::is_open)
        });
        let mut routers: Vec<_> = open.map(|(router, _)| router.clone()).collect();
        routers.sort();
        routers
    }
}

/// A session that the worker ends at once.
pub(crate) fn ended(status: Status) -> End {
    End::Status {
        status: Box::new(status),
        after_steps: false,
    }
}
