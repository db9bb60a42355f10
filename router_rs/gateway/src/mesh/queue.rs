//! Requests that wait in this router, in the order of their virtual deadlines.
//!
//! A request leaves when its worker is predicted to start it soon, so that the
//! order is kept here, where it can still change, and not in an engine's queue.

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
    AdmissionSettings, ClassTargets, NoPlan, Queue, Rejected, Ticket, virtual_deadline_ms,
};
use kvmesh_session::{
    WorkerIndex,
    generation::{Event, PlanRequest, Stop},
};

use super::{
    Core,
    dispatch::{Tried, class_of, request_view},
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

/// A request that waits.
pub(super) struct Waiting {
    pub(super) open: Arc<Open>,
    pub(super) request: PlanRequest,
    /// When it came into the queue, for the bound on waiting.
    since: Instant,
}

/// The queue, and the prompts that were sent and have not begun.
pub(super) struct Waits {
    /// Zero of the queue's clock.
    started: Instant,
    queue: Mutex<Queue<Waiting>>,
    length: AtomicUsize,
    unstarted: Arc<Mutex<Unstarted>>,
}

#[derive(Default)]
struct Unstarted {
    next: u64,
    /// Virtual deadlines, by worker and number.
    deadlines: BTreeMap<(WorkerIndex, u64), f64>,
}

/// A prompt that was sent and has not begun; dropped with its first token, or
/// with its attempt.
pub(super) struct Sent {
    unstarted: Arc<Mutex<Unstarted>>,
    key: (WorkerIndex, u64),
}

impl Drop for Sent {
    fn drop(&mut self) {
        lock(&self.unstarted).deadlines.remove(&self.key);
    }
}

// What these locks guard is whole after each operation on it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Waits {
    pub(super) fn new() -> Self {
        Self {
            started: Instant::now(),
            // Admission bounds what is new; what was admitted may come back.
            queue: Mutex::new(Queue::new(usize::MAX)),
            length: AtomicUsize::new(0),
            unstarted: Arc::default(),
        }
    }

    /// Requests that wait.
    pub(super) fn len(&self) -> usize {
        self.length.load(Ordering::Relaxed)
    }

    /// A request's virtual deadline on the queue's clock, ms.
    fn deadline_ms(&self, open: &Open) -> f64 {
        ms(open.request.arrived.saturating_duration_since(self.started)) + open.urgency_ms
    }

    /// The queue's clock, ms.
    pub(super) fn now_ms(&self) -> f64 {
        ms(self.started.elapsed())
    }

    /// Lets a request wait. One that was returned waits with its first arrival.
    pub(super) fn push(&self, open: &Arc<Open>, request: PlanRequest) {
        self.put(Waiting {
            open: Arc::clone(open),
            request,
            since: Instant::now(),
        });
    }

    fn put(&self, entry: Waiting) {
        let (deadline, work) = (self.deadline_ms(&entry.open), entry.open.work_ms);
        let mut queue = lock(&self.queue);
        // It has no bound of its own.
        let _ = queue.push(deadline, work, entry);
        self.length.store(queue.len(), Ordering::Relaxed);
    }

    fn take(&self, ticket: Ticket) -> Option<Waiting> {
        let mut queue = lock(&self.queue);
        let taken = queue.remove(ticket);
        self.length.store(queue.len(), Ordering::Relaxed);
        taken
    }

    /// Whether a request of the same model waits that goes before this one.
    pub(super) fn behind(&self, open: &Open) -> bool {
        if self.len() == 0 {
            return false;
        }
        let deadline = self.deadline_ms(open);
        let queue = lock(&self.queue);
        let mut first = queue.iter().map(|(_, entry)| &entry.open);
        first
            .find(|other| other.request.model == open.request.model)
            .is_some_and(|other| self.deadline_ms(other) <= deadline)
    }

    /// Predicted work of the model's requests that would go before one with
    /// this deadline, ms.
    fn ahead_ms(&self, model: &str, deadline_ms: f64) -> f64 {
        if self.len() == 0 {
            return 0.0;
        }
        let queue = lock(&self.queue);
        let waiting = queue.iter().map(|(_, entry)| &entry.open);
        waiting
            .take_while(|open| self.deadline_ms(open) <= deadline_ms)
            .filter(|open| open.request.model == model)
            .map(|open| open.work_ms)
            .sum()
    }

    /// Notes a prompt that goes to a worker.
    pub(super) fn sent(&self, worker: WorkerIndex, open: &Open) -> Sent {
        let mut unstarted = lock(&self.unstarted);
        unstarted.next += 1;
        let key = (worker, unstarted.next);
        unstarted.deadlines.insert(key, self.deadline_ms(open));
        Sent {
            unstarted: Arc::clone(&self.unstarted),
            key,
        }
    }

    /// Whether a request would go before all prompts that this router has sent
    /// to a worker: it would preempt what runs there.
    pub(super) fn preempts(&self, worker: WorkerIndex, open: &Open) -> bool {
        let deadline = self.deadline_ms(open);
        let unstarted = lock(&self.unstarted);
        let mut there = unstarted
            .deadlines
            .range((worker, 0)..=(worker, u64::MAX))
            .peekable();
        there.peek().is_some() && there.all(|(_, other)| deadline < *other)
    }
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
        let expected = self.dispatcher.expected_output(request, 0);
        let view = request_view(request, 0, 0, expected, &cached, &[]);
        let waits = &self.dispatcher.waits;
        let arrival = ms(request.arrived.saturating_duration_since(waits.started));
        let targets = ClassTargets::default();
        let deadline_of =
            |work| virtual_deadline_ms(&targets, class_of(request.class), arrival, work);
        let bound = AdmissionSettings {
            max_wait_ms: ms(self.settings.queue_timeout),
        };
        let ahead = |work| waits.ahead_ms(&request.model, deadline_of(work));
        let admitted = self
            .dispatcher
            .placer()
            .admit(&view, &bound, left_ms, ahead);
        let admission = admitted.map_err(|why| turned(request, why))?;
        if waits.len() >= self.settings.queue_length {
            return Err(RequestError::Overloaded {
                reason: "the queue is full",
                retry_after: retry_after(admission.wait_ms),
            });
        }
        Ok(Admitted {
            urgency_ms: deadline_of(admission.work_ms) - arrival,
            work_ms: admission.work_ms,
        })
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
        let tickets: Vec<Ticket> = {
            let queue = lock(&waits.queue);
            let first = queue.iter().take(TRIED_AT_ONCE);
            first.map(|(ticket, _)| ticket).collect()
        };
        let mut held: Vec<String> = Vec::new();
        for ticket in tickets {
            // Whoever takes it out owns it: two load frames may be here at once.
            let Some(entry) = waits.take(ticket) else {
                continue;
            };
            if entry.open.ended() {
                continue;
            }
            let model = &entry.open.request.model;
            if held.contains(model) {
                waits.put(entry);
                continue;
            }
            let tried = self.try_plan(&entry.open, &entry.request);
            if tried == Tried::Done {
                continue;
            }
            let late = waits.deadline_ms(&entry.open) <= waits.now_ms();
            if tried == Tried::NoRoom && late {
                held.push(model.clone());
            }
            waits.put(entry);
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
            let old = now.saturating_duration_since(since) > bound;
            if (old || open.ended()) && waits.take(ticket).is_some() {
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
        Turned::Waits(Rejected::DeadlineCannotBeMet { .. }) => {
            RequestError::DeadlineExceeded { next_index: 0 }
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
