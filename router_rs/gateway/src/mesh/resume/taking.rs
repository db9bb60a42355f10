//! A generation on its way here from another router, driven by the call that resumes it and
//! by the sessions that answer.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use kvmesh_session::{
    Command, Fence, Takeover, WorkerIndex,
    parse::Found,
    takeover::{Action, Actions, Event, Refused, Take},
};
use tokio::sync::Notify;

use super::{
    super::{
        Core,
        continuation::tenant_name,
        dispatch,
        open::{Claimed, Open, Party},
        session::{Outgoing, SessionHandle},
    },
    ResumeAsked,
    asked::request,
};
use crate::error::RequestError;

/// Longest wait for what workers answer to Find, and again to Claim.
const ANSWER: Duration = Duration::from_secs(1);

/// A takeover under way.
pub(in crate::mesh) struct Taking {
    core: Arc<Core>,
    pub(super) asked: ResumeAsked,
    state: Mutex<State>,
    /// It is over.
    over: Notify,
}

struct State {
    machine: Takeover,
    sessions: BTreeMap<WorkerIndex, Arc<SessionHandle>>,
    /// Number of the claim to each worker: what is booked for it counts from there on.
    claims: BTreeMap<WorkerIndex, u64>,
    /// Until when answers are waited for.
    until: Instant,
    ended: Option<Result<Arc<Open>, RequestError>>,
    /// Nobody waits for it any more.
    left: bool,
}

/// A call's hold on its takeover.
struct Hold(Arc<Taking>);

impl Drop for Hold {
    fn drop(&mut self) {
        let taking = &self.0;
        taking.core.resumes.remove(&taking.asked.id);
        let unread = {
            let mut state = taking.lock();
            state.left = true;
            state.ended.take()
        };
        if let Some(Ok(open)) = unread {
            open.close(0);
        }
    }
}

impl Taking {
    /// Takes a generation over from the workers that have it.
    pub(super) async fn take(
        core: &Arc<Core>,
        asked: &ResumeAsked,
    ) -> Result<Arc<Open>, RequestError> {
        let workers = core.table.all();
        let session = |worker: &Arc<super::super::table::WorkerEntry>| {
            Some((worker.index, worker.session()?))
        };
        let sessions: BTreeMap<_, _> = workers.iter().filter_map(session).collect();
        let (machine, actions) = Takeover::start(asked.next_index, sessions.keys().copied());
        let mut closed: FuturesUnordered<BoxFuture<'static, WorkerIndex>> = sessions
            .iter()
            .map(|(&worker, session)| {
                let session = Arc::clone(session);
                Box::pin(async move {
                    session.ended().await;
                    worker
                }) as BoxFuture<'static, _>
            })
            .collect();
        let taking = Arc::new(Self {
            core: Arc::clone(core),
            asked: asked.clone(),
            state: Mutex::new(State {
                machine,
                sessions,
                claims: BTreeMap::new(),
                until: Instant::now() + ANSWER,
                ended: None,
                left: false,
            }),
            over: Notify::new(),
        });
        if !core.resumes.add(&taking) {
            return Err(contested());
        }
        let _hold = Hold(Arc::clone(&taking));
        let take = {
            let mut state = taking.lock();
            taking.perform(&mut state, actions)
        };
        taking.go_on_with(take);
        loop {
            let until = {
                let mut state = taking.lock();
                if let Some(ended) = state.ended.take() {
                    return ended;
                }
                state.until
            };
            let event = tokio::select! {
                () = taking.over.notified() => continue,
                Some(worker) = closed.next() => Event::SessionLost(worker),
                () = tokio::time::sleep_until(until.into()) => Event::Fired,
            };
            // An answer may have moved the wait meanwhile.
            if event == Event::Fired && taking.lock().until > Instant::now() {
                continue;
            }
            taking.apply(event);
        }
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
        self.apply(Event::Found { from, found })
    }

    fn apply(&self, event: Event) -> Option<(Arc<Open>, Fence)> {
        let take = {
            let mut state = self.lock();
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
                        let command = Command::Find {
                            generation: self.asked.id,
                            tenant: tenant_name(self.asked.tenant),
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
                    Action::Arm => state.until = Instant::now() + ANSWER,
                    Action::Disarm => {}
                    Action::Take(take) => taken = Some(take),
                    Action::End(why) => {
                        let error = match why {
                            Refused::Unknown => RequestError::UnknownGeneration,
                            Refused::Contested => contested(),
                        };
                        state.ended = Some(Err(error));
                        self.over.notify_one();
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
        let opened = self.open(&take, party.clone());
        if opened.is_err()
            && let Some((party, _)) = &party
        {
            party.session.cancel(self.asked.id, take.fence);
        }
        let open = opened.as_ref().ok().map(Arc::clone);
        let left = {
            let mut state = self.lock();
            if !state.left {
                state.ended = Some(opened);
            }
            state.left
        };
        self.over.notify_one();
        let open = open?;
        if left {
            open.close(0);
            return None;
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

    fn open(&self, take: &Take, party: Option<(Party, u64)>) -> Result<Arc<Open>, RequestError> {
        if !self.asked.fits(&take.left.output_ids) {
            return Err(RequestError::UnknownGeneration);
        }
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

fn contested() -> RequestError {
    RequestError::NoWorker("another call resumes this generation at the same time".to_owned())
}
