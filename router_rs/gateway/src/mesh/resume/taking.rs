//! A generation on its way here from another router, asked for by the call that resumes it
//! and driven by a task of its own and by the sessions that answer: a call that breaks off
//! leaves nothing half taken.

use std::{
    any::Any,
    collections::{BTreeMap, BTreeSet, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use kvmesh_session::{
    Command, Fence, GenerationId, Takeover, WorkerIndex,
    link::LOST_MS,
    parse::{Found, Holds},
    takeover::{Action, Actions, Event, Refused, Take},
};
use kvmesh_wire::output_digest;
use tokio_util::sync::CancellationToken;

use super::{
    super::{
        Core,
        continuation::tenant_name,
        dispatch,
        open::{Claimed, Open, Party},
        session::{Outgoing, SessionHandle, text_of},
        table::WorkerEntry,
    },
    ResumeAsked,
    asked::request,
};
use crate::error::RequestError;

/// What was heard so soon after all were asked may have been on its way before.
const UNDER_WAY: Duration = Duration::from_millis(250);
/// How long a worker that cannot be asked may have it all the same: as long as one that is
/// silent is not given up.
const AWAY: Duration = Duration::from_millis(LOST_MS);

/// A call that panics where what it asked for is opened.
#[cfg(test)]
pub(in crate::mesh) const PANICS_IN_ITS_TAKEOVER: &str = "panics-in-its-takeover";

/// A takeover under way.
pub(in crate::mesh) struct Taking {
    pub(super) core: Arc<Core>,
    pub(super) asked: ResumeAsked,
    /// Digest of the ids that its client has; `None`: it does not say which.
    pub(super) had: Option<u64>,
    state: Mutex<State>,
    over: CancellationToken,
}

struct State {
    machine: Takeover,
    sessions: BTreeMap<WorkerIndex, Arc<SessionHandle>>,
    /// Number of the claim to each worker: what is booked for it counts from there on.
    claims: BTreeMap<WorkerIndex, u64>,
    /// Who has said what it has, and has a session still.
    answered: BTreeSet<WorkerIndex>,
    /// When all were asked.
    asked: Instant,
    /// Until when answers are waited for.
    until: Instant,
    ended: Option<Result<Arc<Open>, RequestError>>,
    /// Nobody waits for it any more, and whether somebody may come back for it.
    left: Option<Gone>,
}

impl State {
    fn note(&mut self, event: &Event) {
        match event {
            Event::Found { from, found, .. }
                if matches!(found.what, Holds::Nothing | Holds::This(..)) =>
            {
                self.answered.insert(*from);
            }
            Event::SessionLost(worker) => {
                self.answered.remove(worker);
            }
            Event::Found { .. } | Event::Fired => {}
        }
    }

    /// Nobody waits for it, and nobody was disturbed for it yet.
    fn is_unwanted(&self) -> bool {
        self.left.is_some() && self.claims.is_empty()
    }
}

/// How a call went that did not wait for its answer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Gone {
    /// Its connection broke, or its time was over.
    Cut,
    /// Its client reset it.
    Reset,
}

impl Gone {
    /// Ends what was taken for the call, or leaves it for the next one.
    fn settles(self, open: &Arc<Open>) {
        match self {
            Self::Cut => open.leave(0, None),
            Self::Reset => open.close(0),
        }
    }
}

/// A call's hold on its takeover.
struct Hold<'a, F: Fn() -> bool> {
    taking: &'a Arc<Taking>,
    was_cut: F,
}

impl<F: Fn() -> bool> Drop for Hold<'_, F> {
    fn drop(&mut self) {
        let gone = match (self.was_cut)() {
            true => Gone::Cut,
            false => Gone::Reset,
        };
        let (unread, nothing_yet) = {
            let mut state = self.taking.lock();
            state.left = Some(gone);
            (state.ended.take(), state.is_unwanted())
        };
        if nothing_yet {
            self.taking.is_over();
        }
        if let Some(Ok(open)) = unread {
            gone.settles(&open);
        }
    }
}

impl Taking {
    /// Takes a generation over from the workers that have it. `was_cut` says of a call that
    /// is dropped whether its client may come back.
    pub(super) async fn take(
        core: &Arc<Core>,
        asked: &ResumeAsked,
        was_cut: impl Fn() -> bool,
    ) -> Result<Arc<Open>, RequestError> {
        let workers = core.table.all();
        let session = |worker: &Arc<WorkerEntry>| Some((worker.index, worker.session()?));
        let sessions: BTreeMap<_, _> = workers.iter().filter_map(session).collect();
        let (machine, actions) = Takeover::start(asked.next_index, sessions.keys().copied());
        let closed: FuturesUnordered<BoxFuture<'static, WorkerIndex>> = sessions
            .iter()
            .map(|(&worker, session)| {
                let session = Arc::clone(session);
                Box::pin(async move {
                    session.ended().await;
                    worker
                }) as BoxFuture<'static, _>
            })
            .collect();
        let says = !asked.token_ids.is_empty();
        let taking = Arc::new(Self {
            core: Arc::clone(core),
            asked: asked.clone(),
            had: says.then(|| output_digest(&asked.token_ids)),
            state: Mutex::new(State {
                machine,
                sessions,
                claims: BTreeMap::new(),
                answered: BTreeSet::new(),
                asked: Instant::now(),
                until: Instant::now() + core.settings.streams.resume_timeout,
                ended: None,
                left: None,
            }),
            over: CancellationToken::new(),
        });
        if !core.resumes.add(&taking) {
            return Err(contested());
        }
        let hold = Hold {
            taking: &taking,
            was_cut,
        };
        let take = {
            let mut state = taking.lock();
            taking.perform(&mut state, actions)
        };
        taking.go_on_with(take);
        core.tasks.spawn(Arc::clone(&taking).drive(closed));
        taking.over.cancelled().await;
        let ended = taking.lock().ended.take();
        drop(hold);
        ended.unwrap_or(Err(RequestError::UnknownGeneration))
    }

    /// Waits for answers until it is over.
    async fn drive(self: Arc<Self>, mut closed: FuturesUnordered<BoxFuture<'static, WorkerIndex>>) {
        loop {
            let until = self.lock().until;
            let event = tokio::select! {
                () = self.over.cancelled() => break,
                () = self.core.stop.cancelled() => {
                    let stopped = RequestError::ShuttingDown { next_index: self.asked.next_index };
                    let mut state = self.lock();
                    if state.ended.is_none() {
                        state.ended = Some(Err(stopped));
                    }
                    break;
                }
                Some(worker) = closed.next() => Event::SessionLost(worker),
                () = tokio::time::sleep_until(until.into()) => Event::Fired,
            };
            // An answer may have moved the wait meanwhile.
            if event == Event::Fired && self.lock().until > Instant::now() {
                continue;
            }
            self.guarded(|| self.happens(event));
        }
        self.is_over();
    }

    /// Whoever waits for it goes on, and the next one may come.
    fn is_over(&self) {
        self.core.resumes.remove(&self.asked.id, self);
        self.over.cancel();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The machine is as it was before an event, or after it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker answered. Where it goes on with the generation, that and its attempt: the
    /// session holds them before it reads on.
    pub(in crate::mesh) fn found(
        &self,
        from: WorkerIndex,
        found: Found,
    ) -> Option<(Arc<Open>, Fence)> {
        self.guarded(|| {
            let fit = self.fit(&found);
            self.happens(Event::Found { from, found, fit })
        })
    }

    /// A panic is a bug of ours: it ends the call, and what workers gave is left for
    /// another one.
    fn guarded(
        &self,
        run: impl FnOnce() -> Option<(Arc<Open>, Fence)>,
    ) -> Option<(Arc<Open>, Fence)> {
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
            self.panicked(&*panic);
            None
        })
    }

    fn panicked(&self, panic: &(dyn Any + Send)) {
        let (generation, what) = (self.asked.id, text_of(panic));
        let request_id = &self.asked.request_id;
        tracing::error!(event = "panic", %generation, request_id, what, "a takeover panicked");
        self.core.counters.task_panics.add(1);
        {
            let mut state = self.lock();
            if state.ended.is_none() {
                state.ended = Some(Err(self.internal()));
            }
            for action in state.machine.give_up() {
                if let Action::Leave { to, fence } = action
                    && let Some(session) = state.sessions.get(&to)
                {
                    self.core.leave_running(session, self.asked.id, fence);
                }
            }
        }
        self.is_over();
    }

    fn internal(&self) -> RequestError {
        RequestError::Internal {
            id: self.asked.request_id.clone(),
            next_index: self.asked.next_index,
        }
    }

    fn happens(&self, event: Event) -> Option<(Arc<Open>, Fence)> {
        let take = {
            let mut state = self.lock();
            if state.is_unwanted() {
                return None;
            }
            state.note(&event);
            let actions = state.machine.apply(event);
            self.perform(&mut state, actions)
        };
        self.go_on_with(take)
    }

    fn perform(&self, state: &mut State, actions: Actions) -> Option<Box<Take>> {
        let mut taken = None;
        let mut queue: VecDeque<Actions> = [actions].into();
        while let Some(actions) = queue.pop_front() {
            for action in actions {
                match action {
                    Action::Find { to } => {
                        // Before its answer can be there.
                        if let Some(worker) = self.core.table.get(to) {
                            worker.asked(Instant::now());
                        }
                        let command = Command::Find {
                            generation: self.asked.id,
                            tenant: tenant_name(self.asked.tenant),
                            next_index: self.asked.next_index,
                        };
                        if send(state, to, command).is_none() {
                            queue.push_back(state.machine.apply(Event::SessionLost(to)));
                        }
                    }
                    Action::Claim { to, owner } => {
                        let command = Command::Claim {
                            generation: self.asked.id,
                            owner,
                            tenant: tenant_name(self.asked.tenant),
                            next_index: self.asked.next_index,
                        };
                        match send(state, to, command) {
                            Some(number) => {
                                state.claims.insert(to, number);
                            }
                            None => queue.push_back(state.machine.apply(Event::SessionLost(to))),
                        }
                    }
                    Action::Cancel { to, fence } => {
                        if let Some(session) = state.sessions.get(&to) {
                            session.cancel(self.asked.id, fence);
                        }
                    }
                    Action::Leave { to, fence } => {
                        if let Some(session) = state.sessions.get(&to) {
                            self.core.leave_running(session, self.asked.id, fence);
                        }
                    }
                    Action::Arm => {
                        state.until = Instant::now() + self.core.settings.streams.resume_timeout;
                    }
                    Action::Disarm => {}
                    Action::Take(take) => taken = Some(take),
                    Action::End(why) => {
                        let error = match why {
                            Refused::Unknown if self.core.may_be_elsewhere(state) => not_yet(),
                            Refused::Unknown => RequestError::UnknownGeneration,
                            Refused::NotYet => not_yet(),
                            Refused::Contested => contested(),
                        };
                        state.ended = Some(Err(error));
                        self.is_over();
                    }
                }
            }
        }
        taken
    }

    /// Opens what was taken. Without the lock: it may ask for a plan.
    fn go_on_with(&self, take: Option<Box<Take>>) -> Option<(Arc<Open>, Fence)> {
        let take = take?;
        let party = take.runs.and_then(|(worker, _)| {
            let state = self.lock();
            let session = Arc::clone(state.sessions.get(&worker)?);
            let number = state.claims.get(&worker).copied().unwrap_or(0);
            Some((Party { worker, session }, number))
        });
        let opened = self.open_guarded(&take, party.clone());
        if opened.is_err()
            && let Some((party, _)) = &party
        {
            // What it needed a moment ago is gone: another router may have it.
            let session = &party.session;
            self.core.leave_running(session, self.asked.id, take.fence);
        }
        let open = opened.as_ref().ok().map(Arc::clone);
        let left = {
            let mut state = self.lock();
            if state.left.is_none() {
                state.ended = Some(opened);
            }
            state.left
        };
        self.is_over();
        let open = open?;
        if let Some(gone) = left {
            gone.settles(&open);
        }
        let counters = &self.core.counters.resumed;
        match take.runs {
            Some(_) => counters.running.add(1),
            None => counters.anew.add(1),
        }
        tracing::info!(
            generation = %self.asked.id,
            owner = take.fence.owner,
            attempt = take.fence.attempt,
            runs = take.runs.is_some(),
            next_index = self.asked.next_index,
            "resumed"
        );
        take.runs.map(|_| (open, take.fence))
    }

    /// As [`Self::open`]. A panic there costs this call, no more: what runs is left.
    fn open_guarded(
        &self,
        take: &Take,
        party: Option<(Party, u64)>,
    ) -> Result<Arc<Open>, RequestError> {
        let open = catch_unwind(AssertUnwindSafe(|| self.open(take, party)));
        open.unwrap_or_else(|panic| {
            self.panicked(&*panic);
            Err(self.internal())
        })
    }

    fn open(&self, take: &Take, party: Option<(Party, u64)>) -> Result<Arc<Open>, RequestError> {
        #[cfg(test)]
        assert!(self.asked.request_id != PANICS_IN_ITS_TAKEOVER, "planted");
        let (request, urgency_ms) = request(&take.left, &self.asked)?;
        let model = self.core.models.get(&request.model);
        let model = model.ok_or(RequestError::UnknownGeneration)?;
        let chain = dispatch::chain_of(&request, &model.record);
        Ok(Open::claimed(
            Arc::clone(&self.core),
            Claimed {
                id: self.asked.id,
                take,
                request,
                chain,
                urgency_ms,
                next_index: self.asked.next_index,
                party,
            },
        ))
    }
}

fn send(state: &State, to: WorkerIndex, command: Command) -> Option<u64> {
    let session = state.sessions.get(&to)?;
    session.send(Outgoing {
        command,
        open: None,
    })
}

impl Core {
    /// Whether somebody may have a generation that nobody who was asked has.
    fn may_be_elsewhere(&self, asked: &State) -> bool {
        let now = Instant::now();
        let asked_at = asked.asked + UNDER_WAY.min(self.settings.streams.resume_timeout / 4);
        let may = |worker: &Arc<WorkerEntry>| {
            !asked.answered.contains(&worker.index) && worker.may_answer(asked_at, now, AWAY)
        };
        let unlisted = self.table.is_unlisted(now, self.settings.orphan_timeout);
        unlisted || self.table.all().iter().any(may)
    }

    /// Lets an attempt that was claimed in vain go on where it runs: who comes for it finds
    /// it there, and takes it away from here under a higher owner number.
    pub(in crate::mesh) fn leave_running(
        self: &Arc<Self>,
        session: &Arc<SessionHandle>,
        id: GenerationId,
        fence: Fence,
    ) {
        let (session, stop) = (Arc::clone(session), self.stop.clone());
        let over = Instant::now() + self.settings.orphan_timeout;
        self.tasks.spawn(async move {
            tokio::select! {
                // Its worker keeps it for as long by itself.
                () = stop.cancelled() => {}
                () = session.ended() => {}
                () = tokio::time::sleep_until(over.into()) => session.cancel(id, fence),
            }
        });
    }
}

/// It is there, or may be, and cannot be had at this moment.
pub(super) fn not_yet() -> RequestError {
    RequestError::NotYet {
        why: "not every worker has said yet whether it has this generation",
    }
}

fn contested() -> RequestError {
    RequestError::NotYet {
        why: "another call resumes this generation at the same time",
    }
}
