//! Who may write into the destination blocks of a transfer, and until when.

use std::sync::atomic::{AtomicU32, Ordering};

const CLOSED: u32 = 1 << 31;

/// Counts the writes under way. Once closed no write begins, and whoever ends
/// the last one learns it.
#[derive(Debug, Default)]
pub(crate) struct Gate(AtomicU32);

impl Gate {
    /// Begins a write; false: the blocks are not ours any more.
    pub(crate) fn enter(&self) -> bool {
        self.0
            .try_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                (count & CLOSED == 0).then_some(count + 1)
            })
            .is_ok()
    }

    /// Ends a write; true: it was the last, and the gate is closed.
    pub(crate) fn leave(&self) -> bool {
        self.0.fetch_sub(1, Ordering::AcqRel) == CLOSED | 1
    }

    /// Lets no new write begin; true: none is under way.
    pub(crate) fn close(&self) -> bool {
        self.0.fetch_or(CLOSED, Ordering::AcqRel) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::Gate;

    #[test]
    fn the_last_write_after_closing_is_told() {
        let gate = Gate::default();
        assert!(gate.enter() && gate.enter());
        assert!(!gate.leave());
        assert!(!gate.close());
        assert!(!gate.enter());
        assert!(gate.leave());
        assert!(Gate::default().close());
    }
}
