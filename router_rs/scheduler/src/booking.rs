//! Load that was sent but is not yet in a report.

use kvmesh_kv_index::WorkerSlot;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Work of one stage on one worker, or a sum of such.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Prompts to compute.
    pub prefills: u32,
    /// Prompt tokens to compute.
    pub prefill_tokens: u64,
    /// Requests that will decode.
    pub decodes: u32,
    /// Sum of their context lengths, in tokens.
    pub decode_context: u64,
    /// KV blocks that will be reserved.
    pub blocks: u64,
}

impl Work {
    fn add(&mut self, other: &Self) {
        self.prefills += other.prefills;
        self.prefill_tokens += other.prefill_tokens;
        self.decodes += other.decodes;
        self.decode_context += other.decode_context;
        self.blocks += other.blocks;
    }
}

/// What this router has booked on each worker and no load report shows yet.
///
/// A load report echoes the number of the last command that it reflects. So
/// booked is exactly: what was chosen and not sent, plus what was sent after
/// that number. Nothing decays and nothing is guessed.
#[derive(Debug, Clone, Default)]
pub struct Bookings(Arc<Mutex<Ledger>>);

#[derive(Debug, Default)]
struct Ledger {
    next: u64,
    entries: BTreeMap<u64, Entry>,
    /// Last command echoed, by worker.
    echoed: BTreeMap<WorkerSlot, u64>,
}

#[derive(Debug)]
struct Entry {
    worker: WorkerSlot,
    work: Work,
    command: Option<u64>,
}

impl Bookings {
    /// An empty ledger.
    pub fn new() -> Self {
        Self::default()
    }

    /// Books work at the moment of choice. It counts until the worker's
    /// report shows it or the guard goes.
    #[must_use = "a booking that is dropped is released"]
    pub fn book(&self, worker: WorkerSlot, work: Work) -> Booking {
        let mut ledger = self.lock();
        let key = ledger.next;
        ledger.next += 1;
        ledger.entries.insert(
            key,
            Entry {
                worker,
                work,
                command: None,
            },
        );
        Booking {
            ledger: self.clone(),
            key,
        }
    }

    /// A load report of this worker reflects all commands up to this one.
    pub fn echoed(&self, worker: WorkerSlot, command: u64) {
        let mut ledger = self.lock();
        ledger.entries.retain(|_, entry| {
            entry.worker != worker || entry.command.is_none_or(|sent| sent > command)
        });
        ledger.echoed.insert(worker, command);
    }

    /// A new session with this worker, or none: what was sent on the old one
    /// is no longer on its way, and commands are numbered anew.
    pub fn session_ended(&self, worker: WorkerSlot) {
        let mut ledger = self.lock();
        ledger
            .entries
            .retain(|_, entry| entry.worker != worker || entry.command.is_none());
        ledger.echoed.remove(&worker);
    }

    /// What is booked on a worker.
    pub fn booked(&self, worker: WorkerSlot) -> Work {
        let mut sum = Work::default();
        for entry in self
            .lock()
            .entries
            .values()
            .filter(|entry| entry.worker == worker)
        {
            sum.add(&entry.work);
        }
        sum
    }

    /// What is booked on every worker that has something booked.
    pub fn all(&self) -> BTreeMap<WorkerSlot, Work> {
        let mut sums: BTreeMap<WorkerSlot, Work> = BTreeMap::new();
        for entry in self.lock().entries.values() {
            sums.entry(entry.worker).or_default().add(&entry.work);
        }
        sums
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Work booked on a worker; released when dropped.
#[derive(Debug)]
pub struct Booking {
    ledger: Bookings,
    key: u64,
}

impl Booking {
    /// It was sent as this command of the worker's session.
    pub fn sent(&self, command: u64) {
        let mut ledger = self.ledger.lock();
        let Some(entry) = ledger.entries.get_mut(&self.key) else {
            return;
        };
        entry.command = Some(command);
        let worker = entry.worker;
        if ledger
            .echoed
            .get(&worker)
            .is_some_and(|echoed| *echoed >= command)
        {
            ledger.entries.remove(&self.key);
        }
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        self.ledger.lock().entries.remove(&self.key);
    }
}
