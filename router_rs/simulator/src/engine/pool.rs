//! A KV pool: blocks that can be shared, least recently used last; and room
//! that belongs to one sequence.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

const NONE: u32 = u32::MAX;

/// Names of blocks are spread already.
#[derive(Debug, Clone, Default)]
pub(crate) struct NameHasher(u64);

impl Hasher for NameHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

#[derive(Debug, Clone)]
struct Block {
    name: u64,
    users: u32,
    /// Neighbours among the blocks that nobody uses.
    older: u32,
    newer: u32,
}

/// A worker's KV room, in units of 16 tokens.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    total: u64,
    block_units: u64,
    /// Units of sequences alone.
    own: u64,
    names: HashMap<u64, u32, BuildHasherDefault<NameHasher>>,
    blocks: Vec<Block>,
    vacant: Vec<u32>,
    oldest: u32,
    newest: u32,
    unused: u64,
    /// (stored, name).
    events: Vec<(bool, u64)>,
}

impl Pool {
    /// An empty one; a block is so many units.
    pub(crate) fn new(total: u64, block_units: u64) -> Self {
        Self {
            total,
            block_units: block_units.max(1),
            own: 0,
            names: HashMap::default(),
            blocks: Vec::new(),
            vacant: Vec::new(),
            oldest: NONE,
            newest: NONE,
            unused: 0,
            events: Vec::new(),
        }
    }

    /// Units of a block.
    pub(crate) fn block_units(&self) -> u64 {
        self.block_units
    }

    /// Units in all.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Units that hold nothing.
    pub(crate) fn free_units(&self) -> u64 {
        self.total - self.own - self.names.len() as u64 * self.block_units
    }

    /// Units of cached blocks that nobody uses.
    pub(crate) fn evictable(&self) -> u64 {
        self.unused * self.block_units
    }

    /// Units in use.
    pub(crate) fn running(&self) -> u64 {
        self.total - self.free_units() - self.evictable()
    }

    /// Units that can be had.
    pub(crate) fn available(&self) -> u64 {
        self.free_units() + self.evictable()
    }

    /// How many of the blocks are cached, from the first on.
    pub(crate) fn find(&self, blocks: &[u64]) -> usize {
        blocks
            .iter()
            .take_while(|name| self.names.contains_key(name))
            .count()
    }

    /// Uses cached blocks.
    pub(crate) fn take(&mut self, blocks: &[u64]) {
        for name in blocks {
            if let Some(at) = self.names.get(name).copied() {
                self.use_block(at);
            }
        }
    }

    fn use_block(&mut self, at: u32) {
        if self.blocks[at as usize].users == 0 {
            self.unlink(at);
        }
        self.blocks[at as usize].users += 1;
    }

    /// Does not use blocks any more. They stay as cache, the last of a prompt
    /// to go first.
    pub(crate) fn release(&mut self, blocks: &[u64]) {
        for name in blocks.iter().rev() {
            let Some(at) = self.names.get(name).copied() else {
                continue;
            };
            let block = &mut self.blocks[at as usize];
            block.users -= 1;
            if block.users == 0 {
                self.link(at);
            }
        }
    }

    /// Takes units for a sequence alone; evicts what was longest not used.
    /// False where there is no such room, and nothing changes.
    #[must_use]
    pub(crate) fn allocate(&mut self, units: u64) -> bool {
        if units > self.available() {
            return false;
        }
        while units > self.free_units() {
            self.evict();
        }
        self.own += units;
        true
    }

    /// Gives units of a sequence back.
    pub(crate) fn free(&mut self, units: u64) {
        self.own -= units;
    }

    /// A block of a sequence's own units is full: it is shared from now on,
    /// and in use. Where another one made the same block before, that one is
    /// used and the own units are given back.
    pub(crate) fn store(&mut self, name: u64) {
        self.own -= self.block_units;
        if let Some(at) = self.names.get(&name).copied() {
            self.use_block(at);
        } else {
            self.insert(name, 1);
        }
    }

    /// Takes blocks in as cache that came from elsewhere, as far as there is
    /// room.
    pub(crate) fn adopt(&mut self, blocks: &[u64]) {
        for (at, name) in blocks.iter().enumerate() {
            if self.names.contains_key(name) {
                continue;
            }
            // What came just now must not make room for what comes next.
            self.take(&blocks[..at]);
            let room = self.allocate(self.block_units);
            self.release(&blocks[..at]);
            if !room {
                return;
            }
            self.own -= self.block_units;
            let at = self.insert(*name, 0);
            self.link(at);
        }
    }

    /// What came into the cache and what went, since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<(bool, u64)> {
        std::mem::take(&mut self.events)
    }

    fn insert(&mut self, name: u64, users: u32) -> u32 {
        let block = Block {
            name,
            users,
            older: NONE,
            newer: NONE,
        };
        let at = match self.vacant.pop() {
            Some(at) => {
                self.blocks[at as usize] = block;
                at
            }
            None => {
                self.blocks.push(block);
                self.blocks.len() as u32 - 1
            }
        };
        self.names.insert(name, at);
        self.events.push((true, name));
        at
    }

    fn evict(&mut self) {
        let at = self.oldest;
        self.unlink(at);
        let name = self.blocks[at as usize].name;
        self.names.remove(&name);
        self.vacant.push(at);
        self.events.push((false, name));
    }

    fn link(&mut self, at: u32) {
        let last = self.newest;
        let block = &mut self.blocks[at as usize];
        block.older = last;
        block.newer = NONE;
        if last == NONE {
            self.oldest = at;
        } else {
            self.blocks[last as usize].newer = at;
        }
        self.newest = at;
        self.unused += 1;
    }

    fn unlink(&mut self, at: u32) {
        let Block { older, newer, .. } = self.blocks[at as usize];
        if older == NONE {
            self.oldest = newer;
        } else {
            self.blocks[older as usize].newer = newer;
        }
        if newer == NONE {
            self.newest = older;
        } else {
            self.blocks[newer as usize].older = older;
        }
        self.unused -= 1;
    }
}
