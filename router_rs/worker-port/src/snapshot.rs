//! A snapshot on its way to one router.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvmesh_wire::v1::CacheEvent;

use crate::cache_log::{Change, snapshot_frame, split};

/// Frames that wait for the router; then whoever reads the cache waits.
const FRAMES_AHEAD: usize = 2;

/// The parts of one snapshot, paced by time: a router that knows nothing has
/// no hurry, the streams beside it have.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// Last event before the first part was read; the log goes on after it.
    as_of: u64,
    /// Kept back until it is known whether it is the last.
    held: Option<Vec<CacheEvent>>,
    first: bool,
    ready: VecDeque<Bytes>,
    ended: bool,
    next_at: Option<Instant>,
}

impl Snapshot {
    pub(crate) fn new(as_of: u64) -> Self {
        Self {
            as_of,
            held: None,
            first: true,
            ready: VecDeque::new(),
            ended: false,
            next_at: None,
        }
    }

    /// Whether another part may be added.
    pub(crate) fn has_room(&self) -> bool {
        self.ready.len() < FRAMES_AHEAD
    }

    /// Adds a part of the cache's content, of stores only.
    pub(crate) fn add(&mut self, stores: Vec<Change>) {
        for part in split(stores) {
            if let Some(held) = self.held.replace(part) {
                self.push(held, None);
            }
        }
    }

    /// There are no more parts.
    pub(crate) fn end(&mut self) {
        let held = self.held.take().unwrap_or_default();
        self.push(held, Some(self.as_of));
        self.ended = true;
    }

    fn push(&mut self, events: Vec<CacheEvent>, as_of: Option<u64>) {
        self.ready
            .push_back(snapshot_frame(events, self.first, as_of));
        self.first = false;
    }

    /// When the next frame may go; `None`: there is none.
    pub(crate) fn due(&self) -> Option<Instant> {
        let at = self.next_at;
        self.ready.front().and(at)
    }

    /// The next frame, where it may go now.
    pub(crate) fn next(&mut self, now: Instant, interval: Duration) -> Option<Bytes> {
        if self.next_at.is_some_and(|at| at > now) {
            return None;
        }
        let frame = self.ready.pop_front()?;
        self.next_at = Some(now + interval);
        Some(frame)
    }

    /// Where all has gone: the event from which the log goes on.
    pub(crate) fn done(&self) -> Option<u64> {
        (self.ended && self.ready.is_empty()).then_some(self.as_of + 1)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use kvmesh_wire::v1::{CacheEvents, WorkerFrame, worker_frame::Frame};
    use prost::Message;

    use super::*;

    fn stored(chain: std::ops::Range<u64>) -> Change {
        Change::Stored {
            parent: 0,
            chain: chain.collect(),
        }
    }

    fn events(frame: &Bytes) -> CacheEvents {
        match WorkerFrame::decode(&frame[..]).unwrap().frame {
            Some(Frame::Cache(events)) => events,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn frames_are_paced_and_the_last_says_where_the_log_goes_on() {
        let (interval, start) = (Duration::from_millis(5), Instant::now());
        let mut snapshot = Snapshot::new(41);
        snapshot.add((0..4).map(|i| stored(i * 4_096..(i + 1) * 4_096)).collect());
        assert!(!snapshot.has_room());
        let first = events(&snapshot.next(start, interval).unwrap());
        assert!(snapshot.next(start, interval).is_none());
        assert_eq!(snapshot.due(), Some(start + interval));
        snapshot.end();
        let mut now = start;
        let mut frames = vec![first];
        while snapshot.done().is_none() {
            now += interval;
            frames.push(events(&snapshot.next(now, interval).unwrap()));
        }
        assert_eq!(snapshot.done(), Some(42));
        let parts: Vec<_> = frames.iter().map(|f| f.snapshot.unwrap()).collect();
        assert_eq!(parts.len(), 4);
        assert!(parts.iter().enumerate().all(|(i, p)| p.first == (i == 0)));
        assert!(parts.iter().enumerate().all(|(i, p)| p.last == (i == 3)));
        assert_eq!(parts[3].as_of_event, 41);
    }

    #[test]
    fn an_empty_cache_is_one_frame() {
        let mut snapshot = Snapshot::new(7);
        snapshot.end();
        let frame = snapshot.next(Instant::now(), Duration::ZERO).unwrap();
        let part = events(&frame).snapshot.unwrap();
        assert!(part.first && part.last);
        assert_eq!(snapshot.done(), Some(8));
    }
}
