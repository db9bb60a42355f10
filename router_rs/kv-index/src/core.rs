//! One copy of the index's content. Changes are deterministic, so two copies
//! that take the same changes stay equal.

use crate::bits::{Bits, members};
use crate::chain::UNIT_TOKENS;
use crate::holders::{HolderId, HolderSets, NOBODY};
use crate::table::{BYTES_A_BLOCK, Table};
use crate::worker::{CacheChange, Matches, Tier};

/// Blocks looked at together when the coldest are sought, and how many of
/// them go.
const SAMPLE: usize = 64;
const VICTIMS: usize = 8;
/// Values whose cache lines are fetched together.
const WARM: usize = 32;

/// Workers of one block size.
#[derive(Debug, Clone)]
struct SizeClass {
    /// Block size in units of 16 tokens.
    units: usize,
    workers: Bits,
}

#[derive(Debug)]
pub(crate) struct Core {
    table: Table,
    sets: HolderSets,
    classes: Vec<SizeClass>,
    /// Block size in units by slot; 0 for a slot without a worker.
    units: Vec<usize>,
    all: Bits,
    /// Tick of the heat clock, and stores until the next one.
    now: u8,
    until_tick: usize,
    /// Where the search for cold blocks goes on.
    hand: usize,
    /// (worker, block, tier) triples.
    entries: u64,
}

impl Core {
    pub(crate) fn new() -> Self {
        Self {
            table: Table::new(),
            sets: HolderSets::new(),
            classes: Vec::new(),
            units: Vec::new(),
            all: Bits::default(),
            now: 0,
            until_tick: SAMPLE,
            hand: 0,
            entries: 0,
        }
    }

    pub(crate) fn add_worker(&mut self, worker: usize, units: usize) {
        if self.units.len() <= worker {
            self.units.resize(worker + 1, 0);
        }
        self.units[worker] = units;
        self.all.set(worker);
        match self.classes.iter_mut().find(|class| class.units == units) {
            Some(class) => class.workers.set(worker),
            None => {
                let mut workers = Bits::default();
                workers.set(worker);
                self.classes.push(SizeClass { units, workers });
            }
        }
    }

    pub(crate) fn remove_worker(&mut self, worker: usize) {
        self.clear(worker);
        self.units[worker] = 0;
        self.all.clear(worker);
        for class in &mut self.classes {
            class.workers.clear(worker);
        }
        self.classes.retain(|class| !class.workers.is_empty());
    }

    pub(crate) fn apply(&mut self, worker: usize, changes: &[CacheChange<'_>]) {
        for change in changes {
            match *change {
                CacheChange::Stored { chain, tier } => {
                    for part in chain.chunks(WARM) {
                        std::hint::black_box(self.table.warm(part));
                        for &value in part {
                            self.store(value, worker, tier);
                        }
                    }
                }
                CacheChange::Removed { chain, tier } => {
                    for part in chain.chunks(WARM) {
                        std::hint::black_box(self.table.warm(part));
                        for &value in part {
                            self.remove(value, worker, tier);
                        }
                    }
                }
                CacheChange::Cleared => self.clear(worker),
            }
        }
    }

    pub(crate) fn store(&mut self, value: u64, worker: usize, tier: Tier) {
        if self.set(value, worker, tier, true) {
            self.entries += 1;
            self.until_tick -= 1;
            if self.until_tick == 0 {
                self.until_tick = (self.table.len() / 32).max(SAMPLE);
                self.now = self.now.wrapping_add(1);
            }
        }
    }

    pub(crate) fn remove(&mut self, value: u64, worker: usize, tier: Tier) {
        if self.set(value, worker, tier, false) {
            self.entries -= 1;
        }
    }

    /// Whether it changed anything.
    fn set(&mut self, value: u64, worker: usize, tier: Tier, present: bool) -> bool {
        let (sets, mut changed) = (&mut self.sets, false);
        self.table.change(value, self.now, |from| {
            if sets.get(from).tiers[tier as usize].has(worker) == present {
                return from;
            }
            let to = sets.changed(from, worker, tier, present);
            changed = to != from;
            if changed {
                sets.move_block(from, to);
            }
            to
        });
        changed
    }

    /// Takes a worker's blocks out: one pass over the table.
    fn clear(&mut self, worker: usize) {
        let mut moved = Vec::new();
        for place in 0..self.table.capacity() {
            if let Some((value, from)) = self.table.at(place)
                && self.sets.any(from).has(worker)
            {
                moved.push((value, from));
            }
        }
        for (value, from) in moved {
            let tiers = self
                .sets
                .get(from)
                .tiers
                .iter()
                .filter(|bits| bits.has(worker))
                .count();
            self.entries -= tiers as u64;
            let to = self.sets.without(from, worker);
            self.sets.move_block(from, to);
            let heat = self.table.heat(value).unwrap_or(self.now);
            self.table.change(value, heat, |_| to);
        }
    }

    /// What a worker holds becomes exactly this.
    pub(crate) fn replace(&mut self, worker: usize, blocks: &[(u64, Tier)]) {
        self.clear(worker);
        for &(value, tier) in blocks {
            self.store(value, worker, tier);
        }
    }

    /// Takes blocks out for all workers.
    pub(crate) fn forget(&mut self, values: &[u64]) {
        for &value in values {
            let from = self.table.holders(value);
            if from != NOBODY {
                self.entries -= self.holdings(from);
                self.sets.move_block(from, NOBODY);
                self.table.change(value, self.now, |_| NOBODY);
            }
        }
    }

    fn holdings(&self, id: HolderId) -> u64 {
        self.sets.get(id).tiers.iter().map(Bits::count).sum()
    }

    /// The next blocks that should go: the longest not asked for among some.
    /// `other` is the second copy, whose heat counts too.
    pub(crate) fn coldest(&mut self, other: Option<&Core>) -> Vec<u64> {
        let mut seen = Vec::with_capacity(SAMPLE);
        for _ in 0..self.table.capacity() {
            self.hand = if self.hand + 1 >= self.table.capacity() {
                0
            } else {
                self.hand + 1
            };
            if let Some((value, _)) = self.table.at(self.hand) {
                let age = |core: &Core| {
                    core.table
                        .heat(value)
                        .map(|heat| core.now.wrapping_sub(heat))
                };
                let here = age(self).unwrap_or(u8::MAX);
                let there = other.and_then(age).unwrap_or(u8::MAX);
                seen.push((here.min(there), value));
                if seen.len() == SAMPLE {
                    break;
                }
            }
        }
        seen.sort_unstable_by(|a, b| b.cmp(a));
        seen.truncate(VICTIMS);
        seen.into_iter().map(|(_, value)| value).collect()
    }

    pub(crate) fn lookup(&self, chain: &[u64], found: &mut Matches) {
        found.reset(self.units.len(), &self.all);
        let step = self
            .classes
            .iter()
            .fold(0, |step, class| gcd(step, class.units));
        if step == 0 {
            return;
        }
        let mut last = None;
        // Most prompts match nothing or much: the first few values tell.
        let (mut warm, mut warmed) = (4, 0);
        for at in (step..=chain.len()).step_by(step) {
            if at > warmed {
                let end = chain.len().min(at + warm * step);
                std::hint::black_box(self.table.warm(&chain[at - 1..end]));
                (warm, warmed) = ((warm * 2).min(WARM), end);
            }
            let holders = self.table.touch(chain[at - 1], self.now);
            // The same holders over the same workers change nothing.
            if self.classes.len() == 1 {
                if last == Some(holders) {
                    continue;
                }
                last = Some(holders);
            }
            for class in self.classes.iter().filter(|class| at % class.units == 0) {
                let held = at - class.units;
                self.narrow(class, holders, held, found);
            }
            if found.alive.iter().all(|word| *word == 0) {
                break;
            }
        }
        for class in &self.classes {
            let held = chain.len() / class.units * class.units;
            self.narrow(class, NOBODY, held, found);
        }
        if self.sets.tiered() {
            self.split_tiers(chain, found);
        }
    }

    /// Workers of a class that do not hold this block end with what they had.
    fn narrow(&self, class: &SizeClass, holders: HolderId, held: usize, found: &mut Matches) {
        let holders = self.sets.any(holders);
        for i in 0..class.workers.words() {
            let leaving = found.alive[i] & class.workers.word(i) & !holders.word(i);
            if leaving != 0 {
                found.alive[i] &= !leaving;
                let tokens = u32::try_from(held * UNIT_TOKENS).unwrap_or(u32::MAX);
                for worker in members(i, leaving) {
                    found.tokens[worker] = tokens;
                }
            }
        }
    }

    /// Tells how much of each match lies below the device.
    fn split_tiers(&self, chain: &[u64], found: &mut Matches) {
        found.host.resize(found.tokens.len(), 0);
        found.disk.resize(found.tokens.len(), 0);
        let longest = found.tokens.iter().copied().max().unwrap_or(0) as usize / UNIT_TOKENS;
        for (at, &value) in chain.iter().enumerate().take(longest) {
            let [device, host, disk] = &self.sets.get(self.table.holders(value)).tiers;
            for i in 0..host.words().max(disk.words()) {
                let below = (host.word(i) | disk.word(i)) & !device.word(i);
                for worker in members(i, below) {
                    let units = self.units.get(worker).copied().unwrap_or(0);
                    let end = at + 1;
                    if units == 0
                        || end % units != 0
                        || end * UNIT_TOKENS > found.tokens[worker] as usize
                    {
                        continue;
                    }
                    let block = (units * UNIT_TOKENS) as u32;
                    let tier = if host.has(worker) {
                        &mut found.host
                    } else {
                        &mut found.disk
                    };
                    tier[worker] += block;
                }
            }
        }
    }

    /// Bytes that content of this size takes at most, for the bound.
    pub(crate) fn charge(&self) -> usize {
        self.table.len() * BYTES_A_BLOCK + self.sets.heap()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.bytes() + self.sets.bytes()
    }

    pub(crate) fn blocks(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    pub(crate) fn held(&self, worker: usize) -> u64 {
        self.sets.held(worker)
    }

    pub(crate) fn holder_sets(&self) -> usize {
        self.sets.len()
    }
}

fn gcd(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
