//! What the copy threads have to do.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use crate::{connection::Connection, gate::Gate, id::TransferId};

/// Blocks that go to a thread at once, in bytes: small blocks share the cost
/// of the hand-over, large ones are announced one by one.
const BATCH_BYTES: usize = 4 << 20;

/// One block to be hashed or copied.
pub(crate) enum Job {
    /// Sender: checksum of a block.
    Hash {
        id: TransferId,
        block: u32,
        slot: u32,
    },
    /// Receiver: copy a block out of the peer's pool.
    Copy {
        id: TransferId,
        block: u32,
        /// In the peer's pool.
        slot: u32,
        /// In ours.
        target: u32,
        connection: Arc<Connection>,
        gate: Arc<Gate>,
    },
}

impl Job {
    fn key(&self) -> (bool, TransferId) {
        match self {
            Self::Hash { id, .. } => (false, *id),
            Self::Copy { id, .. } => (true, *id),
        }
    }
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

/// The queue. Bounded by what is announced: each job is a block of a pool.
#[derive(Default)]
pub(crate) struct Jobs {
    queue: Mutex<Queue>,
    filled: Condvar,
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, jobs: impl IntoIterator<Item = Job>) {
        let mut queue = self.lock();
        if !queue.closed {
            queue.jobs.extend(jobs);
        }
        drop(queue);
        self.filled.notify_all();
    }

    /// Jobs of one kind and transfer; `None` once closed.
    pub(crate) fn take(&self, block_bytes: usize) -> Option<Vec<Job>> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            if let Some(first) = queue.jobs.pop_front() {
                let key = first.key();
                let mut batch = vec![first];
                while batch.len() * block_bytes < BATCH_BYTES
                    && queue.jobs.front().is_some_and(|job| job.key() == key)
                {
                    batch.extend(queue.jobs.pop_front());
                }
                return Some(batch);
            }
            queue = self
                .filled
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().jobs.len()
    }

    pub(crate) fn close(&self) {
        let mut queue = self.lock();
        queue.closed = true;
        queue.jobs.clear();
        drop(queue);
        self.filled.notify_all();
    }
}
