//! Requests that wait in this router: what drives the scheduler's [`Dispatch`].
//!
//! A request leaves when its worker is predicted to start it soon, so that the
//! order is kept here, where it can still change, and not in an engine's queue.
//! Lock order: the placer's lock may be held while this one is taken, never the
//! other way round; a request is tried with neither.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use kvmesh_kv_index::Matches;
use kvmesh_scheduler::{
    Admitted, Cluster, Dispatch, DispatchSettings, Entry, Lane, Look, Next, Outcome, Pass,
    PerClass, Place, Rejected, Reported, RequestView,
};
use kvmesh_session::{
    GenerationId,
    generation::{Cause, Event, PlanRequest, Stop},
    parse::Refusal,
};
use kvmesh_wire::v1;

use super::{
    Core,
    dispatch::{Tried, class_of, request_view},
    figures::ms,
    open::Open,
};
use crate::request::AdmittedRequest;

/// Why a request stays that is listed at a worker.
const NOT_SOON: &str = "its worker would not start it soon";

/// Requests that a task tries before it goes back to what it is there for.
const TRIED_IN_A_ROW: usize = 128;

/// A request that waits.
pub(super) struct Waiting {
    pub(super) open: Arc<Open>,
    pub(super) request: PlanRequest,
    /// When it asked for a worker.
    since: Instant,
    /// How often it was tried and stayed, and why the last time.
    stayed: (u32, &'static str),
}

impl Waiting {
    fn new(open: &Arc<Open>, request: &PlanRequest) -> Self {
        let mut request = request.clone();
        request.wait_for_room = false;
        Self {
            open: Arc::clone(open),
            request,
            since: open.asks_since(),
            stayed: (0, ""),
        }
    }

    /// Its wait until then, for people.
    pub(super) fn told(&self, now: Instant) -> v1::RouterWait {
        let (tries, reason) = self.stayed;
        v1::RouterWait {
            ms: ms(now.saturating_duration_since(self.since)),
            tries,
            reason: reason.to_owned(),
        }
    }

    /// It was tried and stays.
    fn stays(mut self, why: &'static str) -> Self {
        self.stayed = (self.stayed.0.saturating_add(1), why);
        self.later()
    }

    /// It is tried again later. Whoever refused may have room when the next
    /// load comes; what an engine cannot do it cannot do then either.
    fn later(mut self) -> Self {
        let excluded = &mut self.request.excluded;
        excluded.retain(|(_, why)| *why == Refusal::Unsupported);
        self
    }
}

/// Those that wait, and their clock.
pub(super) struct Waits {
    /// Zero of the clock of virtual deadlines.
    started: Instant,
    /// The rules by which what waits leaves.
    pub(super) rules: DispatchSettings,
    line: Mutex<State>,
    length: AtomicUsize,
}

struct State {
    dispatch: Dispatch<Waiting>,
    /// Models for which a look is planned, with the latest time that it was asked
    /// for, ms.
    looks: BTreeMap<Arc<str>, f64>,
}

/// What these locks guard is whole after each operation on it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Waits {
    pub(super) fn new(rules: DispatchSettings) -> Self {
        Self {
            started: Instant::now(),
            rules,
            line: Mutex::new(State {
                dispatch: Dispatch::new(rules),
                looks: BTreeMap::new(),
            }),
            length: AtomicUsize::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.line)
    }

    /// Does something with those that wait.
    fn with<R>(&self, work: impl FnOnce(&mut Dispatch<Waiting>) -> R) -> R {
        let mut state = self.lock();
        let result = work(&mut state.dispatch);
        let length = state.dispatch.len();
        self.length.store(length, Ordering::Relaxed);
        result
    }

    /// Requests that wait.
    pub(super) fn len(&self) -> usize {
        self.length.load(Ordering::Relaxed)
    }

    /// Requests of the same model that wait and are as urgent by class: those that are less
    /// urgent take nobody's place.
    pub(super) fn as_urgent(&self, request: &AdmittedRequest) -> usize {
        let class = class_of(request.class);
        self.lock().dispatch.as_urgent(&request.model, class)
    }

    /// How a generation waits here now, and what admission predicted of that, ms.
    pub(super) fn explain(&self, id: GenerationId) -> Option<(v1::RouterWait, f64)> {
        let state = self.lock();
        let mut waiting = state.dispatch.waiting();
        let (_, _, one) = waiting.find(|(_, _, one)| one.open.id == id)?;
        Some((one.told(Instant::now()), one.open.wait_ms))
    }

    /// A request's virtual deadline on the queue's clock, ms.
    pub(super) fn deadline_ms(&self, open: &Open) -> f64 {
        self.arrival_ms(&open.request) + open.urgency_ms
    }

    pub(super) fn arrival_ms(&self, request: &AdmittedRequest) -> f64 {
        ms(request.arrived.saturating_duration_since(self.started))
    }

    /// The queue's clock, ms.
    pub(super) fn now_ms(&self) -> f64 {
        ms(self.started.elapsed())
    }

    /// One that was returned waits with its first arrival. What a failure or a
    /// worker's want of room took from where it ran goes before new work of its
    /// class.
    fn entry(&self, open: &Open, request: &PlanRequest) -> Entry {
        let taken = matches!(
            request.cause,
            Cause::Lost(_) | Cause::Failed | Cause::Returned | Cause::Claimed
        );
        Entry {
            model: open.request.model.as_str().into(),
            lane: Lane {
                class: class_of(open.request.class),
                // Half of it: who shares a turn loses no more than that.
                tenant: open.request.tenant as u64,
            },
            key_ms: self.deadline_ms(open),
            work_ms: open.work_ms,
            goes_on: taken || request.failures > 0 || open.next_index() > 0,
        }
    }

    fn look(&self, report: &Reported) -> Look {
        if self.len() == 0 {
            return Look::No;
        }
        self.lock().dispatch.look(report, self.now_ms())
    }

    /// Requests for a model that wait.
    pub(super) fn of_model(&self, model: &str) -> usize {
        let line = self.lock();
        let waiting = line.dispatch.waiting();
        waiting
            .filter(|(_, _, waiting)| waiting.open.request.model == model)
            .count()
    }

    /// Whether a request that arrived then may wait ([`Dispatch::admit`]).
    pub(super) fn admit(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
        arrival_ms: f64,
        left_ms: Option<f64>,
    ) -> Result<Admitted, Rejected> {
        let mut line = self.lock();
        line.dispatch.admit(cluster, request, arrival_ms, left_ms)
    }

    /// The same for one that only wants to know.
    pub(super) fn would_admit(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
        arrival_ms: f64,
        left_ms: Option<f64>,
    ) -> Result<Admitted, Rejected> {
        let line = self.lock();
        let dispatch = &line.dispatch;
        dispatch.would_admit(cluster, request, arrival_ms, left_ms)
    }

    /// How long a request may wait that nobody has taken yet, ms
    /// ([`Dispatch::longest_wait_ms`]).
    pub(super) fn longest_wait_ms(&self, open: &Open) -> f64 {
        let request = &open.request;
        let class = class_of(request.class);
        let (line, now_ms) = (self.lock(), self.now_ms());
        let of = &line.dispatch;
        of.longest_wait_ms(&request.model, class, open.work_ms, now_ms)
    }

    /// Predicted work of a model's requests that wait and are seen at no worker,
    /// by class, ms.
    pub(super) fn queued_ms(&self, model: &str) -> PerClass<f64> {
        self.lock().dispatch.unlisted_by_class_ms(model)
    }

    fn next(&self, pass: &mut Pass) -> Option<Next<Waiting>> {
        let now_ms = self.now_ms();
        self.with(|dispatch| dispatch.next(pass, now_ms))
    }

    fn came_of(&self, pass: &mut Pass, place: &Place, outcome: Outcome<Waiting>) {
        let now_ms = self.now_ms();
        self.with(|dispatch| dispatch.came_of(pass, place, outcome, now_ms));
    }
}

/// A pass that is driven. One that is left half way, also by a panic, is given up:
/// nobody else could make one for its model.
struct Driven<'a> {
    waits: &'a Waits,
    pass: Pass,
    tried: Option<Place>,
}

impl Drop for Driven<'_> {
    fn drop(&mut self) {
        let (pass, tried) = (&mut self.pass, self.tried.as_ref());
        self.waits.with(|dispatch| dispatch.give_up(pass, tried));
    }
}

impl Core {
    /// Finds a plan for a generation, or lets it wait for room.
    pub(super) fn plan(self: &Arc<Self>, open: &Arc<Open>, request: &PlanRequest) {
        let waits = &self.dispatcher.waits;
        let (entry, now_ms) = (waits.entry(open, request), waits.now_ms());
        let mut waiting = Waiting::new(open, request);
        if request.wait_for_room {
            waiting = waiting.later();
            if self.waited_in_vain(open, now_ms) {
                return self.give_up(&waiting);
            }
        }
        let came = waits.with(|dispatch| {
            if request.wait_for_room {
                let waits = dispatch.waits(&entry, now_ms, waiting);
                return waits.map(|place| (Some(place), None));
            }
            let arrives = dispatch.arrives(&entry, now_ms, waiting);
            arrives.map(|pass| (pass.place(), Some(pass)))
        });
        if let Ok((Some(place), _)) = &came
            && !open.stands_at(place)
        {
            self.leaves(place);
        }
        match came {
            Ok((_, Some(pass))) => {
                if let Some(at_ms) = pass.again_ms() {
                    self.look_later(pass.model(), at_ms);
                }
                self.try_all(pass);
            }
            Ok((_, None)) => {}
            Err(waiting) => waiting.open.apply(Event::Stop(Stop::Overloaded)),
        }
    }

    /// A worker's report is in: whoever may go because of it is tried.
    pub(super) fn look(self: &Arc<Self>, report: &Reported) {
        match self.dispatcher.waits.look(report) {
            Look::Now => self.serve(&report.model),
            Look::At(at_ms) => self.look_later(&report.model, at_ms),
            Look::No => {}
        }
    }

    fn serve(self: &Arc<Self>, model: &Arc<str>) {
        let waits = &self.dispatcher.waits;
        let pass = waits.with(|dispatch| dispatch.pass(model, waits.now_ms()));
        self.try_all(pass);
    }

    /// Plans a look, for no report may come before then. One that is planned
    /// already is followed by another one at the later time.
    fn look_later(self: &Arc<Self>, model: &Arc<str>, at_ms: f64) {
        let waits = &self.dispatcher.waits;
        {
            let mut line = waits.lock();
            if let Some(asked_ms) = line.looks.get_mut(model) {
                *asked_ms = asked_ms.max(at_ms);
                return;
            }
            line.looks.insert(Arc::clone(model), at_ms);
        }
        let model = Arc::clone(model);
        self.spawn_kept("looks", move |core| core.planned(Arc::clone(&model), at_ms));
    }

    /// Looks at the time that was planned, and again at a later one that was
    /// asked for meanwhile.
    async fn planned(self: Arc<Self>, model: Arc<str>, mut at_ms: f64) {
        let waits = &self.dispatcher.waits;
        loop {
            let after = (at_ms - waits.now_ms()).max(0.0);
            let after = Duration::try_from_secs_f64(after / 1e3).unwrap_or_default();
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(after) => {}
            }
            let due = waits.lock().dispatch.due(&model, waits.now_ms());
            if due {
                self.serve(&model);
            }
            let mut line = waits.lock();
            match line.looks.get(&model) {
                Some(asked_ms) if *asked_ms > at_ms => at_ms = *asked_ms,
                _ => {
                    line.looks.remove(&model);
                    return;
                }
            }
        }
    }

    /// Tries the requests of a pass, one after the other. A pass that others keep
    /// feeding goes on in a task of its own: this one has frames to read.
    fn try_all(self: &Arc<Self>, pass: Pass) {
        let waits = &self.dispatcher.waits;
        let mut driven = Driven {
            waits,
            pass,
            tried: None,
        };
        for _ in 0..TRIED_IN_A_ROW {
            let Some(next) = waits.next(&mut driven.pass) else {
                return;
            };
            let Next {
                place,
                item: waiting,
                turn,
            } = next;
            driven.tried = Some(place.clone());
            let open = Arc::clone(&waiting.open);
            let tried = match waiting.open.ended() {
                true => Tried::Ended,
                false => self.try_plan(&waiting, turn),
            };
            let outcome = match tried {
                Tried::Done => Outcome::Went,
                Tried::Ended => Outcome::Ended,
                Tried::NoRoom => Outcome::NoRoom(waiting.stays("no worker has room")),
                Tried::NotYet(None) => Outcome::Waits(waiting.stays("nobody is ready"), None),
                Tried::NotYet(hold) => Outcome::Waits(waiting.stays(NOT_SOON), hold),
            };
            driven.tried = None;
            let stays = matches!(outcome, Outcome::NoRoom(_) | Outcome::Waits(..));
            waits.came_of(&mut driven.pass, &place, outcome);
            // Where it ended while it was tried, its end found it taken.
            if stays && open.ended() {
                self.leaves(&place);
            }
        }
        let model = Arc::clone(driven.pass.model());
        drop(driven);
        self.look_later(&model, waits.now_ms());
    }

    /// One that waits has ended: it is in nobody's way from now on, and nobody's wait is
    /// predicted by it.
    pub(super) fn leaves(&self, place: &Place) {
        self.dispatcher
            .waits
            .with(|dispatch| dispatch.remove(place));
    }

    /// Ends what waited for too long, and forgets what ended while it waited without a
    /// word of its machine.
    pub(super) fn expire_queued(&self) {
        let waits = &self.dispatcher.waits;
        if waits.len() == 0 {
            return;
        }
        let waiting: Vec<(Place, f64, Arc<Open>)> = {
            let line = waits.lock();
            let all = line.dispatch.waiting();
            all.map(|(place, since_ms, one)| (place, since_ms, Arc::clone(&one.open)))
                .collect()
        };
        for (place, since_ms, open) in waiting {
            let (ended, now_ms) = (open.ended(), waits.now_ms());
            if !(ended || self.waited_in_vain(&open, since_ms)) {
                continue;
            }
            // One that is being tried meanwhile stays for the next time.
            let gone = waits.with(|dispatch| match ended {
                true => dispatch.remove(&place),
                false => dispatch.turn_away(&place, now_ms),
            });
            if let Some(waiting) = gone {
                self.give_up(&waiting);
            }
        }
    }

    /// Whether one that waits here since then has waited for as long as it may.
    /// Until somebody takes it that counts from its arrival: each refusal makes
    /// it wait anew. What goes on waits until its client's deadline, where it
    /// has one.
    fn waited_in_vain(&self, open: &Open, since_ms: f64) -> bool {
        let waits = &self.dispatcher.waits;
        let (since_ms, longest_ms) = match (open.continues(), open.request.deadline) {
            (true, Some(_)) => return false,
            (true, None) => (since_ms, ms(self.settings.queue_timeout)),
            (false, _) => (waits.arrival_ms(&open.request), waits.longest_wait_ms(open)),
        };
        waits.now_ms() - since_ms > longest_ms
    }

    fn give_up(&self, waiting: &Waiting) {
        waiting.open.apply(match self.will_run(waiting) {
            true => Event::Stop(Stop::Overloaded),
            false => Event::NoPlan,
        });
    }

    /// Whether somebody could run a request once there is room.
    fn will_run(&self, waiting: &Waiting) -> bool {
        let found = Matches::default();
        let mut placer = self.dispatcher.placer();
        let lasting: Vec<_> = {
            let of = waiting.request.excluded.iter();
            let of = of.filter(|(_, why)| *why == Refusal::Unsupported);
            of.filter_map(|(worker, _)| placer.slot(*worker)).collect()
        };
        let request = &waiting.open.request;
        let view = request_view(request, 0, 0, request.max_tokens, &found, &[]);
        placer.may_run(&view, &lasting, self.dispatcher.waits.now_ms())
    }
}
