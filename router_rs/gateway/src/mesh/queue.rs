//! Requests that wait in this router, in the order of their virtual deadlines.
//!
//! A request leaves when its worker is predicted to start it soon, so that the
//! order is kept here, where it can still change, and not in an engine's queue.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use kvmesh_kv_index::Matches;
use kvmesh_scheduler::{
    AdmissionSettings, Class, Lane, NoPlan, PerClass, Queue, QueueSettings, Rejected, RequestView,
    Ticket, virtual_deadline_ms,
};
use kvmesh_session::generation::{Cause, Event, PlanRequest, Stop};

use super::{
    Core,
    dispatch::{Held, Tried, class_of, request_view},
    figures::ms,
    open::Open,
    placer::Turned,
};
use crate::{error::RequestError, request::AdmittedRequest};

/// Shortest and longest time after which a client is told to try again.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));

/// Requests that are tried in one go when room may be there: a bound on what a
/// load frame costs. Those behind them are tried with the next one.
const TRIED_AT_ONCE: usize = 64;

/// By how much a request that goes before another is before it, ms.
const BEFORE_MS: f64 = 1e-3;

/// A request that waits.
pub(super) struct Waiting {
    pub(super) open: Arc<Open>,
    pub(super) request: PlanRequest,
    /// When it came into the queue, for the bound on waiting.
    since: Instant,
    /// Listed where it would go now: those that come after it see it there. Let
    /// go of before it is tried again.
    held: Held,
    /// A failure or a worker's want of room took it from where it ran: it goes
    /// before new work of its class.
    goes_on: bool,
}

/// The queue.
pub(super) struct Waits {
    /// Zero of the queue's clock.
    started: Instant,
    queue: Mutex<Queue<Waiting>>,
    /// Those that hold a place at a worker.
    holding: Mutex<Vec<Ticket>>,
    length: AtomicUsize,
    /// Of them, those that were placed before.
    continuing: AtomicUsize,
}

/// What these locks guard is whole after each operation on it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Waits {
    pub(super) fn new(settings: QueueSettings) -> Self {
        Self {
            started: Instant::now(),
            queue: Mutex::new(Queue::with_settings(settings)),
            holding: Mutex::default(),
            length: AtomicUsize::new(0),
            continuing: AtomicUsize::new(0),
        }
    }

    /// Requests that wait.
    pub(super) fn len(&self) -> usize {
        self.length.load(Ordering::Relaxed)
    }

    /// A request's virtual deadline on the queue's clock, ms.
    pub(super) fn deadline_ms(&self, open: &Open) -> f64 {
        ms(open.request.arrived.saturating_duration_since(self.started)) + open.urgency_ms
    }

    /// The queue's clock, ms.
    pub(super) fn now_ms(&self) -> f64 {
        ms(self.started.elapsed())
    }

    /// Lets a request wait. One that was returned waits with its first arrival.
    pub(super) fn push(&self, open: &Arc<Open>, request: PlanRequest, held: Held) {
        let (deadline, work) = (self.deadline_ms(open), open.work_ms);
        let lane = Lane {
            class: class_of(open.request.class),
            tenant: open.request.tenant,
        };
        let taken = matches!(
            request.cause,
            Cause::Lost(_) | Cause::Failed | Cause::Returned
        );
        let entry = Waiting {
            goes_on: taken || request.failures > 0 || open.next_index() > 0,
            open: Arc::clone(open),
            request,
            since: Instant::now(),
            held,
        };
        let holds = entry.held.is_some();
        if entry.goes_on {
            self.continuing.fetch_add(1, Ordering::Relaxed);
        }
        let mut queue = lock(&self.queue);
        // It has no bound of its own.
        let pushed = queue.push_for(lane, deadline, work, entry);
        self.length.store(queue.len(), Ordering::Relaxed);
        drop(queue);
        if let (Ok(ticket), true) = (pushed, holds) {
            lock(&self.holding).push(ticket);
        }
    }

    /// The next ones to be tried, each with the virtual deadline that it goes
    /// as. Turns of tenants may let a request go before others with earlier
    /// keys: for as long as they all wait here, it is before them, and of equal
    /// ones the first is. What held a place and is not among them gives it up.
    fn next(&self) -> Vec<(Ticket, f64)> {
        let tickets = {
            let queue = lock(&self.queue);
            let order = queue.order(TRIED_AT_ONCE);
            match self.continuing.load(Ordering::Relaxed) {
                0 => order,
                _ => continuations_first(&queue, order),
            }
        };
        let mut next_ms = f64::INFINITY;
        let mut next: Vec<(Ticket, f64)> = Vec::with_capacity(tickets.len());
        for ticket in tickets.into_iter().rev() {
            next_ms = ticket.virtual_deadline_ms().min(next_ms - BEFORE_MS);
            next.push((ticket, next_ms));
        }
        next.reverse();
        let now_held = next.iter().map(|(ticket, _)| *ticket).collect();
        let before = std::mem::replace(&mut *lock(&self.holding), now_held);
        for ticket in before {
            if !next.iter().any(|(other, _)| *other == ticket)
                && let Some(mut entry) = self.take(ticket)
            {
                entry.held = None;
                self.put_back(ticket, entry);
            }
        }
        next
    }

    /// Takes a request to try it; whoever takes it owns it until it is given
    /// back or leaves.
    fn take(&self, ticket: Ticket) -> Option<Waiting> {
        lock(&self.queue).take(ticket)
    }

    fn put_back(&self, ticket: Ticket, entry: Waiting) {
        lock(&self.queue).put_back(ticket, entry);
    }

    /// A request leaves. With `served` its tenant pays for it.
    fn leaves(&self, ticket: Ticket, served: bool) -> Option<Waiting> {
        let mut queue = lock(&self.queue);
        let entry = if served {
            queue.serve(ticket)
        } else {
            queue.remove(ticket)
        };
        self.length.store(queue.len(), Ordering::Relaxed);
        if entry.as_ref().is_some_and(|entry| entry.goes_on) {
            self.continuing.fetch_sub(1, Ordering::Relaxed);
        }
        entry
    }

    /// Whether a request of the same model waits that goes before this one.
    pub(super) fn behind(&self, open: &Open) -> bool {
        if self.len() == 0 {
            return false;
        }
        let deadline = self.deadline_ms(open);
        let queue = lock(&self.queue);
        let class = class_of(open.request.class);
        if self.continuing.load(Ordering::Relaxed) > 0
            && queue.iter().any(|(_, entry)| {
                let other = &entry.open.request;
                entry.goes_on && class_of(other.class) == class && other.model == open.request.model
            })
        {
            return true;
        }
        let mut first = queue.iter().map(|(_, entry)| &entry.open);
        first
            .find(|other| other.request.model == open.request.model)
            .is_some_and(|other| self.deadline_ms(other) <= deadline)
    }

    /// Predicted work of a model's requests that wait, by class, ms.
    pub(super) fn queued_ms(&self, model: &str) -> PerClass<f64> {
        let mut queued = PerClass::default();
        let queue = lock(&self.queue);
        for (_, entry) in queue.iter() {
            let open = &entry.open;
            if open.request.model == model {
                queued[class_of(open.request.class).index()] += open.work_ms;
            }
        }
        queued
    }

    /// Predicted work, in ms, of the model's requests that wait: of those that
    /// would go before one with this deadline and are booked nowhere, and of
    /// all that are as urgent by class.
    fn ahead_ms(&self, model: &str, class: Class, deadline_ms: f64) -> (f64, f64) {
        let (mut before, mut as_urgent) = (0.0, 0.0);
        if self.len() == 0 {
            return (before, as_urgent);
        }
        let queue = lock(&self.queue);
        for (_, entry) in queue.iter() {
            let open = &entry.open;
            if open.request.model != model {
                continue;
            }
            if entry.held.is_none() && self.deadline_ms(open) <= deadline_ms {
                before += open.work_ms;
            }
            if class_of(open.request.class) <= class {
                as_urgent += open.work_ms;
            }
        }
        (before, as_urgent)
    }
}

/// The order of service with what goes on before new work of its class: its
/// client waits in the middle of an answer (DESIGN 5). Between classes all stays
/// as it is.
fn continuations_first(queue: &Queue<Waiting>, order: Vec<Ticket>) -> Vec<Ticket> {
    let class = |entry: &Waiting| class_of(entry.open.request.class);
    let mut first: Vec<(Ticket, Class)> = queue
        .iter()
        .filter(|(_, entry)| entry.goes_on)
        .map(|(ticket, entry)| (ticket, class(entry)))
        .collect();
    let mut all = Vec::with_capacity(order.len() + first.len());
    for ticket in order {
        let Some(entry) = queue.get(ticket) else {
            continue;
        };
        let of = class(entry);
        all.extend(first.iter().filter(|(_, class)| *class == of).map(|e| e.0));
        first.retain(|(_, class)| *class != of);
        if !entry.goes_on {
            all.push(ticket);
        }
    }
    all.extend(first.into_iter().map(|(ticket, _)| ticket));
    all
}

/// What admission found out about a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Admitted {
    /// From arrival to virtual deadline, ms.
    pub(super) urgency_ms: f64,
    /// Predicted work of its prompt, ms.
    pub(super) work_ms: f64,
}

impl Core {
    /// Whether a request may be opened: what no worker will ever run, what
    /// would wait for too long, what would miss its deadline, is refused here.
    pub(super) fn admit(
        &self,
        request: &AdmittedRequest,
        chain: &[u64],
    ) -> Result<Admitted, RequestError> {
        self.check_quarantine(request)?;
        let now = Instant::now();
        let left_ms = match request.deadline {
            None => None,
            Some(deadline) if deadline <= now => {
                return Err(RequestError::DeadlineExceeded { next_index: 0 });
            }
            Some(deadline) => Some(ms(deadline - now)),
        };
        let mut cached = Matches::default();
        self.dispatcher.index.lookup_into(chain, &mut cached);
        let had = u32::try_from(request.output_ids.len()).unwrap_or(u32::MAX);
        let expected = self.dispatcher.expected_output(request, had);
        let waits = &self.dispatcher.waits;
        let view = RequestView {
            virtual_deadline_ms: f64::INFINITY,
            ..request_view(request, 0, had, expected, &cached, &[])
        };
        let arrival = ms(request.arrived.saturating_duration_since(waits.started));
        let targets = &self.settings.policy.cost.targets;
        let class = class_of(request.class);
        let deadline_of = |work| virtual_deadline_ms(targets, class, arrival, work);
        let bound = AdmissionSettings {
            max_wait_ms: ms(self.settings.queue_timeout),
        };
        let ahead = |work| {
            let deadline = deadline_of(work);
            let (before, as_urgent) = waits.ahead_ms(&request.model, class, deadline);
            (deadline, before, as_urgent)
        };
        let admitted =
            self.dispatcher
                .placer()
                .admit(&view, &bound, waits.now_ms(), left_ms, ahead);
        let admission = admitted.map_err(|why| turned(request, why))?;
        if waits.len() >= self.settings.queue_length {
            return Err(RequestError::Overloaded {
                reason: "the queue is full",
                retry_after: retry_after(admission.wait_ms),
            });
        }
        let admitted = Admitted {
            urgency_ms: deadline_of(admission.work_ms) - arrival,
            work_ms: admission.work_ms,
        };
        self.pools.admitted(request, &admitted, expected);
        Ok(admitted)
    }

    /// Room may be there: tries what waits, most urgent first.
    ///
    /// Those behind a request that finds no place are tried too: its place may
    /// be elsewhere, or larger. Once its virtual deadline has passed nobody of
    /// its model passes it any more, so that a large one is not starved.
    pub(super) fn serve_queue(self: &Arc<Self>) {
        let waits = &self.dispatcher.waits;
        if waits.len() == 0 {
            return;
        }
        let mut blocked: Vec<String> = Vec::new();
        for (ticket, key_ms) in waits.next() {
            let Some(mut entry) = waits.take(ticket) else {
                continue;
            };
            if entry.open.ended() {
                waits.leaves(ticket, false);
                continue;
            }
            let model = &entry.open.request.model;
            if blocked.contains(model) {
                waits.put_back(ticket, entry);
                continue;
            }
            entry.held = None;
            let late = waits.deadline_ms(&entry.open) <= waits.now_ms();
            match self.try_plan(&entry.open, &entry.request, Some(key_ms)) {
                Tried::Done => {
                    waits.leaves(ticket, true);
                    continue;
                }
                Tried::NoRoom if late => blocked.push(model.clone()),
                Tried::NoRoom => {}
                Tried::NotYet(held) => entry.held = held,
            }
            waits.put_back(ticket, entry);
        }
    }

    /// Ends what waited for too long, and forgets what ended while it waited.
    pub(super) fn expire_queued(&self, now: Instant) {
        let waits = &self.dispatcher.waits;
        let bound = self.settings.queue_timeout;
        let waiting: Vec<_> = {
            let queue = lock(&waits.queue);
            let all = queue.iter();
            all.map(|(ticket, entry)| (ticket, entry.since, Arc::clone(&entry.open)))
                .collect()
        };
        for (ticket, since, open) in waiting {
            // What goes on waits until its client's deadline, where it has one.
            let patient = open.continues() && open.request.deadline.is_some();
            let old = !patient && now.saturating_duration_since(since) > bound;
            if (old || open.ended()) && waits.leaves(ticket, false).is_some() {
                open.apply(Event::Stop(Stop::Overloaded));
            }
        }
    }
}

fn retry_after(wait_ms: f64) -> Duration {
    Duration::try_from_secs_f64(wait_ms / 1e3)
        .unwrap_or(RETRY_AFTER.1)
        .clamp(RETRY_AFTER.0, RETRY_AFTER.1)
}

fn turned(request: &AdmittedRequest, why: Turned) -> RequestError {
    match why {
        Turned::Waits(Rejected::WaitTooLong { retry_after_ms, .. }) => RequestError::Overloaded {
            reason: "the predicted wait is too long",
            retry_after: retry_after(retry_after_ms),
        },
        Turned::Waits(Rejected::DeadlineCannotBeMet { ttft_ms, left_ms }) => {
            RequestError::Overloaded {
                reason: "the deadline cannot be met",
                retry_after: retry_after(ttft_ms - left_ms),
            }
        }
        Turned::Never(NoPlan::TooLong { tokens, limit }) => {
            RequestError::PromptTooLong { tokens, limit }
        }
        Turned::Never(NoPlan::Unsupported(feature)) => {
            RequestError::Unsupported(feature.to_string())
        }
        Turned::Never(NoPlan::UnknownAdapter) => {
            RequestError::invalid("adapter", "no worker has this adapter")
        }
        Turned::Never(other) => RequestError::NoWorker(format!("{}: {other}", request.model)),
    }
}
