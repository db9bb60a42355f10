//! Says without a lock that nobody holds a prompt's first block.
//!
//! The table has an entry for each value that any copy has (`table.rs`), and may
//! be read beside changes. So where it has none for the first block of a prompt,
//! the copy that is active lacks it at that moment, and the answer is empty: no
//! copy need be taken. That spares the two locked instructions which taking one
//! costs, half of such a look-up.
//!
//! A reader keeps a table from one look-up to the next and compares its address
//! with the current one's. The address cannot be another table's as long as the
//! reader keeps that one.

use crate::table::Table;
#[cfg(loom)]
use loom::sync::{
    Mutex,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};
use std::sync::{Arc, PoisonError};
#[cfg(not(loom))]
use std::sync::{
    Mutex,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

const SLOT_BITS: u32 = 24;
const UNIT_BITS: u32 = 16;

/// The current table, and of the workers what an empty answer needs.
#[derive(Debug)]
pub(crate) struct Absence {
    newest: Mutex<Arc<Table>>,
    /// Address of `newest`.
    current: AtomicUsize,
    /// Counted up with each change of it; block size of all workers in units, 0
    /// where they differ or this is not to be used; worker slots.
    shape: AtomicU64,
}

/// A table that a reader keeps. It is no part of what was found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen(Option<Arc<Table>>);

impl PartialEq for Seen {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Seen {}

impl Absence {
    pub(crate) fn new(table: Arc<Table>) -> Self {
        Self {
            current: AtomicUsize::new(address(&table)),
            newest: Mutex::new(table),
            shape: AtomicU64::new(0),
        }
    }

    /// From now on this is the table. It has all entries of the one before, which
    /// nobody changes any more.
    pub(crate) fn publish(&self, table: &Arc<Table>) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        *newest = table.clone();
        self.current.store(address(table), Ordering::Release);
    }

    /// Makes this the current table.
    pub(crate) fn renew(&self, table: &mut Arc<Table>) {
        if self.current.load(Ordering::Acquire) != address(table) {
            let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
            *table = newest.clone();
        }
    }

    /// All workers have this block size, in units, and so many slots; 0 units
    /// where nothing may be said. For who alone makes changes.
    pub(crate) fn set_shape(&self, units: usize, slots: usize) {
        let fits = units < 1 << UNIT_BITS && slots < 1 << SLOT_BITS;
        let units = if fits { units as u64 } else { 0 };
        let slots = if fits { slots as u64 } else { 0 };
        let before = self.shape.load(Ordering::Relaxed) >> (SLOT_BITS + UNIT_BITS);
        let number = before.wrapping_add(1) << (SLOT_BITS + UNIT_BITS);
        let shape = number | units << SLOT_BITS | slots;
        self.shape.store(shape, Ordering::Release);
    }

    /// Worker slots, where it is certain that nobody holds the first block.
    pub(crate) fn slots(&self, chain: &[u64], seen: &mut Seen) -> Option<usize> {
        let shape = self.shape.load(Ordering::Acquire);
        let units = (shape >> SLOT_BITS) as usize & ((1 << UNIT_BITS) - 1);
        let first = chain.get(units.checked_sub(1)?)?;
        let current = self.current.load(Ordering::Acquire);
        let table = match &mut seen.0 {
            Some(table) if address(table) == current => table,
            kept => kept.insert(self.newest.try_lock().ok()?.clone()),
        };
        if !table.is_absent(*first) {
            return None;
        }
        let slots = shape as usize & ((1 << SLOT_BITS) - 1);
        (self.shape.load(Ordering::Relaxed) == shape).then_some(slots)
    }
}

fn address(table: &Arc<Table>) -> usize {
    Arc::as_ptr(table).addr()
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::table::Place;

    fn place(run: usize) -> Place {
        Place { run, slot: 0 }
    }

    /// What is there all the time is never said to be absent, while it moves, the
    /// table grows, and other values come and go.
    #[test]
    fn what_is_there_is_not_told_absent() {
        loom::model(|| {
            let table = Arc::new(Table::new());
            assert!(table.insert(1, place(1)) && table.insert(2, place(2)));
            let absence = loom::sync::Arc::new(Absence::new(table.clone()));
            absence.set_shape(1, 5);
            let writer = {
                let absence = absence.clone();
                loom::thread::spawn(move || {
                    assert!(table.insert(1, place(4)));
                    table.remove(1, place(1));
                    table.remove(2, place(2));
                    let larger = Arc::new(table.resized());
                    absence.publish(&larger);
                    assert!(larger.insert(3, place(3)));
                })
            };
            let mut seen = Seen::default();
            for _ in 0..2 {
                assert_eq!(absence.slots(&[1], &mut seen), None);
            }
            writer.join().unwrap();
            assert_eq!(absence.slots(&[3], &mut seen), None, "noted before");
            assert_eq!(absence.slots(&[2], &mut seen), Some(5), "taken out before");
        });
    }

    /// A worker with another block size is seen by who sees its blocks.
    #[test]
    fn nothing_is_told_of_two_block_sizes() {
        loom::model(|| {
            let table = Arc::new(Table::new());
            let absence = loom::sync::Arc::new(Absence::new(table.clone()));
            absence.set_shape(1, 1);
            let stored = loom::sync::Arc::new(AtomicUsize::new(0));
            let writer = {
                let (absence, stored) = (absence.clone(), stored.clone());
                loom::thread::spawn(move || {
                    absence.set_shape(0, 2);
                    assert!(table.insert(8, place(1)));
                    stored.store(1, Ordering::Release);
                })
            };
            let before = stored.load(Ordering::Acquire);
            let told = absence.slots(&[7, 8], &mut Seen::default());
            assert!(before == 0 || told.is_none());
            writer.join().unwrap();
        });
    }
}
