//! All state of a port, behind one lock.
//!
//! Whoever holds it does microseconds of work and never waits, so a session
//! can neither hold up another one nor the engine.

use std::{
    collections::{HashMap, VecDeque},
    task::Waker,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvmesh_wire::v1::{
    Cancel, Found, GetInfoResponse, Load, ProtocolVersion, Reattach, RefusalReason, Residue,
    Returned, Role, RouterFrame, RouterHello, StageEnd, StepOutput, WorkerFrame, WorkerHello,
    WorkerPhase, WorkerRecord, router_frame::Frame, stage_end, worker_frame,
};
use prost::Message;
use tonic::Status;

use crate::{
    attempt::{AttemptId, NamesAttempt},
    cache_log::{CacheLog, Change},
    command,
    ends::AttemptEnd,
    error::PortError,
    event::Event,
    frames::{encode_step, step_frames},
    lanes::Next,
    load::EngineState,
    replay::Wanted,
    report::{Part, Report},
    session::{End, Held, Session},
    settings::Settings,
};

/// Commands of routers that wait for the worker's process; then sessions are
/// not read.
const MAX_COMMANDS: usize = 1_024;

/// What a session's stream does next.
pub(crate) enum Step {
    /// Sends this.
    Frame(Bytes),
    /// Ends, with a status or without.
    End(Option<Status>),
    /// Waits.
    Wait(Option<Instant>),
}

/// What became of a command.
pub(crate) enum Taken {
    /// It was taken in.
    Yes,
    /// Too many wait: it is to be brought again.
    Full(Box<RouterFrame>),
}

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
                self.drop_router(key, &hello.router_id);
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
        if !dropped.is_empty() {
            self.tell(Event::Cancelled(dropped));
        }
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
    fn drop_router(&mut self, key: &str, router_id: &str) {
        let text = format!("router {router_id} attached anew");
        if self.sessions.get(key).is_some_and(Session::is_open) {
            self.end(key, ended(Status::resource_exhausted(text)));
        } else {
            self.drop_session(key);
        }
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
        if !attempts.is_empty() {
            let attempts: Vec<_> = attempts.into_keys().collect();
            let ends = attempts.iter().cloned();
            let ends = ends.map(|id| AttemptEnd::session_ended(key, id)).collect();
            self.tell(Event::Cancelled(attempts));
            self.tell(Event::Ends(ends));
        }
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

    /// Drops what no router came back for, and what grew beyond its bound.
    fn drop_orphans(&mut self, now: Instant) {
        let (ttl, most) = (self.settings.orphan_ttl, self.settings.replay_bytes);
        let over: Vec<_> = self
            .sessions
            .iter()
            .filter(|(_, session)| {
                session.orphaned.is_some_and(|since| {
                    now.saturating_duration_since(since) > ttl
                        || session.lanes.waiting_bytes() > most
                })
            })
            .map(|(key, _)| key.clone())
            .collect();
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

    // -- what a stream sends -----------------------------------------------

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
    fn unless_held(&mut self, key: &str, load: Load, now: Instant) -> Option<Load> {
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

    fn publish(&mut self) {
        self.log.publish();
        for session in self.sessions.values_mut() {
            self.wakers.extend(session.waker.take());
        }
    }

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
    }

    fn close_slow(&mut self, now: Instant) {
        let slow: Vec<_> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.is_open())
            .filter_map(|(key, s)| Some((key.clone(), s.lanes.problem(&self.settings, now)?)))
            .collect();
        for (key, why) in slow {
            self.end(&key, ended(Status::resource_exhausted(why)));
            if let Some(session) = self.sessions.get_mut(&key) {
                // Its stream stays until the router reads or goes; its frames need not.
                session.lanes = crate::lanes::Lanes::new(0);
            }
        }
    }

    // -- what the engine says ----------------------------------------------

    /// Hands what the engine said to the sessions.
    pub(crate) fn report(&mut self, report: Report, now: Instant) -> Result<(), PortError> {
        self.engine.update(report.load, now);
        let mut told = Vec::with_capacity(report.parts.len());
        for (key, part) in report.parts {
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

    fn push_part(
        &mut self,
        key: &str,
        step: u64,
        part: Part,
        sample: Option<kvmesh_wire::v1::StepSample>,
        now: Instant,
    ) {
        let Some(session) = self.sessions.get_mut(key).filter(|s| s.listens()) else {
            return;
        };
        for opening in &part.openings {
            session.opened(opening);
        }
        let mut ends = Vec::new();
        for end in &part.ends {
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

    // -- what routers say --------------------------------------------------

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
            Some(Frame::Place(place)) => {
                let attempt = place.attempt_id().ok_or_else(command::unnamed)?;
                session.read(number);
                let refusal = command::refusal(&place, &self.record, self.draining);
                if let Some(refusal) = refusal {
                    let openings = vec![command::refused(&place, refusal)];
                    let part = Part {
                        openings,
                        ..Part::default()
                    };
                    self.push_part(key, 0, part, None, now);
                } else {
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
                    self.tell(Event::Cancelled(ended));
                }
            }
            Some(Frame::HandOver(hand_over)) => {
                hand_over.attempt_id().ok_or_else(command::unnamed)?;
                session.read(number);
                self.commands += 1;
                self.tell(Event::HandOver(hand_over));
            }
            Some(Frame::Find(find)) => {
                session.read(number);
                self.push_unknown(key, find.generation, now);
            }
            Some(Frame::Claim(claim)) => {
                session.read(number);
                self.push_unknown(key, claim.generation, now);
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

    /// Nothing outlives its session here, so nothing is ever found.
    fn push_unknown(&mut self, key: &str, generation: Bytes, now: Instant) {
        let found = Found {
            generation,
            known: false,
            ..Found::default()
        };
        let frame = encode_step(StepOutput {
            last: true,
            found: vec![found],
            ..StepOutput::default()
        });
        if let Some(session) = self.sessions.get_mut(key) {
            session.lanes.push(frame, now);
        }
    }

    // -- life --------------------------------------------------------------

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
            self.tell(Event::Cancelled(held.into_keys().collect()));
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

/// A session that the worker ends at once.
pub(crate) fn ended(status: Status) -> End {
    End::Status {
        status: Box::new(status),
        after_steps: false,
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

fn load_frame(load: Load) -> Bytes {
    let frame = WorkerFrame {
        frame: Some(worker_frame::Frame::Load(load)),
    };
    frame.encode_to_vec().into()
}
