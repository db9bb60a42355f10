//! The cache lane: numbered events, kept for a while, encoded once for all.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvmesh_wire::v1::{
    BlocksRemoved, BlocksStored, CacheCleared, CacheEvent, CacheEvents, SnapshotPart, WorkerFrame,
    cache_event::Kind, worker_frame::Frame,
};
use prost::Message;

/// Eight bytes a chain value, and the tags around it, within a frame of 64 KiB.
const BLOCKS_A_FRAME: usize = 7_000;

/// One change of a worker's prefix cache (wire: `CacheEvent`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A run of blocks became full, each the child of the one before.
    Stored {
        /// Chain value of the first block's parent.
        parent: u64,
        /// Chain value at the end of each block; at most 4,096.
        chain: Vec<u64>,
    },
    /// Blocks are gone.
    Removed(Vec<u64>),
    /// All blocks are gone.
    Cleared,
}

impl Change {
    /// In units of a chain value, with what is around them.
    fn size(&self) -> usize {
        4 + match self {
            Self::Stored { chain, .. } | Self::Removed(chain) => chain.len(),
            Self::Cleared => 0,
        }
    }

    fn into_event(self) -> CacheEvent {
        let kind = match self {
            Self::Stored { parent, chain } => Kind::Stored(BlocksStored {
                parent,
                chain,
                tier: 0,
            }),
            Self::Removed(chain) => Kind::Removed(BlocksRemoved { chain, tier: 0 }),
            Self::Cleared => Kind::Cleared(CacheCleared {}),
        };
        CacheEvent { kind: Some(kind) }
    }
}

/// Cache events that do not follow those before.
#[derive(Debug, thiserror::Error)]
#[error("event {came} came where {due} was due")]
pub struct CacheGap {
    came: u64,
    due: u64,
}

struct Encoded {
    first: u64,
    last: u64,
    frame: Bytes,
}

/// A ring of encoded cache frames.
///
/// A router's place in it is the number of the next event that it lacks. When
/// that has left the ring, the router needs a snapshot.
pub(crate) struct CacheLog {
    capacity: u64,
    frames: VecDeque<Encoded>,
    waiting: Vec<Change>,
    waiting_blocks: usize,
    waiting_since: Option<Instant>,
    last_event: u64,
}

impl CacheLog {
    pub(crate) fn new(capacity: u64) -> Self {
        Self {
            capacity,
            frames: VecDeque::new(),
            waiting: Vec::new(),
            waiting_blocks: 0,
            waiting_since: None,
            last_event: 0,
        }
    }

    /// Last event that routers can be told of.
    pub(crate) fn last_event(&self) -> u64 {
        self.last_event
    }

    /// Oldest event that is still here; `last_event + 1` where none is.
    fn first_event(&self) -> u64 {
        self.frames
            .front()
            .map_or(self.last_event + 1, |frame| frame.first)
    }

    /// Takes the next events. True: enough wait for a frame of their own.
    ///
    /// They are told from the next `publish` on: a step of many streams fills
    /// some blocks, and a frame for each step would cost more than its content.
    pub(crate) fn append(
        &mut self,
        first: u64,
        changes: Vec<Change>,
        now: Instant,
    ) -> Result<bool, CacheGap> {
        let due = self.last_event + self.waiting.len() as u64 + 1;
        if changes.is_empty() {
            return Ok(false);
        }
        if first != due {
            return Err(CacheGap { came: first, due });
        }
        self.waiting_blocks += changes.iter().map(Change::size).sum::<usize>();
        self.waiting.extend(changes);
        self.waiting_since.get_or_insert(now);
        Ok(self.waiting_blocks >= BLOCKS_A_FRAME)
    }

    /// When what waits is to be published; `None`: nothing waits.
    pub(crate) fn due(&self, coalesce: Duration) -> Option<Instant> {
        self.waiting_since.map(|since| since + coalesce)
    }

    /// Encodes what waits, once for all routers.
    pub(crate) fn publish(&mut self) {
        let mut number = self.last_event + 1;
        for part in split(std::mem::take(&mut self.waiting)) {
            let last = number + part.len() as u64 - 1;
            let frame = encode(CacheEvents {
                first_event: number,
                events: part,
                snapshot: None,
            });
            self.frames.push_back(Encoded {
                first: number,
                last,
                frame,
            });
            number = last + 1;
        }
        self.waiting_blocks = 0;
        self.waiting_since = None;
        self.last_event = number - 1;
        while self
            .frames
            .front()
            .is_some_and(|frame| self.last_event - frame.last >= self.capacity)
        {
            self.frames.pop_front();
        }
    }

    /// Whether everything from this event on is here.
    pub(crate) fn covers(&self, next_event: u64) -> bool {
        (self.first_event()..=self.last_event + 1).contains(&next_event)
    }

    /// The frame that holds an event, and the number after it; `None` at the end.
    ///
    /// A frame may begin before the event: what is known already is told again,
    /// which changes nothing.
    pub(crate) fn frame_from(&self, next_event: u64) -> Option<(u64, Bytes)> {
        let at = self.frames.partition_point(|frame| frame.last < next_event);
        let frame = self.frames.get(at)?;
        Some((frame.last + 1, frame.frame.clone()))
    }
}

/// Runs of events whose frames stay within 64 KiB. One event is never larger:
/// engines cut theirs.
pub(crate) fn split(changes: Vec<Change>) -> Vec<Vec<CacheEvent>> {
    let mut parts = Vec::new();
    let (mut part, mut blocks) = (Vec::new(), 0);
    for change in changes {
        let size = change.size();
        if !part.is_empty() && blocks + size > BLOCKS_A_FRAME {
            parts.push(std::mem::take(&mut part));
            blocks = 0;
        }
        blocks += size;
        part.push(change.into_event());
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}

/// One frame of a snapshot. `as_of`: in the last one, the event before its first part.
pub(crate) fn snapshot_frame(events: Vec<CacheEvent>, first: bool, as_of: Option<u64>) -> Bytes {
    encode(CacheEvents {
        first_event: 0,
        events,
        snapshot: Some(SnapshotPart {
            first,
            last: as_of.is_some(),
            as_of_event: as_of.unwrap_or(0),
        }),
    })
}

fn encode(events: CacheEvents) -> Bytes {
    let frame = WorkerFrame {
        frame: Some(Frame::Cache(events)),
    };
    frame.encode_to_vec().into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::frames::FRAME_BYTES;

    fn stored(chain: impl IntoIterator<Item = u64>) -> Change {
        Change::Stored {
            parent: 1,
            chain: chain.into_iter().collect(),
        }
    }

    fn events(frame: &[u8]) -> CacheEvents {
        match WorkerFrame::decode(frame).unwrap().frame {
            Some(Frame::Cache(events)) => events,
            other => panic!("{other:?}"),
        }
    }

    /// (number, first chain value) of every event from a place on.
    fn read_all(log: &CacheLog, mut next: u64) -> Vec<(u64, u64)> {
        let mut seen = Vec::new();
        while let Some((after, frame)) = log.frame_from(next) {
            let events = events(&frame);
            for (event, number) in events.events.iter().zip(events.first_event..) {
                let Some(Kind::Stored(stored)) = &event.kind else {
                    panic!("{event:?}")
                };
                if number >= next {
                    seen.push((number, stored.chain[0]));
                }
            }
            next = after;
        }
        seen
    }

    proptest! {
        #[test]
        fn a_reader_gets_every_event_once_or_is_told_to_take_a_snapshot(
            sizes in prop::collection::vec(1u64..10, 0..30), capacity in 1u64..41, start in 0u64..41,
        ) {
            let now = Instant::now();
            let mut log = CacheLog::new(capacity);
            let mut number = 0;
            for size in sizes {
                let changes = (1..=size).map(|i| stored([number + i])).collect();
                log.append(number + 1, changes, now).unwrap();
                log.publish();
                number += size;
            }
            prop_assert_eq!(log.last_event(), number);
            let covered = log.covers(start);
            if covered {
                let all: Vec<_> = (start..=number).map(|n| (n, n)).collect();
                prop_assert_eq!(read_all(&log, start), all);
            }
            // What lies within the bound is always there.
            let oldest = 1.max((number + 1).saturating_sub(capacity));
            prop_assert!(covered || !(oldest..=number + 1).contains(&start));
        }
    }

    #[test]
    fn memory_is_bounded_by_events() {
        let mut log = CacheLog::new(100);
        for n in 1..=10_000 {
            log.append(n, vec![stored([n])], Instant::now()).unwrap();
            log.publish();
        }
        assert!(log.last_event() - log.first_event() < 100);
        assert!(!log.covers(9_000));
    }

    #[test]
    fn long_batches_are_cut() {
        let mut log = CacheLog::new(1_000);
        let changes = (0..8).map(|_| stored(0..4_096)).collect();
        assert!(log.append(1, changes, Instant::now()).unwrap());
        log.publish();
        let (mut next, mut frames) = (1, Vec::new());
        while let Some((after, frame)) = log.frame_from(next) {
            next = after;
            frames.push(frame.len());
        }
        assert_eq!(frames.len(), 8);
        assert!(frames.iter().all(|bytes| *bytes <= FRAME_BYTES));
    }

    #[test]
    fn what_waits_is_told_together_and_in_order() {
        let mut log = CacheLog::new(1_000);
        for n in 1..=40 {
            assert!(!log.append(n, vec![stored([n])], Instant::now()).unwrap());
        }
        assert_eq!(log.last_event(), 0);
        log.publish();
        assert_eq!(log.frame_from(1).unwrap().0, 41);
        let all: Vec<_> = (1..=40).map(|n| (n, n)).collect();
        assert_eq!(read_all(&log, 1), all);
    }

    #[test]
    fn a_gap_in_the_events_is_no_small_thing() {
        let mut log = CacheLog::new(10);
        log.append(1, vec![stored([1])], Instant::now()).unwrap();
        let error = log.append(3, vec![stored([3])], Instant::now());
        assert_eq!(
            error.unwrap_err().to_string(),
            "event 3 came where 2 was due"
        );
    }
}
