//! Runs of blocks: values that were stored one after the other lie so in memory.
//!
//! A look-up finds the first value of a run by the table and compares the rest
//! in order, as the prompt comes. That is layout only: nothing is read into two
//! values being neighbours, and whatever is compared is compared whole.

use crate::holders::{HolderId, NOBODY};
use crate::table::MOST_SLOTS;
use smallvec::SmallVec;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Slots whose heat is kept together: eight segments a run.
pub(crate) const SEGMENT: usize = MOST_SLOTS / 8;
const BYTE_EACH: u64 = 0x0101_0101_0101_0101;
/// Bytes that an allocation costs beside its own.
const ALLOCATION: usize = 16;
/// Values compared at a time.
const STRIDE: usize = 64;

/// Slots up to `end` that have the same holders.
#[derive(Debug, Clone, Copy)]
struct Span {
    holders: HolderId,
    end: u16,
}

/// Ranges of slots that nobody holds any more.
pub(crate) type Dead = SmallVec<[Range<usize>; 2]>;

/// Some values, each with its holders. One cache line, and the values behind it.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Run {
    values: Vec<u64>,
    spans: SmallVec<[Span; 2]>,
    /// A byte for each segment: the tick in which a block of it was last asked
    /// for or stored. Look-ups write it under a shared lock; a lost race costs
    /// a tick.
    heat: AtomicU64,
}

impl Run {
    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    pub(crate) fn values(&self) -> &[u64] {
        &self.values
    }

    /// Whether somebody holds this value in this slot.
    pub(crate) fn holds(&self, slot: usize, value: u64) -> bool {
        let held = |(holders, _)| holders != NOBODY;
        self.values.get(slot) == Some(&value) && self.spans_from(slot).next().is_none_or(held)
    }

    /// Bytes on the heap, allocations included.
    pub(crate) fn heap(&self) -> usize {
        let spans = if self.spans.spilled() {
            self.spans.capacity() * size_of::<Span>() + ALLOCATION
        } else {
            0
        };
        let values = self.values.capacity() * size_of::<u64>();
        values + if values > 0 { ALLOCATION } else { 0 } + spans
    }

    /// Slots from `slot` on that have the same holders: these, and where the
    /// next begin.
    pub(crate) fn spans_from(&self, slot: usize) -> impl Iterator<Item = (HolderId, usize)> + '_ {
        let spans = self.spans.iter();
        let spans = spans.skip_while(move |span| usize::from(span.end) <= slot);
        spans.map(|span| (span.holders, usize::from(span.end)))
    }

    /// How many of `chain` lie from `slot` on and are held by somebody.
    pub(crate) fn held_upward(&self, slot: usize, chain: &[u64]) -> usize {
        let mut at = slot;
        for (holders, end) in self.spans_from(slot) {
            if holders == NOBODY {
                break;
            }
            at += common_prefix(&chain[at - slot..], &self.values[at..end]);
            if at < end {
                break;
            }
        }
        at - slot
    }

    /// How many of `chain` lie from `slot` down and are held by somebody.
    pub(crate) fn held_downward(&self, slot: usize, chain: &[u64]) -> usize {
        let mut first = 0;
        let mut start = 0;
        for span in &self.spans {
            if start > slot {
                break;
            }
            if span.holders == NOBODY {
                first = usize::from(span.end);
            }
            start = usize::from(span.end);
        }
        let down = self.values[first.min(slot + 1)..=slot].iter().rev();
        down.zip(chain).take_while(|(a, b)| a == b).count()
    }

    /// Makes room for so many more values, and as many as there are.
    pub(crate) fn reserve(&mut self, more: usize) {
        let wanted = self.values.len() + more;
        if wanted > self.values.capacity() {
            let roomy = (2 * self.values.len()).min(MOST_SLOTS);
            self.values
                .reserve_exact(roomy.max(wanted) - self.values.len());
        }
    }

    /// Puts values at the end; [`Run::close`] says who holds them.
    pub(crate) fn put(&mut self, values: &[u64]) {
        self.values.extend_from_slice(values);
    }

    /// Gives the values that were put since the last time their holders.
    pub(crate) fn close(&mut self, holders: HolderId) {
        push(&mut self.spans, holders, self.values.len());
    }

    /// Changes holders in some slots to what `change` makes of them and of the
    /// number of slots that have them.
    pub(crate) fn recolour(
        &mut self,
        slots: Range<usize>,
        mut change: impl FnMut(HolderId, usize) -> HolderId,
    ) -> Dead {
        let mut dead = Dead::new();
        let mut spans = SmallVec::new();
        let mut start = 0;
        for span in &self.spans {
            let end = usize::from(span.end);
            let (from, to) = (slots.start.clamp(start, end), slots.end.clamp(start, end));
            if start < from {
                push(&mut spans, span.holders, from);
            }
            if from < to {
                let holders = change(span.holders, to - from);
                if holders == NOBODY && span.holders != NOBODY {
                    dead.push(from..to);
                }
                push(&mut spans, holders, to);
            }
            if to < end {
                push(&mut spans, span.holders, end);
            }
            start = end;
        }
        self.spans = spans;
        dead
    }

    /// Drops slots at the end that nobody holds. Whether any is left.
    pub(crate) fn trim(&mut self) -> bool {
        if self.spans.last().is_some_and(|span| span.holders == NOBODY) {
            self.spans.pop();
            let end = self.spans.last().map_or(0, |span| usize::from(span.end));
            self.values.truncate(end);
            if self.values.capacity() > 2 * self.values.len() + 8 {
                self.values.shrink_to_fit();
            }
        }
        !self.values.is_empty()
    }

    /// Whether most slots are held by nobody.
    pub(crate) fn is_sparse(&self) -> bool {
        let (mut start, mut dead) = (0, 0);
        for span in &self.spans {
            let end = usize::from(span.end);
            if span.holders == NOBODY {
                dead += end - start;
            }
            start = end;
        }
        2 * dead > start
    }

    /// Drops all slots that nobody holds. Says which values move: (value, old
    /// slot, new slot), in order.
    pub(crate) fn compact(&mut self) -> Vec<(u64, usize, usize)> {
        let mut moved = Vec::new();
        let mut values = Vec::new();
        let mut spans = SmallVec::new();
        let mut start = 0;
        for span in &self.spans {
            let end = usize::from(span.end);
            if span.holders != NOBODY {
                for slot in start..end {
                    moved.push((self.values[slot], slot, values.len()));
                    values.push(self.values[slot]);
                }
                push(&mut spans, span.holders, values.len());
            }
            start = end;
        }
        values.shrink_to_fit();
        self.values = values;
        self.spans = spans;
        moved
    }

    /// Blocks in these slots were asked for or stored in this tick.
    pub(crate) fn touch(&self, slots: Range<usize>, tick: u8) {
        let Some(last) = slots.end.checked_sub(1) else {
            return;
        };
        let (low, high) = (slots.start / SEGMENT, last / SEGMENT);
        let mask = (u64::MAX >> (56 - 8 * high)) & (u64::MAX << (8 * low));
        let before = self.heat.load(Ordering::Relaxed);
        let after = before & !mask | (BYTE_EACH * u64::from(tick)) & mask;
        if after != before {
            self.heat.store(after, Ordering::Relaxed);
        }
    }

    /// Ticks since the last segment was touched.
    pub(crate) fn tail_age(&self, tick: u8) -> u8 {
        let last = self.values.len().saturating_sub(1) / SEGMENT;
        tick.wrapping_sub((self.heat.load(Ordering::Relaxed) >> (8 * last)) as u8)
    }

    /// First slot of the last segment.
    pub(crate) fn tail(&self) -> usize {
        self.values.len().saturating_sub(1) / SEGMENT * SEGMENT
    }
}

fn push(spans: &mut SmallVec<[Span; 2]>, holders: HolderId, end: usize) {
    let end = end as u16;
    match spans.last_mut() {
        Some(last) if last.holders == holders => last.end = end,
        _ => spans.push(Span { holders, end }),
    }
}

/// Values at the start of both that are equal.
pub(crate) fn common_prefix(a: &[u64], b: &[u64]) -> usize {
    let most = a.len().min(b.len());
    let (a, b) = (&a[..most], &b[..most]);
    let mut same = 0;
    for (a, b) in a.chunks(STRIDE).zip(b.chunks(STRIDE)) {
        if a != b {
            return same + a.iter().zip(b).take_while(|(a, b)| a == b).count();
        }
        same += a.len();
    }
    same
}
