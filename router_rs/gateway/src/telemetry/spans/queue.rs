//! What ended and is yet to be told: bounded, and never waited for by a stream.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use prometheus_client::metrics::counter::Counter;
use tokio::sync::Notify;

use super::request::Ended;

/// Requests that ended, with a bound on their spans.
pub(super) struct Queue {
    most: usize,
    waiting: Mutex<Waiting>,
    /// The one task that takes is told of each offer.
    offered: Notify,
    dropped: Counter,
}

#[derive(Default)]
struct Waiting {
    ended: VecDeque<Ended>,
    spans: usize,
}

impl Queue {
    /// Takes `most` spans; `dropped` counts those that found no room.
    pub(super) fn new(most: usize, dropped: Counter) -> Self {
        Self {
            most,
            waiting: Mutex::default(),
            offered: Notify::new(),
            dropped,
        }
    }

    // A push that panicked leaves at most a wrong sum of spans.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a request, or drops it where there is no room for its spans.
    pub(super) fn offer(&self, ended: Ended) {
        let spans = ended.spans();
        {
            let mut waiting = self.lock();
            if waiting.spans + spans > self.most {
                drop(waiting);
                self.drop_spans(spans);
                return;
            }
            waiting.spans += spans;
            waiting.ended.push_back(ended);
        }
        self.offered.notify_one();
    }

    /// Counts spans that are not told.
    pub(super) fn drop_spans(&self, spans: usize) {
        self.dropped.inc_by(spans as u64);
    }

    /// The oldest requests: as many as have `most` spans or a few more.
    pub(super) fn take(&self, most: usize) -> Vec<Ended> {
        let mut waiting = self.lock();
        let (mut taken, mut spans) = (Vec::new(), 0);
        while spans < most
            && let Some(ended) = waiting.ended.pop_front()
        {
            spans += ended.spans();
            taken.push(ended);
        }
        waiting.spans = waiting.spans.saturating_sub(spans);
        taken
    }

    /// Spans that wait.
    pub(super) fn len(&self) -> usize {
        self.lock().spans
    }

    /// Waits until so many spans wait. For one task: another's wake-up is lost.
    pub(super) async fn holds(&self, least: usize) {
        while self.len() < least {
            self.offered.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_finds_no_room_is_dropped_and_counted() {
        let dropped = Counter::default();
        let spans = Ended::default().spans();
        let queue = Queue::new(3 * spans, dropped.clone());
        for _ in 0..5 {
            queue.offer(Ended::default());
        }
        assert_eq!((queue.len(), dropped.get()), (3 * spans, 2 * spans as u64));
        assert_eq!(queue.take(spans + 1).len(), 2);
        queue.offer(Ended::default());
        assert_eq!((queue.len(), dropped.get()), (2 * spans, 2 * spans as u64));
        assert_eq!(queue.take(usize::MAX).len(), 2);
        assert_eq!(queue.len(), 0);
    }
}
