//! How a copy takes changes of a worker's cache.

use crate::bits::Bits;
use crate::core::{Core, Tail};
use crate::edit::Batch;
use crate::holders::{HolderId, HolderSets, NOBODY};
use crate::left_right::Pass;
use crate::run::{Dead, Run, SEGMENT};
use crate::table::{MOST_SLOTS, Place};
use crate::worker::{CacheChange, Tier};
use smallvec::SmallVec;
use std::ops::Range;

/// Values whose cache lines are fetched together.
const WARM: usize = 32;

/// What a part of a change came to: so many values from a place on.
#[derive(Debug, Clone, Copy)]
struct Step {
    place: Place,
    count: usize,
    /// Whether nobody held them before.
    new: bool,
}

impl Step {
    fn slots(&self) -> Range<usize> {
        self.place.slot..self.place.slot + self.count
    }

    fn end(&self) -> Place {
        Place {
            slot: self.slots().end,
            ..self.place
        }
    }
}

/// What a change came to in the first copy. The second one, which is equal, does
/// the same without looking anything up.
#[derive(Debug, Default)]
pub(crate) struct Steps(SmallVec<[SmallVec<[Step; 2]>; 1]>);

impl Core {
    /// Makes changes, and says what they came to.
    pub(crate) fn apply(&mut self, batch: Batch<'_>) -> Steps {
        let mut steps = Steps::default();
        for (at, (worker, change)) in batch.each().enumerate() {
            // What the next one needs is on its way while this one is made.
            if let Some((_, CacheChange::StoredAfter { parent, chain, .. })) = batch.get(at + 1) {
                self.warm(&[parent]);
                self.warm(&chain[..chain.len().min(WARM)]);
            }
            steps.0.push(match change {
                CacheChange::Stored { chain, tier } => self.store(worker, tier, None, chain),
                CacheChange::StoredAfter {
                    parent,
                    chain,
                    tier,
                } => self.store(worker, tier, Some(parent), chain),
                CacheChange::Removed { chain, tier } => self.remove(worker, tier, chain),
                CacheChange::Cleared => {
                    self.clear(worker);
                    SmallVec::new()
                }
            });
        }
        steps
    }

    /// Makes changes that came to this in the other copy.
    pub(crate) fn follow(&mut self, batch: Batch<'_>, steps: &Steps) {
        for ((worker, change), steps) in batch.each().zip(&steps.0) {
            match change {
                CacheChange::Stored { chain, tier }
                | CacheChange::StoredAfter { chain, tier, .. } => {
                    let mut rest = chain;
                    for step in steps {
                        let (part, after) = rest.split_at(step.count);
                        rest = after;
                        if step.new {
                            self.store_again(worker, tier, *step, part);
                        } else {
                            self.add_holder(worker, tier, *step);
                        }
                    }
                }
                CacheChange::Removed { tier, .. } => {
                    for step in steps {
                        self.remove_holder(worker, tier, *step);
                    }
                }
                CacheChange::Cleared => self.clear(worker),
            }
        }
    }

    fn warm(&self, values: &[u64]) {
        std::hint::black_box(self.table.warm(values));
    }

    fn store(
        &mut self,
        worker: usize,
        tier: Tier,
        parent: Option<u64>,
        chain: &[u64],
    ) -> SmallVec<[Step; 2]> {
        let mut steps = SmallVec::new();
        // Together on their way, also those that are needed last.
        self.warm(parent.as_slice());
        self.warm(&chain[..chain.len().min(WARM)]);
        let mut next = parent
            .and_then(|parent| self.find(parent))
            .map(|place| Place {
                slot: place.slot + 1,
                ..place
            });
        let mut rest = chain;
        while let Some(&value) = rest.first() {
            let here =
                next.filter(|place| self.runs[place.run].held_upward(place.slot, &[value]) == 1);
            let step = if let Some(place) = here.or_else(|| self.find(value)) {
                let count = self.runs[place.run].held_upward(place.slot, rest);
                let step = Step {
                    place,
                    count,
                    new: false,
                };
                self.add_holder(worker, tier, step);
                step
            } else if let Some(step) = self.store_new(worker, tier, next, rest) {
                step
            } else {
                break;
            };
            steps.push(step);
            next = Some(step.end());
            rest = &rest[step.count..];
        }
        steps
    }

    /// A worker holds values too that others, or it in another tier, hold.
    fn add_holder(&mut self, worker: usize, tier: Tier, step: Step) {
        self.runs[step.place.run].touch(step.slots(), self.now);
        let mut added = 0;
        self.recolour(step.place.run, step.slots(), |sets, from, count| {
            if sets.get(from).tiers[tier as usize].has(worker) {
                return from;
            }
            let to = sets.changed(from, worker, tier, true);
            added += if to == from { 0 } else { count };
            to
        });
        self.entries += added as u64;
    }

    fn remove_holder(&mut self, worker: usize, tier: Tier, step: Step) {
        let mut gone = 0;
        self.recolour(step.place.run, step.slots(), |sets, from, count| {
            if !sets.get(from).tiers[tier as usize].has(worker) {
                return from;
            }
            gone += count;
            sets.changed(from, worker, tier, false)
        });
        self.entries -= gone as u64;
    }

    /// Stores values of which nobody holds the first, up to one that somebody
    /// does: at `next` where that is the end of a run with room, else in a run
    /// of their own. `None` where numbers have run out, which costs hits, never
    /// more.
    fn store_new(
        &mut self,
        worker: usize,
        tier: Tier,
        next: Option<Place>,
        chain: &[u64],
    ) -> Option<Step> {
        let room =
            |place: &Place| place.slot == self.runs[place.run].len() && place.slot < MOST_SLOTS;
        let place = match next.filter(room) {
            Some(place) => place,
            None => Place {
                run: self.runs.take()?,
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
        let count = self.claim_all(place, &chain[..most]);
        self.runs[place.run].put(&chain[..count]);
        let step = Step {
            place,
            count,
            new: true,
        };
        self.close(step, holders);
        Some(step)
    }

    /// Notes values at a place and after it, up to one that somebody holds.
    /// How many.
    fn claim_all(&mut self, place: Place, chain: &[u64]) -> usize {
        let mut count = 0;
        for (number, part) in chain.chunks(WARM).enumerate() {
            if number > 0 {
                self.warm(part);
            }
            for &value in part {
                let slot = place.slot + count;
                // They are not in the run yet, where one may come twice.
                let fresh = &chain[..count];
                if !self.claim(value, Place { slot, ..place }, place, fresh) {
                    return count;
                }
                count += 1;
            }
        }
        count
    }

    /// As [`Core::store_new`], where the other copy found that it comes to this.
    fn store_again(&mut self, worker: usize, tier: Tier, step: Step, values: &[u64]) {
        if step.place.slot == 0 {
            // The same number that the other copy took.
            self.runs.take();
        }
        let holders = self.sets.changed(NOBODY, worker, tier, true);
        self.heap -= self.runs[step.place.run].heap();
        self.runs[step.place.run].reserve(values.len());
        self.runs[step.place.run].put(values);
        self.close(step, holders);
    }

    /// Gives values that were put into a run their holders, and counts them.
    fn close(&mut self, step: Step, holders: HolderId) {
        let run = &mut self.runs[step.place.run];
        run.close(holders);
        run.touch(step.slots(), self.now);
        self.heap += run.heap();
        self.sets.move_blocks(NOBODY, holders, step.count);
        self.blocks += step.count;
        self.entries += step.count as u64;
        match self.until_tick.checked_sub(step.count) {
            Some(left) if left > 0 => self.until_tick = left,
            _ => {
                self.until_tick = (self.blocks / 32).max(SEGMENT);
                self.now = self.now.wrapping_add(1);
            }
        }
    }

    fn remove(&mut self, worker: usize, tier: Tier, chain: &[u64]) -> SmallVec<[Step; 2]> {
        let mut steps = SmallVec::new();
        let mut rest = chain;
        while let Some(&value) = rest.first() {
            let Some(place) = self.find(value) else {
                rest = &rest[1..];
                continue;
            };
            // Engines name what is gone from either end.
            let run = &self.runs[place.run];
            let up = run.held_upward(place.slot, rest);
            let down = run.held_downward(place.slot, rest);
            let count = up.max(down);
            let slot = if up >= down {
                place.slot
            } else {
                place.slot + 1 - down
            };
            let step = Step {
                place: Place { slot, ..place },
                count,
                new: false,
            };
            self.remove_holder(worker, tier, step);
            steps.push(step);
            rest = &rest[count..];
        }
        steps
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
            self.runs.release(number);
            return;
        }
        if run.is_sparse() {
            for (value, from, to) in run.compact() {
                let at = |slot| Place { run: number, slot };
                self.note(value, at(to));
                self.strike(value, at(from));
            }
        }
        self.heap += self.runs[number].heap();
    }

    /// Takes a worker's blocks out: one pass over the runs.
    pub(crate) fn clear(&mut self, worker: usize) {
        let mut gone = 0;
        for number in 1..self.runs.end() {
            let all = 0..self.runs.get(number).map_or(0, Run::len);
            if all.is_empty() {
                continue;
            }
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
            let _ = self.store(worker, part[0].1, None, &chain);
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
}
