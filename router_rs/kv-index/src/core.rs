//! One copy of the index's content. Changes are deterministic, so two copies
//! that take the same changes stay equal.

use crate::bits::Bits;
use crate::holders::{HolderId, HolderSets, NOBODY};
use crate::left_right::Pass;
use crate::run::{Dead, Run, SEGMENT};
use crate::table::{BYTES_A_BLOCK, MOST_RUNS, MOST_SLOTS, Place, Table};
use crate::worker::{CacheChange, Tier};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Runs looked at together when the coldest are sought, and how many of them
/// lose their last segment.
const SAMPLE: usize = 64;
const VICTIMS: usize = 8;
/// Values whose cache lines are fetched together.
const WARM: usize = 32;

/// Workers of one block size.
#[derive(Debug, Clone)]
pub(crate) struct SizeClass {
    /// Block size in units of 16 tokens.
    pub(crate) units: usize,
    pub(crate) workers: Bits,
}

/// The end of a run from a slot on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tail {
    run: usize,
    slot: usize,
}

#[derive(Debug)]
pub(crate) struct Core {
    /// Where values are, here and in the other copy.
    table: Arc<Table>,
    /// The table that the copy changed last has.
    newest: Arc<Mutex<Arc<Table>>>,
    /// Whether this copy is the first or the second one to take a change.
    pass: Pass,
    /// By number; 0 and those in `free` are empty.
    pub(crate) runs: Vec<Run>,
    free: Vec<u32>,
    pub(crate) sets: HolderSets,
    pub(crate) classes: Vec<SizeClass>,
    /// Block size in units by slot; 0 for a slot without a worker.
    units: Vec<usize>,
    all: Bits,
    /// Tick of the heat clock, and blocks stored until the next one.
    pub(crate) now: u8,
    until_tick: usize,
    /// Distinct blocks that somebody holds.
    blocks: usize,
    /// (worker, block, tier) triples.
    entries: u64,
    /// Bytes behind the runs.
    heap: usize,
}

impl Core {
    /// Two empty copies.
    pub(crate) fn pair() -> [Self; 2] {
        let table = Arc::new(Table::new());
        let newest = Arc::new(Mutex::new(table.clone()));
        [(); 2].map(|()| Self::new(table.clone(), newest.clone()))
    }

    fn new(table: Arc<Table>, newest: Arc<Mutex<Arc<Table>>>) -> Self {
        Self {
            table,
            newest,
            pass: Pass::First,
            runs: vec![Run::default()],
            free: Vec::new(),
            sets: HolderSets::new(),
            classes: Vec::new(),
            units: Vec::new(),
            all: Bits::default(),
            now: 0,
            until_tick: SEGMENT,
            blocks: 0,
            entries: 0,
            heap: 0,
        }
    }

    /// To be called before each change.
    pub(crate) fn begin(&mut self, pass: Pass) {
        self.pass = pass;
        let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&newest, &self.table) {
            self.table = newest.clone();
        }
    }

    /// To be called after each change.
    pub(crate) fn end(&mut self) {
        if self.pass == Pass::Second && self.table.is_sparse() {
            self.resize();
        }
    }

    fn resize(&mut self) {
        self.table = Arc::new(self.table.resized());
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        *newest = self.table.clone();
    }

    /// The first copy that has a value notes where it is.
    fn note(&mut self, value: u64, place: Place) {
        if self.pass == Pass::First && !self.table.insert(value, place) {
            self.resize();
            // There is room now.
            let _ = self.table.insert(value, place);
        }
    }

    /// The last copy that has a value takes the note out.
    fn strike(&mut self, value: u64, place: Place) {
        if self.pass == Pass::Second {
            self.table.remove(value, place);
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
                CacheChange::Stored { chain, tier } => self.store(worker, tier, None, chain),
                CacheChange::StoredAfter {
                    parent,
                    chain,
                    tier,
                } => self.store(worker, tier, Some(parent), chain),
                CacheChange::Removed { chain, tier } => self.remove(worker, tier, chain),
                CacheChange::Cleared => self.clear(worker),
            }
        }
    }

    /// Where a value is that somebody holds.
    pub(crate) fn find(&self, value: u64) -> Option<Place> {
        self.table.find(value, |place| {
            self.runs
                .get(place.run)
                .is_some_and(|run| run.holds(place.slot, value))
        })
    }

    fn store(&mut self, worker: usize, tier: Tier, parent: Option<u64>, chain: &[u64]) {
        let after = |place: Place| Place {
            slot: place.slot + 1,
            ..place
        };
        let mut next = parent.and_then(|parent| self.find(parent)).map(after);
        let mut at = 0;
        while let Some(&value) = chain.get(at) {
            let here =
                next.filter(|place| self.runs[place.run].held_upward(place.slot, &[value]) == 1);
            let Some(place) = here.or_else(|| self.find(value)) else {
                let Some((place, count)) = self.store_new(worker, tier, next, &chain[at..]) else {
                    return;
                };
                at += count;
                next = Some(place);
                continue;
            };
            let count = self.runs[place.run].held_upward(place.slot, &chain[at..]);
            let slots = place.slot..place.slot + count;
            self.runs[place.run].touch(slots.clone(), self.now);
            next = Some(Place {
                slot: slots.end,
                ..place
            });
            let mut added = 0;
            self.recolour(place.run, slots, |sets, from, count| {
                if sets.get(from).tiers[tier as usize].has(worker) {
                    return from;
                }
                let to = sets.changed(from, worker, tier, true);
                added += if to == from { 0 } else { count };
                to
            });
            self.entries += added as u64;
            at += count;
        }
    }

    /// Stores values of which nobody holds the first, up to one that somebody
    /// does: at `next` where that is the end of a run with room, else in a run
    /// of their own. Where they end, and how many there were; `None` where
    /// numbers have run out, which costs hits, never more.
    fn store_new(
        &mut self,
        worker: usize,
        tier: Tier,
        next: Option<Place>,
        chain: &[u64],
    ) -> Option<(Place, usize)> {
        let room =
            |place: &Place| place.slot == self.runs[place.run].len() && place.slot < MOST_SLOTS;
        let place = match next.filter(room) {
            Some(place) => place,
            None => Place {
                run: self.number()?,
                slot: 0,
            },
        };
        let holders = self.sets.changed(NOBODY, worker, tier, true);
        if holders == NOBODY {
            self.tidy(place.run);
            return None;
        }
        let most = chain.len().min(MOST_SLOTS - place.slot);
        self.heap -= self.runs[place.run].heap();
        self.runs[place.run].reserve(most);
        let mut count = 0;
        while count < most {
            if count.is_multiple_of(WARM) {
                let end = most.min(count + WARM);
                std::hint::black_box(self.table.warm(&chain[count..end]));
            }
            if count > 0 && self.find(chain[count]).is_some() {
                break;
            }
            let slot = place.slot + count;
            self.runs[place.run].put(chain[count]);
            self.note(chain[count], Place { slot, ..place });
            count += 1;
        }
        let run = &mut self.runs[place.run];
        let slots = run.close(holders);
        run.touch(slots.clone(), self.now);
        self.heap += run.heap();
        self.sets.move_blocks(NOBODY, holders, count);
        self.blocks += count;
        self.entries += count as u64;
        self.tick(count);
        let slot = slots.end;
        Some((Place { slot, ..place }, count))
    }

    fn tick(&mut self, stored: usize) {
        match self.until_tick.checked_sub(stored) {
            Some(left) if left > 0 => self.until_tick = left,
            _ => {
                self.until_tick = (self.blocks / 32).max(SEGMENT);
                self.now = self.now.wrapping_add(1);
            }
        }
    }

    fn remove(&mut self, worker: usize, tier: Tier, chain: &[u64]) {
        let mut at = 0;
        while let Some(&value) = chain.get(at) {
            let Some(place) = self.find(value) else {
                at += 1;
                continue;
            };
            // Engines name what is gone from either end.
            let run = &self.runs[place.run];
            let (up, down) = (
                run.held_upward(place.slot, &chain[at..]),
                run.held_downward(place.slot, &chain[at..]),
            );
            let slots = if up >= down {
                place.slot..place.slot + up
            } else {
                place.slot + 1 - down..place.slot + 1
            };
            at += slots.len();
            let mut gone = 0;
            self.recolour(place.run, slots, |sets, from, count| {
                if !sets.get(from).tiers[tier as usize].has(worker) {
                    return from;
                }
                gone += count;
                sets.changed(from, worker, tier, false)
            });
            self.entries -= gone as u64;
        }
    }

    /// Changes the holders of some slots of a run to what `change` makes of
    /// them, and takes out what nobody holds then.
    fn recolour(
        &mut self,
        number: usize,
        slots: Range<usize>,
        mut change: impl FnMut(&mut HolderSets, HolderId, usize) -> HolderId,
    ) {
        let (run, sets) = (&mut self.runs[number], &mut self.sets);
        self.heap -= run.heap();
        let dead = run.recolour(slots, |from, count| {
            let to = change(sets, from, count);
            if to != from {
                sets.move_blocks(from, to, count);
            }
            to
        });
        self.heap += run.heap();
        if !dead.is_empty() {
            self.bury(number, dead);
        }
    }

    fn bury(&mut self, number: usize, dead: Dead) {
        for slots in dead {
            self.blocks -= slots.len();
            if self.pass == Pass::Second {
                let values = &self.runs[number].values()[slots.clone()];
                for (part, first) in values.chunks(WARM).zip(slots.step_by(WARM)) {
                    std::hint::black_box(self.table.warm(part));
                    for (value, slot) in part.iter().zip(first..) {
                        self.table.remove(*value, Place { run: number, slot });
                    }
                }
            }
        }
        self.tidy(number);
    }

    /// Gives back what a run has no use for.
    fn tidy(&mut self, number: usize) {
        let run = &mut self.runs[number];
        self.heap -= run.heap();
        if !run.trim() {
            *run = Run::default();
            self.free.push(number as u32);
        } else if run.is_sparse() {
            for (value, from, to) in run.compact() {
                let at = |slot| Place { run: number, slot };
                self.note(value, at(to));
                self.strike(value, at(from));
            }
        }
        self.heap += self.runs[number].heap();
    }

    /// Takes a worker's blocks out: one pass over the runs.
    fn clear(&mut self, worker: usize) {
        let mut gone = 0;
        for number in 1..self.runs.len() {
            let all = 0..self.runs[number].len();
            self.recolour(number, all, |sets, from, count| {
                if !sets.any(from).has(worker) {
                    return from;
                }
                let tiers = sets.get(from).tiers.iter();
                gone += count * tiers.filter(|bits| bits.has(worker)).count();
                sets.without(from, worker)
            });
        }
        self.entries -= gone as u64;
    }

    /// What a worker holds becomes exactly this.
    pub(crate) fn replace(&mut self, worker: usize, blocks: &[(u64, Tier)]) {
        self.clear(worker);
        for part in blocks.chunk_by(|a, b| a.1 == b.1) {
            let chain: Vec<u64> = part.iter().map(|(value, _)| *value).collect();
            self.store(worker, part[0].1, None, &chain);
        }
    }

    /// Takes ends of runs out for all workers.
    pub(crate) fn forget(&mut self, tails: &[Tail]) {
        for tail in tails {
            let end = self.runs[tail.run].len();
            let mut gone = 0;
            self.recolour(tail.run, tail.slot..end, |sets, from, count| {
                let holdings: u64 = sets.get(from).tiers.iter().map(Bits::count).sum();
                gone += count as u64 * holdings;
                NOBODY
            });
            self.entries -= gone;
        }
    }

    /// The next that should go: of some runs those whose ends were longest not
    /// asked for. `hand` says where the search goes on, `other` is the second
    /// copy, whose heat counts too.
    pub(crate) fn coldest(&self, hand: &mut usize, other: Option<&Core>) -> Vec<Tail> {
        let mut seen = Vec::with_capacity(SAMPLE);
        for _ in 1..self.runs.len() {
            *hand = if *hand + 1 < self.runs.len() {
                *hand + 1
            } else {
                1
            };
            let run = &self.runs[*hand];
            if run.len() == 0 {
                continue;
            }
            let there = other.and_then(|core| core.runs.get(*hand));
            let age = run.tail_age(self.now);
            let age = age.min(there.map_or(age, |run| run.tail_age(self.now)));
            seen.push((age, *hand, run.tail()));
            if seen.len() == SAMPLE {
                break;
            }
        }
        seen.sort_unstable_by(|a, b| b.cmp(a));
        seen.truncate(VICTIMS);
        let tail = |(_, run, slot)| Tail { run, slot };
        seen.into_iter().map(tail).collect()
    }

    /// Bytes that content of this size takes at most in both copies, for the
    /// bound.
    pub(crate) fn charge(&self) -> usize {
        let runs = self.runs.len() - self.free.len();
        let copy = runs * size_of::<Run>() + self.heap + self.sets.heap();
        self.blocks * BYTES_A_BLOCK + 2 * copy
    }

    /// Bytes that this copy takes, the table not counted.
    pub(crate) fn bytes(&self) -> usize {
        let runs = self.runs.capacity() * size_of::<Run>() + self.free.capacity() * 4;
        runs + self.heap + self.sets.bytes()
    }

    pub(crate) fn table_bytes(&self) -> usize {
        self.table.bytes()
    }

    pub(crate) fn blocks(&self) -> usize {
        self.blocks
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

    /// Worker slots, free ones between them included.
    pub(crate) fn slots(&self) -> usize {
        self.units.len()
    }

    pub(crate) fn workers(&self) -> &Bits {
        &self.all
    }

    fn number(&mut self) -> Option<usize> {
        if let Some(run) = self.free.pop() {
            return Some(run as usize);
        }
        if self.runs.len() == MOST_RUNS {
            return None;
        }
        self.runs.push(Run::default());
        Some(self.runs.len() - 1)
    }
}

#[cfg(test)]
impl Core {
    /// Whether what is counted is what is there, and each value is found.
    pub(crate) fn check(&self) {
        let (mut blocks, mut entries, mut heap) = (0, 0, 0);
        for (number, run) in self.runs.iter().enumerate() {
            heap += run.heap();
            let mut slot = 0;
            for (holders, end) in run.spans_from(0) {
                assert!(slot < end && end <= run.len());
                if holders != NOBODY {
                    let tiers = self.sets.get(holders).tiers.iter();
                    entries += tiers.map(Bits::count).sum::<u64>() * (end - slot) as u64;
                    for (value, slot) in run.values()[slot..end].iter().zip(slot..) {
                        let place = Place { run: number, slot };
                        assert_eq!(self.find(*value), Some(place));
                        blocks += 1;
                    }
                }
                slot = end;
            }
            assert_eq!(slot, run.len());
            assert_eq!(
                run.len() == 0,
                number == 0 || self.free.contains(&(number as u32))
            );
        }
        assert_eq!(
            (blocks, entries, heap),
            (self.blocks, self.entries, self.heap)
        );
    }

    /// Notes in the table.
    pub(crate) fn notes(&self) -> usize {
        self.table.len()
    }

    /// Everything but the heat.
    pub(crate) fn layout(&self) -> Vec<(Vec<u64>, Vec<(HolderId, usize)>)> {
        let runs = self.runs.iter();
        runs.map(|run| (run.values().to_vec(), run.spans_from(0).collect()))
            .collect()
    }
}
