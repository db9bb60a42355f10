//! Who holds a block: sets of (worker, tier), each kept once.
//!
//! Neighbouring blocks nearly always have the same holders, so a run names a
//! set by number for many of them and a look-up combines sets only where the
//! number changes. Sets are counted and go when the last block leaves them.

use crate::bits::Bits;
use crate::worker::Tier;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};

/// Number of a set. 0 is the empty one.
pub(crate) type HolderId = u32;

/// Nobody.
pub(crate) const NOBODY: HolderId = 0;

/// Changes that are remembered.
const MEMOS: usize = 64;

/// Sets at a time.
const MOST_SETS: usize = 1 << 24;

/// Who holds a block, by tier.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Holders {
    pub(crate) tiers: [Bits; 3],
}

impl Holders {
    fn any(&self) -> Bits {
        let [device, host, disk] = &self.tiers;
        device.union(host).union(disk)
    }

    fn is_tiered(&self) -> bool {
        !self.tiers[1].is_empty() || !self.tiers[2].is_empty()
    }
}

/// A change of a set and the set that it makes.
#[derive(Debug, Clone, Copy)]
struct Memo {
    from: HolderId,
    worker: usize,
    tier: Tier,
    present: bool,
    to: HolderId,
}

#[derive(Debug, Default)]
struct Kept {
    holders: Holders,
    any: Bits,
    blocks: u64,
}

impl Kept {
    /// Bytes of a set: here, as a key, and its words.
    fn bytes(&self) -> usize {
        let words: usize = self.holders.tiers.iter().map(Bits::words).sum();
        size_of::<Self>() + size_of::<(Holders, HolderId)>() + 8 * (2 * words + self.any.words())
    }
}

/// All sets in use.
#[derive(Debug)]
pub(crate) struct HolderSets {
    sets: Vec<Kept>,
    /// Without random keys: equal histories take equal time.
    numbers: HashMap<Holders, HolderId, BuildHasherDefault<DefaultHasher>>,
    unused: Vec<HolderId>,
    /// Last changes made, by worker: neighbours change alike.
    memo: [Option<Memo>; MEMOS],
    /// Bytes that the sets in use take.
    heap: usize,
    /// Sets with holders below the device.
    tiered: usize,
}

impl HolderSets {
    pub(crate) fn new() -> Self {
        Self {
            sets: vec![Kept::default()],
            numbers: HashMap::default(),
            unused: Vec::new(),
            memo: [None; MEMOS],
            heap: 0,
            tiered: 0,
        }
    }

    /// Workers that hold it in any tier.
    pub(crate) fn any(&self, id: HolderId) -> &Bits {
        &self.sets[id as usize].any
    }

    pub(crate) fn get(&self, id: HolderId) -> &Holders {
        &self.sets[id as usize].holders
    }

    /// Blocks that a worker holds in any tier: one pass over the sets.
    pub(crate) fn held(&self, worker: usize) -> u64 {
        let of_worker = self.sets.iter().filter(|kept| kept.any.has(worker));
        of_worker.map(|kept| kept.blocks).sum()
    }

    /// The set with one (worker, tier) added or taken out. The caller moves
    /// its blocks there by [`HolderSets::move_blocks`] before it asks again.
    /// Where numbers run out, a block gets no new holder: that costs a hit,
    /// never more.
    pub(crate) fn changed(
        &mut self,
        id: HolderId,
        worker: usize,
        tier: Tier,
        present: bool,
    ) -> HolderId {
        if let Some(memo) = self.memo[worker % MEMOS]
            && (memo.from, memo.worker, memo.tier, memo.present) == (id, worker, tier, present)
        {
            return memo.to;
        }
        if present && self.unused.is_empty() && self.sets.len() >= MOST_SETS {
            return id;
        }
        let mut holders = self.sets[id as usize].holders.clone();
        let bits = &mut holders.tiers[tier as usize];
        if present {
            bits.set(worker)
        } else {
            bits.clear(worker)
        }
        let to = self.number(holders);
        self.memo[worker % MEMOS] = Some(Memo {
            from: id,
            worker,
            tier,
            present,
            to,
        });
        to
    }

    /// The set without a worker, whatever the tier.
    pub(crate) fn without(&mut self, id: HolderId, worker: usize) -> HolderId {
        let mut holders = self.sets[id as usize].holders.clone();
        for bits in &mut holders.tiers {
            bits.clear(worker);
        }
        self.number(holders)
    }

    fn number(&mut self, holders: Holders) -> HolderId {
        if holders.tiers.iter().all(Bits::is_empty) {
            return NOBODY;
        }
        if let Some(&id) = self.numbers.get(&holders) {
            return id;
        }
        let kept = Kept {
            any: holders.any(),
            holders: holders.clone(),
            blocks: 0,
        };
        self.heap += kept.bytes();
        self.tiered += usize::from(kept.holders.is_tiered());
        let id = match self.unused.pop() {
            Some(id) => {
                self.sets[id as usize] = kept;
                id
            }
            None => {
                self.sets.push(kept);
                (self.sets.len() - 1) as HolderId
            }
        };
        self.numbers.insert(holders, id);
        id
    }

    /// Blocks go from one set to another.
    pub(crate) fn move_blocks(&mut self, from: HolderId, to: HolderId, count: usize) {
        if to != NOBODY {
            self.sets[to as usize].blocks += count as u64;
        }
        if from != NOBODY {
            let kept = &mut self.sets[from as usize];
            kept.blocks -= count as u64;
            if kept.blocks == 0 {
                let kept = std::mem::take(kept);
                self.heap -= kept.bytes();
                self.tiered -= usize::from(kept.holders.is_tiered());
                self.numbers.remove(&kept.holders);
                self.unused.push(from);
                for memo in &mut self.memo {
                    if memo.is_some_and(|memo| memo.from == from || memo.to == from) {
                        *memo = None;
                    }
                }
            }
        }
    }

    /// Bytes that the sets in use take, about.
    pub(crate) fn heap(&self) -> usize {
        self.heap
    }

    /// Whether any block lies below the device.
    pub(crate) fn tiered(&self) -> bool {
        self.tiered > 0
    }

    pub(crate) fn len(&self) -> usize {
        self.numbers.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        let each = size_of::<Kept>();
        let words: usize = self
            .sets
            .iter()
            .map(|kept| {
                kept.any.heap_bytes()
                    + 2 * kept
                        .holders
                        .tiers
                        .iter()
                        .map(Bits::heap_bytes)
                        .sum::<usize>()
            })
            .sum();
        self.sets.capacity() * each
            + words
            + self.numbers.capacity() * (size_of::<(Holders, HolderId)>() + 1)
            + self.unused.capacity() * 4
    }
}
