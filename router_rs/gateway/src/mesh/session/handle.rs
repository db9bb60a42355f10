//! The sending half of a session, and what is kept by generation.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

use kvmesh_session::{Command, Fence, GenerationId};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{super::open::Open, COMMAND_QUEUE, PLACEMENTS_QUEUED};

/// A command on its way, and the generation that it places.
pub(in crate::mesh) struct Outgoing {
    pub(in crate::mesh) command: Command,
    pub(in crate::mesh) open: Option<Arc<Open>>,
}

/// The sending half of one live session. It ends with the session: a new one
/// has a new handle.
pub(in crate::mesh) struct SessionHandle {
    sender: Mutex<Sender>,
    pub(super) closed: CancellationToken,
}

struct Sender {
    next: u64,
    queue: mpsc::Sender<(u64, Outgoing)>,
}

impl SessionHandle {
    pub(in crate::mesh) fn new() -> (Arc<Self>, mpsc::Receiver<(u64, Outgoing)>) {
        let (queue, commands) = mpsc::channel(COMMAND_QUEUE);
        let sender = Mutex::new(Sender { next: 1, queue });
        (
            Arc::new(Self {
                sender,
                closed: CancellationToken::new(),
            }),
            commands,
        )
    }

    /// Whether a placement is taken now: its commands are drained.
    pub(in crate::mesh) fn takes_placements(&self) -> bool {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        sender.queue.max_capacity() - sender.queue.capacity() < PLACEMENTS_QUEUED
    }

    /// Queues a command and gives its number; `None` where the session has
    /// ended or does not drain.
    pub(in crate::mesh) fn send(&self, outgoing: Outgoing) -> Option<u64> {
        if self.closed.is_cancelled() {
            return None;
        }
        // The number is drawn and the command queued under one lock, so that
        // numbers rise in the order of sending.
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        let number = sender.next;
        if sender.queue.try_send((number, outgoing)).is_err() {
            self.closed.cancel();
            return None;
        }
        sender.next += 1;
        Some(number)
    }

    /// Waits for the session's end.
    pub(in crate::mesh) async fn ended(&self) {
        self.closed.cancelled().await;
    }

    /// Cancels an attempt that nobody holds here any more. Where that cannot be
    /// sent the session has ended, and its worker drops the attempt.
    pub(in crate::mesh) fn cancel(&self, generation: GenerationId, fence: Fence) {
        let command = Command::Cancel { generation, fence };
        let _ = self.send(Outgoing {
            command,
            open: None,
        });
    }
}

/// Generation ids are random bits that this router drew: they are their own
/// hash.
#[derive(Default)]
pub(in crate::mesh) struct OwnBits(u64);

impl Hasher for OwnBits {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    // The length prefix of an array's hash.
    fn write_usize(&mut self, _: usize) {}
}

/// Generations by id.
pub(in crate::mesh) type ById<T> = HashMap<GenerationId, T, BuildHasherDefault<OwnBits>>;
