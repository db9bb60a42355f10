//! Cache events of engines that name blocks by hashes of their own.
//!
//! Such an engine tells the token ids with each block. From these and the
//! parent's own value come the block's own values (its adapter and salt are in
//! the root); a bounded map from foreign hash to own value and tiers serves
//! parents and removals. Nothing is guessed: a block whose parent is unknown is
//! dropped and counted.

use crate::chain::{UNIT_TOKENS, chain_values_into};
use crate::worker::Tier;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, DefaultHasher};
use thiserror::Error;

/// Blocks that a foreign engine stored, each the child of the one before.
#[derive(Debug, Clone, Copy)]
pub struct ForeignBlocks<'a> {
    /// The engine's hash of the block before the first; `None` for a prompt's
    /// first block.
    pub parent: Option<u64>,
    /// The engine's hashes, one a block.
    pub hashes: &'a [u64],
    /// Token ids of all blocks, one after the other.
    pub ids: &'a [u32],
    /// Tokens a block.
    pub block_tokens: usize,
    /// Attention group of engines that have several.
    pub group: u32,
    /// Where they were stored.
    pub tier: Tier,
    /// Whether the engine hashed something that is neither token id, adapter
    /// nor salt: an image, say.
    pub extra_keys: bool,
}

/// Why blocks were not taken. Each is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Dropped {
    /// The parent is not known: its event was lost or dropped, or it is so old
    /// that it was forgotten.
    #[error("the parent block is not known")]
    UnknownParent,
    /// They belong to another attention group than the one that is followed.
    #[error("another attention group")]
    Group,
    /// Their hashes stand for more than tokens, adapter and salt.
    #[error("extra keys that are not known")]
    ExtraKeys,
    /// The block size is no multiple of 16 tokens, or there are not so many ids.
    #[error("blocks of {block_tokens} tokens with {ids} ids for {blocks} blocks")]
    Shape {
        /// Tokens a block, as told.
        block_tokens: usize,
        /// Token ids.
        ids: usize,
        /// Hashes.
        blocks: usize,
    },
}

/// Blocks under their own names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnBlocks {
    /// Value before the first.
    pub parent: u64,
    /// Values, one a block: [`crate::CacheChange::StoredAfter`].
    pub chain: Vec<u64>,
    /// Values whose foreign names were forgotten to make room, or given to
    /// another block, with each tier that they were in. They can no longer be
    /// removed by name, so they are to be removed now.
    pub forgotten: Vec<(u64, Tier)>,
}

/// What a sequence number says of the events before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// It is the next one.
    Next,
    /// It was heard before: its event is to be ignored.
    Again,
    /// Events from this number on are missing. They are to be replayed, or else
    /// everything is to be cleared and a snapshot taken; till then this one is
    /// not to be applied.
    Missed(u64),
}

/// Counts of a foreign engine's events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ForeignStats {
    /// Names in the map.
    pub names: usize,
    /// Bytes of the map.
    pub bytes: usize,
    /// Blocks dropped since their parent was not known.
    pub unknown_parent: u64,
    /// Blocks dropped for another reason.
    pub ignored: u64,
    /// Gaps in the sequence of events.
    pub gaps: u64,
}

/// What a foreign hash stands for.
#[derive(Debug, Clone, Copy)]
struct Name {
    value: u64,
    /// When it was last stored.
    at: u64,
    /// Tiers that have the block, a bit each.
    tiers: u8,
}

impl Name {
    /// The value with each tier that has it.
    fn everywhere(self) -> impl Iterator<Item = (u64, Tier)> {
        let tiers = [Tier::Device, Tier::Host, Tier::Disk].into_iter();
        let tiers = tiers.filter(move |tier| self.tiers & bit(*tier) != 0);
        tiers.map(move |tier| (self.value, tier))
    }
}

fn bit(tier: Tier) -> u8 {
    1 << tier as u8
}

/// Translator of one engine's events.
#[derive(Debug)]
pub struct Foreign {
    /// Most names in the map.
    most: usize,
    /// Attention group that is followed.
    group: u32,
    /// By foreign hash.
    names: HashMap<u64, Name, BuildHasherDefault<DefaultHasher>>,
    /// (foreign hash, when), oldest first; one stored again stays here until
    /// its turn.
    order: VecDeque<(u64, u64)>,
    clock: u64,
    expected: Option<u64>,
    stats: ForeignStats,
}

impl Foreign {
    /// A translator that keeps at most so many names (some 60 bytes each; as
    /// many as the engine has blocks is right) and follows one attention group.
    pub fn new(most: usize, group: u32) -> Self {
        Self {
            most,
            group,
            names: HashMap::default(),
            order: VecDeque::new(),
            clock: 0,
            expected: None,
            stats: ForeignStats::default(),
        }
    }

    /// What an event's sequence number says. After [`Heard::Next`] the event is
    /// to be applied.
    pub fn hear(&mut self, sequence: u64) -> Heard {
        match self.expected {
            Some(expected) if sequence < expected => Heard::Again,
            Some(expected) if sequence > expected => {
                self.stats.gaps += 1;
                Heard::Missed(expected)
            }
            _ => {
                self.expected = sequence.checked_add(1);
                Heard::Next
            }
        }
    }

    /// Own names of stored blocks. `root` is that of the block's namespace,
    /// [`crate::namespace_root`] with its adapter and salt.
    ///
    /// # Errors
    /// [`Dropped`], which is counted; nothing is changed then.
    pub fn stored(&mut self, root: u64, blocks: &ForeignBlocks<'_>) -> Result<OwnBlocks, Dropped> {
        let named = self.name(root, blocks);
        match &named {
            Err(Dropped::UnknownParent) => self.stats.unknown_parent += blocks.hashes.len() as u64,
            Err(_) => self.stats.ignored += blocks.hashes.len() as u64,
            Ok(_) => {}
        }
        named
    }

    fn name(&mut self, root: u64, blocks: &ForeignBlocks<'_>) -> Result<OwnBlocks, Dropped> {
        let (size, count) = (blocks.block_tokens, blocks.hashes.len());
        if blocks.group != self.group {
            return Err(Dropped::Group);
        }
        if blocks.extra_keys {
            return Err(Dropped::ExtraKeys);
        }
        if size == 0
            || !size.is_multiple_of(UNIT_TOKENS)
            || size.checked_mul(count) != Some(blocks.ids.len())
        {
            return Err(Dropped::Shape {
                block_tokens: size,
                ids: blocks.ids.len(),
                blocks: count,
            });
        }
        let parent = match blocks.parent {
            None => root,
            Some(hash) => self.names.get(&hash).ok_or(Dropped::UnknownParent)?.value,
        };
        let units = size / UNIT_TOKENS;
        let mut values = Vec::with_capacity(count * units);
        chain_values_into(parent, blocks.ids, &mut values);
        let ends = values.iter().skip(units - 1).step_by(units);
        let chain: Vec<u64> = ends.copied().collect();
        let mut forgotten = Vec::new();
        for (hash, value) in blocks.hashes.iter().zip(&chain) {
            self.clock += 1;
            let mut tiers = bit(blocks.tier);
            if let Some(before) = self.names.get(hash) {
                if before.value == *value {
                    tiers |= before.tiers;
                } else {
                    // Nobody could remove that one any more.
                    forgotten.extend(before.everywhere());
                }
            }
            let (value, at) = (*value, self.clock);
            self.names.insert(*hash, Name { value, at, tiers });
            self.order.push_back((*hash, at));
        }
        self.forget(chain.len(), &mut forgotten);
        Ok(OwnBlocks {
            parent,
            forgotten,
            chain,
        })
    }

    /// Forgets the oldest names above the bound, of which `fresh` were just made.
    fn forget(&mut self, fresh: usize, forgotten: &mut Vec<(u64, Tier)>) {
        while self.names.len() > self.most || self.order.len() > 2 * self.most.max(fresh) {
            let Some((hash, when)) = self.order.pop_front() else {
                break;
            };
            if self.names.get(&hash).is_some_and(|name| name.at == when)
                && let Some(name) = self.names.remove(&hash)
            {
                forgotten.extend(name.everywhere());
            }
        }
    }

    /// Own names of blocks that are gone from a tier; those have none that were
    /// not known to be there, and all of a group that is not followed: the
    /// followed one may still have the block, under the same hash. A name goes
    /// with the last tier that has its block.
    pub fn removed(&mut self, group: u32, tier: Tier, hashes: &[u64]) -> Vec<u64> {
        if group != self.group {
            return Vec::new();
        }
        let mut gone = Vec::new();
        for hash in hashes {
            let Some(name) = self.names.get_mut(hash) else {
                continue;
            };
            if name.tiers & bit(tier) != 0 {
                gone.push(name.value);
                name.tiers &= !bit(tier);
            }
            if name.tiers == 0 {
                self.names.remove(hash);
            }
        }
        gone
    }

    /// All blocks are gone, or a snapshot begins after a gap: `next` is the
    /// number of the next event, where that is known.
    pub fn cleared(&mut self, next: Option<u64>) {
        self.names.clear();
        self.order.clear();
        self.expected = next.or(self.expected);
    }

    /// Counts so far.
    pub fn stats(&self) -> ForeignStats {
        ForeignStats {
            names: self.names.len(),
            bytes: self.names.capacity() * (size_of::<(u64, Name)>() + 1)
                + self.order.capacity() * size_of::<(u64, u64)>(),
            ..self.stats
        }
    }
}
