//! The word that a client is given up, for whoever carries its stream.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::Waker,
};

/// Set once a client that does not read was given up. The transport may be
/// stuck in front of it and ask for no more output; so it is woken by its own
/// waker and not by that of the output.
#[derive(Clone, Debug, Default)]
pub struct GivenUp(Arc<Word>);

#[derive(Debug, Default)]
struct Word {
    said: AtomicBool,
    listener: OnceLock<Waker>,
}

impl GivenUp {
    /// Whether it was said. The first call's waker is told when it is; one task
    /// asks, and its waker stays the same.
    #[must_use]
    pub fn said(&self, waker: &Waker) -> bool {
        // Listens before it looks: the word cannot pass between the two.
        self.0.listener.get_or_init(|| waker.clone());
        self.was_said()
    }

    /// Whether it was said.
    #[must_use]
    pub fn was_said(&self) -> bool {
        self.0.said.load(Ordering::SeqCst)
    }

    pub(super) fn say(&self) {
        self.0.said.store(true, Ordering::SeqCst);
        if let Some(listener) = self.0.listener.get() {
            listener.wake_by_ref();
        }
    }
}
