//! Bounded waits of generations, and plans that are put off: one task, one ordered map.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Instant,
};

use kvmesh_session::generation::{Event, PlanRequest, Timer};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::open::Open;

/// Names an armed timer: its instant, and a number that makes it unique.
pub(super) type TimerKey = (Instant, u64);

/// All armed timers.
#[derive(Default)]
pub(super) struct Timers {
    armed: Mutex<Armed>,
    earlier: Notify,
}

#[derive(Default)]
struct Armed {
    next: u64,
    waits: BTreeMap<TimerKey, (Weak<Open>, Due)>,
}

/// What is done when its time has come.
enum Due {
    Fire(Timer),
    Plan(Box<PlanRequest>),
    Settle,
}

impl Timers {
    // A panic under this lock can only come from the allocator; the map is
    // whole after any of its operations.
    fn lock(&self) -> MutexGuard<'_, Armed> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Arms a timer of a generation.
    pub(super) fn arm(&self, at: Instant, open: &Arc<Open>, timer: Timer) -> TimerKey {
        self.add(at, open, Due::Fire(timer))
    }

    /// Asks for a plan then, unless the generation has ended.
    pub(super) fn plan_later(&self, at: Instant, open: &Arc<Open>, request: PlanRequest) {
        self.add(at, open, Due::Plan(Box::new(request)));
    }

    /// Waits no longer than then for what workers owe a generation that has ended.
    pub(super) fn settle_at(&self, at: Instant, open: &Arc<Open>) -> TimerKey {
        self.add(at, open, Due::Settle)
    }

    fn add(&self, at: Instant, open: &Arc<Open>, due: Due) -> TimerKey {
        let (key, first) = {
            let mut armed = self.lock();
            armed.next += 1;
            let key = (at, armed.next);
            armed.waits.insert(key, (Arc::downgrade(open), due));
            (
                key,
                armed
                    .waits
                    .first_key_value()
                    .is_some_and(|(first, _)| *first == key),
            )
        };
        if first {
            self.earlier.notify_one();
        }
        key
    }

    /// Gives a wait up.
    pub(super) fn disarm(&self, key: TimerKey) {
        self.lock().waits.remove(&key);
    }

    /// Fires timers until it is stopped.
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        loop {
            let next = self.fire_due();
            let wait = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.earlier.notified() => {}
                () = wait => {}
            }
        }
    }

    fn fire_due(&self) -> Option<Instant> {
        loop {
            let (open, due) = {
                let mut armed = self.lock();
                let entry = armed.waits.first_entry()?;
                let (at, _) = *entry.key();
                if at > Instant::now() {
                    return Some(at);
                }
                entry.remove()
            };
            if let Some(open) = open.upgrade() {
                fire(&open, due);
            }
        }
    }
}

/// A generation whose machine panics at a timer ends: nobody would fire it again.
fn fire(open: &Arc<Open>, due: Due) {
    let apply = || match due {
        Due::Fire(timer) => open.apply(Event::Fired(timer)),
        Due::Plan(request) => open.ask_now(&request),
        Due::Settle => open.settle_now(),
    };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(apply)) {
        open.abandon(None);
        resume_unwind(panic);
    }
}
