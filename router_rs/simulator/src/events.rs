//! What happens when.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// Something that happens at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Event {
    /// The next request of the trace comes.
    Arrival,
    /// The step of a worker ends. `life` counts its restarts.
    StepEnds { worker: u32, life: u32 },
    /// The oldest report of a worker on its way is here.
    Report { worker: u32, life: u32 },
    /// A decode worker is asked for room.
    Reserve { request: u32, attempt: u32 },
    /// The router is told that there is none.
    Refused { request: u32, attempt: u32 },
    /// A prompt reaches its worker.
    Submit { request: u32, attempt: u32 },
    /// A prefix from another worker is here.
    Fetched { request: u32, attempt: u32 },
    /// All KV of a prompt is at its decode worker.
    HandedOver { request: u32, attempt: u32 },
    /// The failure of this number happens.
    Fails { number: u32 },
    /// Its routers notice.
    Noticed { number: u32 },
    /// Its worker is back.
    Back { number: u32 },
    /// The pool controller looks.
    Look,
    /// A router looks at what waits in it, if it has not done so meanwhile.
    Pass { router: u32 },
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    at_ms: f64,
    number: u64,
    event: Event,
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at_ms
            .total_cmp(&other.at_ms)
            .then(self.number.cmp(&other.number))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

/// Events in the order of their times; equal times in the order in which they
/// were planned.
#[derive(Debug, Default)]
pub(crate) struct Events {
    heap: BinaryHeap<Reverse<Entry>>,
    next: u64,
}

impl Events {
    pub(crate) fn at(&mut self, at_ms: f64, event: Event) {
        let number = self.next;
        self.next += 1;
        self.heap.push(Reverse(Entry {
            at_ms,
            number,
            event,
        }));
    }

    pub(crate) fn pop(&mut self) -> Option<(f64, Event)> {
        self.heap
            .pop()
            .map(|Reverse(entry)| (entry.at_ms, entry.event))
    }
}
