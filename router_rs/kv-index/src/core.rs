//! One copy of the index's content. Changes are deterministic, so two copies
//! that take the same changes stay equal.

use crate::absence::Absence;
use crate::bits::Bits;
use crate::holders::HolderSets;
#[cfg(test)]
use crate::holders::{HolderId, NOBODY};
use crate::left_right::Pass;
use crate::run::SEGMENT;
use crate::runs::Runs;
use crate::table::{BYTES_A_BLOCK, Claim, Place, Table};
use std::sync::Arc;

/// Runs looked at together when the coldest are sought, and how many of them
/// lose their last segment.
const SAMPLE: usize = 64;
const VICTIMS: usize = 8;

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
    pub(crate) run: usize,
    pub(crate) slot: usize,
}

/// What has to be known after each change.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gauges {
    /// Values that can be stored before the table has to grow.
    pub(crate) room: usize,
    /// Block size of all workers in units; 0 where they differ.
    pub(crate) only_units: usize,
    /// Worker slots, free ones between them included.
    pub(crate) slots: usize,
    /// Bytes that content of this size takes at most in both copies.
    pub(crate) charge: usize,
}

#[derive(Debug)]
pub(crate) struct Core {
    /// Where values are, here and in the other copy.
    pub(crate) table: Arc<Table>,
    /// Has the table of the copy that was changed last.
    absence: Arc<Absence>,
    /// Whether this copy is the first or the second one to take a change.
    pub(crate) pass: Pass,
    pub(crate) runs: Runs,
    pub(crate) sets: HolderSets,
    pub(crate) classes: Vec<SizeClass>,
    /// Block size in units by slot; 0 for a slot without a worker.
    units: Vec<usize>,
    /// Tick of the heat clock, and blocks stored until the next one.
    pub(crate) now: u8,
    pub(crate) until_tick: usize,
    /// Distinct blocks that somebody holds.
    pub(crate) blocks: usize,
    /// (worker, block, tier) triples.
    pub(crate) entries: u64,
    /// Bytes behind the runs.
    pub(crate) heap: usize,
}

impl Core {
    /// Two empty copies, and what says without them what is in neither.
    pub(crate) fn pair() -> ([Self; 2], Arc<Absence>) {
        let table = Arc::new(Table::new());
        let absence = Arc::new(Absence::new(table.clone()));
        let copies = [(); 2].map(|()| Self::new(table.clone(), absence.clone()));
        (copies, absence)
    }

    fn new(table: Arc<Table>, absence: Arc<Absence>) -> Self {
        Self {
            table,
            absence,
            pass: Pass::First,
            runs: Runs::new(),
            sets: HolderSets::new(),
            classes: Vec::new(),
            units: Vec::new(),
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
        self.absence.renew(&mut self.table);
    }

    /// To be called after each change.
    pub(crate) fn end(&mut self) {
        if self.pass == Pass::Second && self.table.is_sparse() {
            self.resize();
        }
    }

    fn resize(&mut self) {
        self.table = Arc::new(self.table.resized());
        self.absence.publish(&self.table);
    }

    /// The first copy that has a value notes where it is.
    pub(crate) fn note(&mut self, value: u64, place: Place) {
        if self.pass == Pass::First && !self.table.insert(value, place) {
            self.resize();
            // There is room now.
            let _ = self.table.insert(value, place);
        }
    }

    /// The last copy that has a value takes the note out.
    pub(crate) fn strike(&mut self, value: u64, place: Place) {
        if self.pass == Pass::Second {
            self.table.remove(value, place);
        }
    }

    pub(crate) fn add_worker(&mut self, worker: usize, units: usize) {
        if self.units.len() <= worker {
            self.units.resize(worker + 1, 0);
        }
        self.units[worker] = units;
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
        for class in &mut self.classes {
            class.workers.clear(worker);
        }
        self.classes.retain(|class| !class.workers.is_empty());
    }

    /// Where a value is that somebody holds.
    pub(crate) fn find(&self, value: u64) -> Option<Place> {
        self.table.find(value, |place| self.holds(place, value))
    }

    fn holds(&self, place: Place, value: u64) -> bool {
        let run = self.runs.get(place.run);
        run.is_some_and(|run| run.holds(place.slot, value))
    }

    /// Whether nobody held a value; then it is noted to be at `place`. Before
    /// it come the values `fresh`, from `first` on.
    pub(crate) fn claim(&mut self, value: u64, place: Place, first: Place, fresh: &[u64]) -> bool {
        let holds = |at: Place| {
            let among = at
                .slot
                .checked_sub(first.slot)
                .filter(|_| at.run == first.run);
            match among.and_then(|at| fresh.get(at)) {
                Some(fresh) => *fresh == value,
                None => self.holds(at, value),
            }
        };
        if self.pass == Pass::Second {
            // Those that come twice are known by the notes of the first copy.
            return self.table.find(value, holds).is_none();
        }
        let claim = self.table.claim(value, place, holds);
        if claim == Claim::Full {
            self.note(value, place);
        }
        !matches!(claim, Claim::Held(_))
    }

    /// The next that should go: of some runs those whose ends were longest not
    /// asked for. `hand` says where the search goes on, `other` is the second
    /// copy, whose heat counts too.
    pub(crate) fn coldest(&self, hand: &mut usize, other: Option<&Core>) -> Vec<Tail> {
        let mut seen = Vec::with_capacity(SAMPLE);
        for _ in 1..self.runs.end() {
            *hand = if *hand + 1 < self.runs.end() {
                *hand + 1
            } else {
                1
            };
            let Some(run) = self.runs.get(*hand).filter(|run| run.len() > 0) else {
                continue;
            };
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

    pub(crate) fn gauges(&self) -> Gauges {
        Gauges {
            room: self.table.room(),
            only_units: self.only_units(),
            slots: self.slots(),
            charge: self.charge(),
        }
    }

    /// Bytes that content of this size takes at most in both copies, for the
    /// bound.
    fn charge(&self) -> usize {
        let copy = self.runs.bytes() + self.heap + self.sets.heap();
        let table = (self.blocks * BYTES_A_BLOCK).max(self.table.bytes());
        table + 2 * copy
    }

    /// Bytes that this copy takes, the table not counted.
    pub(crate) fn bytes(&self) -> usize {
        self.runs.bytes() + self.heap + self.sets.bytes()
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

    fn only_units(&self) -> usize {
        match self.classes.as_slice() {
            [class] => class.units,
            _ => 0,
        }
    }

    /// Worker slots, free ones between them included.
    pub(crate) fn slots(&self) -> usize {
        self.units.len()
    }
}

/// Values of a run, and where each of its sets of holders ends.
#[cfg(test)]
type Layout = (Vec<u64>, Vec<(HolderId, usize)>);

#[cfg(test)]
impl Core {
    /// Whether what is counted is what is there, and each value is found.
    pub(crate) fn check(&self) {
        let (mut blocks, mut entries, mut heap) = (0, 0, 0);
        for number in 0..self.runs.end() {
            let Some(run) = self.runs.get(number) else {
                assert!(self.runs.is_free(number));
                continue;
            };
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
            assert_eq!(run.len() == 0, number == 0 || self.runs.is_free(number));
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
    pub(crate) fn layout(&self) -> Vec<Layout> {
        let runs = (0..self.runs.end()).filter_map(|number| self.runs.get(number));
        runs.map(|run| (run.values().to_vec(), run.spans_from(0).collect()))
            .collect()
    }
}
