//! Two copies of a thing: one is read while the other one is changed.
//!
//! Left-right (P. Ramalhete and A. Correia, 2015) over locks that are only
//! tried. A change is made in the copy that nobody reads, the copies change
//! roles, and the other one takes the change when its last reader has left. So a
//! reader never waits for a change and sees each one whole.
//!
//! A writer hardly waits for a reader either: where the copy that it needs is
//! still being read after a short while (a reader that lost its processor), the
//! change goes to a log and is made with the next one, or by the next reader
//! that leaves. Two things are waited for: room in a log that is full, and the
//! readers of a copy that is to take a heavy change. That takes a hundred times as
//! long as they stay, and whoever had to make it later would be held up by it: so
//! it never goes to the log, and what a reader makes when it leaves is bounded by
//! [`HELP`] and one light change.

#[cfg(loom)]
use loom::sync::{
    Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};
use std::collections::VecDeque;
#[cfg(not(loom))]
use std::sync::{
    Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};
use std::sync::{PoisonError, TryLockError};

/// Tries of a reader before it waits in line. A try fails only if the copies
/// change roles between two instructions of the reader.
const READS: usize = if cfg!(loom) { 4 } else { 64 };
/// Tries of a writer before a change goes to the log: some microseconds, longer
/// than a look-up takes.
const WRITES: usize = if cfg!(loom) { 1 } else { 200 };

/// Weight of the changes that a reader makes at most when it leaves: some tens
/// of microseconds.
const HELP: usize = 512;

/// Whether a copy is the first or the second one to take a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    First,
    Second,
}

/// A change that waits until it can be made.
pub(crate) trait Kept<T> {
    /// Makes it in a copy; first in one, later in the other.
    fn make(&mut self, copy: &mut T, pass: Pass);
    /// What it takes in the log, in some unit.
    fn weight(&self) -> usize;
}

/// A thing in two copies that take the same changes, `K` those that wait.
#[derive(Debug)]
pub(crate) struct LeftRight<T, K> {
    copies: [RwLock<T>; 2],
    /// Copy that readers take.
    active: AtomicUsize,
    /// Whether the log has changes that readers do not see yet.
    behind: AtomicBool,
    log: Mutex<Log<K>>,
    /// Most weight that the log may have.
    most: usize,
}

#[derive(Debug)]
struct Log<K> {
    kept: VecDeque<K>,
    weight: usize,
    /// Number of the first change that is kept.
    first: u64,
    /// Changes that each copy has, of those that were ever kept.
    taken: [u64; 2],
}

impl<K> Log<K> {
    fn end(&self) -> u64 {
        self.first + self.kept.len() as u64
    }

    fn push<T>(&mut self, change: K)
    where
        K: Kept<T>,
    {
        self.weight += change.weight();
        self.kept.push_back(change);
    }

    /// Makes in a copy what it lacks, up to a weight, and drops what both have.
    /// Whether the copy lacks nothing now.
    fn bring<T>(&mut self, which: usize, copy: &mut T, most: usize) -> bool
    where
        K: Kept<T>,
    {
        let mut weight = 0;
        while weight <= most && self.taken[which] < self.end() {
            let number = self.taken[which];
            let change = &mut self.kept[(number - self.first) as usize];
            let second = number < self.taken[1 - which];
            change.make(copy, if second { Pass::Second } else { Pass::First });
            weight += change.weight();
            self.taken[which] = number + 1;
        }
        while self.first < self.taken[0].min(self.taken[1]) {
            if let Some(change) = self.kept.pop_front() {
                self.weight -= change.weight();
            }
            self.first += 1;
        }
        self.taken[which] == self.end()
    }
}

impl<T, K: Kept<T>> LeftRight<T, K> {
    /// Two copies, which must be equal.
    pub(crate) fn new(copies: [T; 2], most: usize) -> Self {
        Self {
            copies: copies.map(RwLock::new),
            active: AtomicUsize::new(0),
            behind: AtomicBool::new(false),
            log: Mutex::new(Log {
                kept: VecDeque::new(),
                weight: 0,
                first: 0,
                taken: [0; 2],
            }),
            most,
        }
    }

    /// What readers see now.
    pub(crate) fn read<R>(&self, read: impl FnOnce(&T) -> R) -> R {
        let answer = read(&self.active_copy());
        // Orders nothing: whoever misses it leaves it to the next reader.
        if self.behind.load(Ordering::Relaxed)
            && let Some(mut log) = free(self.log.try_lock())
        {
            self.advance(&mut log, HELP);
        }
        answer
    }

    /// Reads both copies, the second only where it is free: that may lack the
    /// last changes. For who alone makes changes.
    pub(crate) fn read_both<R>(&self, read: impl FnOnce(&T, Option<&T>) -> R) -> R {
        let idle = 1 - self.active.load(Ordering::Acquire);
        let other = free(self.copies[idle].try_read());
        read(&self.active_copy(), other.as_deref())
    }

    /// Whether changes wait for a reader to leave.
    pub(crate) fn is_behind(&self) -> bool {
        self.behind.load(Ordering::Relaxed)
    }

    /// Makes a change, `make` in a copy at a time; `keep` is asked for it where
    /// a copy has to wait for it, and gives none where it is heavy. Readers see it
    /// when this returns, or, where one of them stays for long, as soon as that
    /// one leaves.
    pub(crate) fn write(&self, make: impl Fn(&mut T, Pass), keep: impl Fn() -> Option<K>) {
        let mut log = self.log();
        let idle = 1 - self.active.load(Ordering::Relaxed);
        // A reader that has stayed for long will not leave just now.
        let tries = if self.is_behind() { 1 } else { WRITES };
        let mut copy = match self.copy_or(idle, tries, &keep) {
            Ok(copy) => copy,
            Err(kept) => return self.put_off(&mut log, idle, kept),
        };
        log.bring(idle, &mut *copy, usize::MAX);
        make(&mut copy, Pass::First);
        self.turn(&mut log, idle, copy, usize::MAX);
        let other = 1 - idle;
        match self.copy_or(other, 1, &keep) {
            Ok(mut copy) => {
                log.bring(other, &mut *copy, usize::MAX);
                make(&mut copy, Pass::Second);
            }
            Err(kept) => {
                log.push(kept);
                log.taken[idle] = log.end();
            }
        }
    }

    /// A copy to be changed if it is free soon, or the change is heavy; else what
    /// is to be kept.
    fn copy_or(
        &self,
        which: usize,
        tries: usize,
        keep: impl Fn() -> Option<K>,
    ) -> Result<RwLockWriteGuard<'_, T>, K> {
        match self.free_copy(which, tries) {
            Some(copy) => Ok(copy),
            None => keep().map_or_else(|| Ok(self.wait_for(which)), Err),
        }
    }

    /// Keeps a change that readers do not see yet.
    fn put_off(&self, log: &mut Log<K>, idle: usize, kept: K) {
        log.push(kept);
        self.behind.store(true, Ordering::Relaxed);
        // The reader may have left before it could see that.
        self.advance(log, usize::MAX);
        if log.weight > self.most {
            let copy = self.wait_for(idle);
            self.turn(log, idle, copy, usize::MAX);
        }
    }

    /// Makes what waits, up to a weight, if the copy for it is free.
    fn advance(&self, log: &mut Log<K>, most: usize) {
        let idle = 1 - self.active.load(Ordering::Relaxed);
        if self.is_behind()
            && let Some(copy) = self.free_copy(idle, 1)
        {
            self.turn(log, idle, copy, most);
        }
    }

    /// Brings a copy up to date, up to a weight, and once it is gives it to
    /// readers.
    fn turn(&self, log: &mut Log<K>, idle: usize, mut copy: RwLockWriteGuard<'_, T>, most: usize) {
        if log.bring(idle, &mut *copy, most) {
            // Before the lock is free: nobody who was late to see this must
            // find here what others do not see yet.
            self.active.store(idle, Ordering::Release);
            self.behind.store(false, Ordering::Relaxed);
        }
    }

    fn free_copy(&self, which: usize, tries: usize) -> Option<RwLockWriteGuard<'_, T>> {
        for _ in 0..tries {
            if let Some(copy) = free(self.copies[which].try_write()) {
                return Some(copy);
            }
            #[cfg(not(loom))]
            std::hint::spin_loop();
        }
        None
    }

    fn wait_for(&self, which: usize) -> RwLockWriteGuard<'_, T> {
        let copy = self.copies[which].write();
        copy.unwrap_or_else(PoisonError::into_inner)
    }

    fn active_copy(&self) -> RwLockReadGuard<'_, T> {
        // Where the active copy is just being given to readers, the other one
        // still has what they saw until now.
        for other in [0, 1].into_iter().cycle().take(READS) {
            let active = self.active.load(Ordering::Acquire);
            if let Some(copy) = free(self.copies[active ^ other].try_read()) {
                return copy;
            }
        }
        let copy = self.copies[self.active.load(Ordering::Acquire)].read();
        copy.unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> MutexGuard<'_, Log<K>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lock that was free, also one whose holder once panicked.
fn free<G>(tried: Result<G, TryLockError<G>>) -> Option<G> {
    match tried {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

#[cfg(test)]
#[path = "left_right_tests.rs"]
mod tests;
