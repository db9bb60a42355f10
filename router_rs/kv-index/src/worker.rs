//! What the index knows of a worker, and what it says of one.

use crate::absence::Seen;
use crate::chain::UNIT_TOKENS;
use thiserror::Error;

/// A worker within the index: a small number, used again after
/// [`crate::KvIndex::remove_worker`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerSlot(pub u32);

impl WorkerSlot {
    pub(crate) fn at(self) -> usize {
        self.0 as usize
    }
}

/// Where a cached block lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Tier {
    /// The device's memory.
    #[default]
    Device,
    /// The host's memory.
    Host,
    /// A disk.
    Disk,
}

/// How the index learns what a worker holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Knowledge {
    /// By the worker's cache events.
    Events,
    /// By what was sent there, until it is older than a time to live or more
    /// than the worker can hold.
    Approximate {
        /// Time to live in milliseconds.
        ttl_ms: u64,
        /// Most units of 16 tokens that the worker is taken to hold.
        max_units: usize,
    },
}

/// One change of a worker's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheChange<'a> {
    /// Blocks can be shared now; one chain value a block, at its end.
    Stored {
        /// The values, in any order.
        chain: &'a [u64],
        /// Where the blocks lie.
        tier: Tier,
    },
    /// As `Stored`, and told where they belong: these lie together then, and
    /// are found faster.
    StoredAfter {
        /// Value of the block before the first. Need not be known.
        parent: u64,
        /// The values, best in a prompt's order.
        chain: &'a [u64],
        /// Where the blocks lie.
        tier: Tier,
    },
    /// Blocks are gone.
    Removed {
        /// The values, in any order.
        chain: &'a [u64],
        /// Where the blocks lay.
        tier: Tier,
    },
    /// All blocks are gone.
    Cleared,
}

/// A worker that the index does not have, or cannot take.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SlotError {
    /// The slot is not in use.
    #[error("no worker in slot {0}")]
    Unknown(u32),
    /// The block size is no multiple of 16 tokens.
    #[error("block size {0} is not a positive multiple of {UNIT_TOKENS} tokens")]
    BlockSize(u32),
    /// Every slot is in use.
    #[error("no more than {0} workers can be indexed")]
    Full(usize),
}

/// What a look-up found, by worker. Reusable: a look-up overwrites it.
///
/// It keeps the table of the index that it was last used with: 12 to 23 bytes a
/// block, which the index and all that are in use share.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Matches {
    /// Tokens by slot; 0 for slots without a worker.
    pub(crate) tokens: Vec<u32>,
    /// Of these, tokens that lie on the host, by slot. Empty where none do.
    pub(crate) host: Vec<u32>,
    /// Of these, tokens that lie on disk, by slot. Empty where none do.
    pub(crate) disk: Vec<u32>,
    /// Workers of one block size that hold all blocks so far; the look-up's own.
    pub(crate) alive: Vec<u64>,
    /// Whether any of `tokens` is not 0.
    pub(crate) any: bool,
    /// The look-up's own.
    pub(crate) seen: Seen,
}

impl Matches {
    pub(crate) fn reset(&mut self, slots: usize) {
        if self.any || self.tokens.len() != slots {
            self.tokens.clear();
            self.tokens.resize(slots, 0);
            self.any = false;
        }
        self.host.clear();
        self.disk.clear();
        self.alive.clear();
    }

    pub(crate) fn reset_tiers(&mut self) {
        self.host.resize(self.tokens.len(), 0);
        self.disk.resize(self.tokens.len(), 0);
    }

    /// Longest prefix that the worker holds without a hole, in tokens: a
    /// multiple of its block size.
    pub fn tokens(&self, worker: WorkerSlot) -> u32 {
        self.tokens.get(worker.at()).copied().unwrap_or(0)
    }

    /// Part of [`Matches::tokens`] whose fastest copy lies on the host.
    pub fn host_tokens(&self, worker: WorkerSlot) -> u32 {
        self.host.get(worker.at()).copied().unwrap_or(0)
    }

    /// Part of [`Matches::tokens`] whose fastest copy lies on disk.
    pub fn disk_tokens(&self, worker: WorkerSlot) -> u32 {
        self.disk.get(worker.at()).copied().unwrap_or(0)
    }

    /// Tokens of all slots, by slot number.
    pub fn by_slot(&self) -> &[u32] {
        &self.tokens
    }

    /// [`Matches::host_tokens`] of all slots, by slot number; empty where there
    /// are none.
    pub fn host_by_slot(&self) -> &[u32] {
        &self.host
    }

    /// [`Matches::disk_tokens`] of all slots, by slot number; empty where there
    /// are none.
    pub fn disk_by_slot(&self) -> &[u32] {
        &self.disk
    }

    /// Workers that hold something, with their tokens.
    pub fn iter(&self) -> impl Iterator<Item = (WorkerSlot, u32)> + '_ {
        let held = self
            .tokens
            .iter()
            .enumerate()
            .filter(|(_, tokens)| **tokens > 0);
        held.map(|(slot, tokens)| (WorkerSlot(slot as u32), *tokens))
    }
}
