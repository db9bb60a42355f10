//! The map from chain value to the number of its holders' set.
//!
//! Open addressing with linear probing in an array of 12-byte entries, grown
//! by a quarter: some 20 bytes a block. Chain values are hashes already; one
//! multiplication spreads those that are not. Look-ups of a prompt's values
//! do not depend on each other, so the processor overlaps their cache misses.

use crate::holders::{HolderId, NOBODY};
use std::sync::atomic::{AtomicU8, Ordering};

/// Spreads keys over the array (2^64 / golden ratio).
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;
const SMALLEST: usize = 64;

/// Bytes a block costs in a table that has just grown, heat included.
pub(crate) const BYTES_A_BLOCK: usize = 20;

/// Free where `holders` is [`NOBODY`]. The key is in two halves so that an
/// entry needs no padding.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    low: u32,
    high: u32,
    holders: HolderId,
}

impl Entry {
    fn key(self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }
}

#[derive(Debug)]
pub(crate) struct Table {
    entries: Vec<Entry>,
    /// When an entry was last asked for or stored, in the index's ticks.
    /// Look-ups write it under a shared lock; a lost race costs a tick.
    heat: Vec<AtomicU8>,
    len: usize,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self::with_capacity(SMALLEST)
    }

    fn with_capacity(capacity: usize) -> Self {
        let mut heat = Vec::new();
        heat.resize_with(capacity, AtomicU8::default);
        Self {
            entries: vec![Entry::default(); capacity],
            heat,
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn capacity(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>() + self.heat.capacity()
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
            let entry = self.entries[at];
            if entry.holders == NOBODY || (entry.low == low && entry.high == high) {
                return at;
            }
            at = self.after(at);
        }
    }

    /// Reads the home places of some keys, so that their cache lines are on
    /// the way together: probing ends in branches that wait for memory one
    /// after the other. Returns nothing of meaning.
    pub(crate) fn warm(&self, keys: &[u64]) -> u32 {
        keys.iter().fold(0, |sum, key| {
            let home = self.home(*key);
            sum ^ self.entries[home].low ^ u32::from(self.heat[home].load(Ordering::Relaxed))
        })
    }

    /// Holders of a block; [`NOBODY`] for an unknown one.
    pub(crate) fn holders(&self, key: u64) -> HolderId {
        self.entries[self.place(key)].holders
    }

    /// As [`Table::holders`], and the block counts as asked for now.
    pub(crate) fn touch(&self, key: u64, now: u8) -> HolderId {
        let at = self.place(key);
        let holders = self.entries[at].holders;
        if holders != NOBODY && self.heat[at].load(Ordering::Relaxed) != now {
            self.heat[at].store(now, Ordering::Relaxed);
        }
        holders
    }

    /// When a block was last asked for.
    pub(crate) fn heat(&self, key: u64) -> Option<u8> {
        let at = self.place(key);
        (self.entries[at].holders != NOBODY).then(|| self.heat[at].load(Ordering::Relaxed))
    }

    /// Sets a block's holders; [`NOBODY`] takes it out.
    pub(crate) fn set(&mut self, key: u64, holders: HolderId, now: u8) {
        let at = self.place(key);
        if holders == NOBODY {
            if self.entries[at].holders != NOBODY {
                self.take_out(at);
            }
            return;
        }
        let new = self.entries[at].holders == NOBODY;
        self.entries[at] = Entry {
            low: key as u32,
            high: (key >> 32) as u32,
            holders,
        };
        self.heat[at] = AtomicU8::new(now);
        if new {
            self.len += 1;
            if self.len * 20 > self.entries.len() * 17 {
                self.grow();
            }
        }
    }

    fn grow(&mut self) {
        let mut larger = Self::with_capacity(self.entries.len() + self.entries.len() / 4);
        for (entry, heat) in self.entries.iter().zip(&self.heat) {
            if entry.holders != NOBODY {
                let at = larger.place(entry.key());
                larger.entries[at] = *entry;
                larger.heat[at] = AtomicU8::new(heat.load(Ordering::Relaxed));
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
            let entry = self.entries[at];
            if entry.holders == NOBODY {
                break;
            }
            let home = self.home(entry.key());
            let stays = if hole <= at {
                hole < home && home <= at
            } else {
                hole < home || home <= at
            };
            if !stays {
                self.entries[hole] = entry;
                self.heat[hole] = AtomicU8::new(self.heat[at].load(Ordering::Relaxed));
                hole = at;
            }
        }
        self.entries[hole] = Entry::default();
    }

    /// The block in a place of the array, if one is there.
    pub(crate) fn at(&self, place: usize) -> Option<(u64, HolderId)> {
        let entry = self.entries[place];
        (entry.holders != NOBODY).then(|| (entry.key(), entry.holders))
    }
}
