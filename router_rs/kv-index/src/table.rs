//! The map from chain value to the number of its holders' set.
//!
//! Open addressing with linear probing in an array of 12-byte entries, grown
//! by a quarter: 17 to 21 bytes a block. Chain values are hashes already; one
//! multiplication spreads those that are not. Look-ups of a prompt's values
//! do not depend on each other, so the processor overlaps their cache misses.

use crate::holders::{HolderId, NOBODY};
use std::sync::atomic::{AtomicU32, Ordering};

/// Spreads keys over the array (2^64 / golden ratio).
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;
const SMALLEST: usize = 64;

/// Bytes a block costs in a table that has just grown.
pub(crate) const BYTES_A_BLOCK: usize = 21;

/// Most sets that the 24 bits of an entry can number, less one.
pub(crate) const MAX_HOLDER_ID: HolderId = (1 << 24) - 1;

/// Free where the holders are [`NOBODY`]. The key is in two halves so that an
/// entry needs no padding. `state` is the holders' number in its upper 24 bits
/// and the heat in its lower 8: the tick in which the block was last asked for
/// or stored. Look-ups write it under a shared lock; a lost race costs a tick.
#[derive(Debug, Default)]
struct Entry {
    low: u32,
    high: u32,
    state: AtomicU32,
}

impl Entry {
    fn new(key: u64, holders: HolderId, heat: u8) -> Self {
        let state = AtomicU32::new(holders << 8 | u32::from(heat));
        Self {
            low: key as u32,
            high: (key >> 32) as u32,
            state,
        }
    }

    fn key(&self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }

    fn state(&self) -> u32 {
        self.state.load(Ordering::Relaxed)
    }

    fn holders(&self) -> HolderId {
        self.state() >> 8
    }

    fn heat(&self) -> u8 {
        self.state() as u8
    }
}

#[derive(Debug)]
pub(crate) struct Table {
    entries: Vec<Entry>,
    len: usize,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self::with_capacity(SMALLEST)
    }

    fn with_capacity(capacity: usize) -> Self {
        let mut entries = Vec::new();
        entries.resize_with(capacity, Entry::default);
        Self { entries, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn capacity(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>()
    }

    fn home(&self, key: u64) -> usize {
        let spread = u128::from(key.wrapping_mul(SPREAD));
        ((spread * self.entries.len() as u128) >> 64) as usize
    }

    fn after(&self, at: usize) -> usize {
        if at + 1 == self.entries.len() {
            0
        } else {
            at + 1
        }
    }

    /// Where the key is, or the free place where it would go.
    fn place(&self, key: u64) -> usize {
        let (low, high) = (key as u32, (key >> 32) as u32);
        let mut at = self.home(key);
        loop {
            let entry = &self.entries[at];
            if (entry.low == low && entry.high == high) || entry.holders() == NOBODY {
                return at;
            }
            at = self.after(at);
        }
    }

    /// Reads the home places of some keys, so that their cache lines are on
    /// the way together: probing ends in branches that wait for memory one
    /// after the other. Returns nothing of meaning.
    pub(crate) fn warm(&self, keys: &[u64]) -> u32 {
        keys.iter()
            .fold(0, |sum, key| sum ^ self.entries[self.home(*key)].low)
    }

    /// Holders of a block; [`NOBODY`] for an unknown one.
    pub(crate) fn holders(&self, key: u64) -> HolderId {
        self.entries[self.place(key)].holders()
    }

    /// As [`Table::holders`], and the block counts as asked for now.
    pub(crate) fn touch(&self, key: u64, now: u8) -> HolderId {
        let entry = &self.entries[self.place(key)];
        let holders = entry.holders();
        if holders != NOBODY && entry.heat() != now {
            entry
                .state
                .store(holders << 8 | u32::from(now), Ordering::Relaxed);
        }
        holders
    }

    /// When a block was last asked for.
    pub(crate) fn heat(&self, key: u64) -> Option<u8> {
        let entry = &self.entries[self.place(key)];
        (entry.holders() != NOBODY).then(|| entry.heat())
    }

    /// Changes a block's holders to what `change` makes of them; [`NOBODY`]
    /// takes it out.
    pub(crate) fn change(&mut self, key: u64, now: u8, change: impl FnOnce(HolderId) -> HolderId) {
        let at = self.place(key);
        let before = self.entries[at].holders();
        let holders = change(before);
        if holders == NOBODY {
            if before != NOBODY {
                self.take_out(at);
            }
            return;
        }
        self.entries[at] = Entry::new(key, holders, now);
        if before == NOBODY {
            self.len += 1;
            // Above this share probes grow long faster than memory shrinks.
            if self.len * 100 > self.entries.len() * 72 {
                self.grow();
            }
        }
    }

    fn grow(&mut self) {
        let mut larger = Self::with_capacity(self.entries.len() + self.entries.len() / 4);
        for entry in std::mem::take(&mut self.entries) {
            if entry.holders() != NOBODY {
                let at = larger.place(entry.key());
                larger.entries[at] = entry;
            }
        }
        larger.len = self.len;
        *self = larger;
    }

    /// Takes an entry out and moves those behind it up, so that no probe
    /// meets a hole (Knuth, TAOCP 6.4, algorithm R).
    fn take_out(&mut self, mut hole: usize) {
        self.len -= 1;
        let mut at = hole;
        loop {
            at = self.after(at);
            if self.entries[at].holders() == NOBODY {
                break;
            }
            let home = self.home(self.entries[at].key());
            let stays = if hole <= at {
                hole < home && home <= at
            } else {
                hole < home || home <= at
            };
            if !stays {
                self.entries.swap(hole, at);
                hole = at;
            }
        }
        self.entries[hole] = Entry::default();
    }

    /// The block in a place of the array, if one is there.
    pub(crate) fn at(&self, place: usize) -> Option<(u64, HolderId)> {
        let entry = &self.entries[place];
        let holders = entry.holders();
        (holders != NOBODY).then(|| (entry.key(), holders))
    }
}
