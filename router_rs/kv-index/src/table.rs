//! The map from chain value to the place where it is kept.
//!
//! Both copies of the index share one table, since it is the larger part of a
//! change's work and most of the memory beside the values themselves. That is
//! sound because an entry only proposes a place: a copy asks its own runs
//! whether the value is there. So an entry may come before the copy that is
//! read has the value, and stays until no copy has it; and entries never move
//! while a table is in use, so that a look-up beside a change misses none.
//!
//! Buckets of seven entries and a count, one cache line each. A key that finds
//! its bucket full goes to the next one, and each bucket counts how many keys
//! went past it: a probe ends at a count of 0, and taking out leaves no mark. An
//! entry has 29 bits of the hash and the place, which is all that growing needs.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

/// Spreads keys over the array (2^64 / golden ratio): chain values are hashes
/// already, but need not be.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;
const SMALLEST: usize = if cfg!(loom) { 2 } else { 16 };
const WIDTH: usize = 7;

const SLOT_BITS: u32 = 9;
const RUN_BITS: u32 = 26;
const PLACE_BITS: u32 = SLOT_BITS + RUN_BITS;
const HASH_BITS: u32 = 64 - PLACE_BITS;

/// Values a run can have.
pub(crate) const MOST_SLOTS: usize = 1 << SLOT_BITS;
/// Runs that can be numbered; 0 is none.
pub(crate) const MOST_RUNS: usize = 1 << RUN_BITS;

/// Bytes a block costs in a table that has just grown.
pub(crate) const BYTES_A_BLOCK: usize = 23;

/// Where a value is kept: a run of values and the slot in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) run: usize,
    pub(crate) slot: usize,
}

impl Place {
    fn pack(self) -> u64 {
        (self.run as u64) << SLOT_BITS | self.slot as u64
    }

    fn unpack(entry: u64) -> Self {
        Self {
            run: (entry >> SLOT_BITS) as usize & (MOST_RUNS - 1),
            slot: entry as usize & (MOST_SLOTS - 1),
        }
    }
}

fn hash(key: u64) -> u64 {
    key.wrapping_mul(SPREAD) >> PLACE_BITS
}

/// Bits of a bucket's state below the count of keys that found it full: a bit
/// for each entry in use.
const USED_BITS: u32 = 8;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Bucket {
    /// 0 where free.
    entries: [AtomicU64; WIDTH],
    /// Which entries are in use, and how many keys went past.
    state: AtomicU64,
}

impl Bucket {
    fn state(&self) -> u64 {
        self.state.load(Ordering::Relaxed)
    }

    /// Whether no key went past, so that a probe ends here.
    fn is_last(&self) -> bool {
        self.state() >> USED_BITS == 0
    }

    /// Where a key with this hash is, if an entry here says so.
    fn held(&self, wanted: u64, holds: &impl Fn(Place) -> bool) -> Option<Place> {
        // Without branches: most buckets have no such entry, and which one it
        // is cannot be foretold.
        let alike = |entry: &AtomicU64| (entry.load(Ordering::Relaxed) ^ wanted) >> PLACE_BITS == 0;
        let any = self
            .entries
            .iter()
            .fold(false, |any, entry| any | alike(entry));
        if !any {
            return None;
        }
        let mut places = self
            .entries
            .iter()
            .filter(|entry| alike(entry))
            .filter_map(|entry| {
                let entry = entry.load(Ordering::Relaxed);
                (entry != 0).then(|| Place::unpack(entry))
            });
        places.find(|place| holds(*place))
    }

    fn free(&self) -> Option<usize> {
        let free = (!self.state()).trailing_zeros() as usize;
        (free < WIDTH).then_some(free)
    }

    /// Puts an entry where [`Bucket::free`] said, or 0 where one was.
    fn set(&self, at: usize, entry: u64) {
        // Released: who does not find a value any more sees what is known then.
        self.entries[at].store(entry, Ordering::Release);
        self.state.store(self.state() ^ 1 << at, Ordering::Relaxed);
    }
}

/// What [`Table::claim`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// The key is here already.
    Held(Place),
    /// It was not, and is now.
    Noted,
    /// It is not, and there is no room: a larger table is needed.
    Full,
}

/// What changes with the entries: apart from what look-ups read all the time.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counts {
    /// Entries. Only who changes the table reads and writes it.
    len: AtomicUsize,
    /// Entries that were ever taken out.
    gone: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Table {
    buckets: Vec<Bucket>,
    /// Most entries: above this share keys pass on often.
    most: usize,
    counts: Counts,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self::with_buckets(SMALLEST)
    }

    fn with_buckets(count: usize) -> Self {
        let mut buckets = Vec::new();
        buckets.resize_with(count, Bucket::default);
        Self {
            buckets,
            most: count * WIDTH * 78 / 100,
            counts: Counts::default(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.buckets.capacity() * size_of::<Bucket>()
    }

    fn home(&self, hash: u64) -> usize {
        (hash.wrapping_mul(self.buckets.len() as u64) >> HASH_BITS) as usize
    }

    fn after(&self, at: usize) -> usize {
        if at + 1 == self.buckets.len() {
            0
        } else {
            at + 1
        }
    }

    /// Reads the home buckets of some keys, so that their cache lines are on
    /// the way together: probing ends in branches that wait for memory one
    /// after the other. Returns nothing of meaning.
    pub(crate) fn warm(&self, keys: &[u64]) -> u64 {
        keys.iter().fold(0, |sum, key| {
            sum ^ self.buckets[self.home(hash(*key))].state()
        })
    }

    /// Where a key is. `holds` says whether a place holds it.
    pub(crate) fn find(&self, key: u64, holds: impl Fn(Place) -> bool) -> Option<Place> {
        let hash = hash(key);
        let mut at = self.home(hash);
        loop {
            let bucket = &self.buckets[at];
            if let Some(place) = bucket.held(hash << PLACE_BITS, &holds) {
                return Some(place);
            }
            if bucket.is_last() {
                return None;
            }
            at = self.after(at);
        }
    }

    /// Whether no copy had a key at some moment during this call. Also for who
    /// has none of the copies: there a key that is never without an entry may
    /// get one behind the probe, and lose the one before it.
    pub(crate) fn is_absent(&self, key: u64) -> bool {
        let gone = self.counts.gone.load(Ordering::Acquire);
        let found = self.find(key, |_| true);
        // What is read after this is no older than what was just read.
        fence(Ordering::Acquire);
        found.is_none() && self.counts.gone.load(Ordering::Relaxed) == gone
    }

    /// As [`Table::find`], and where the key is nowhere notes that it is at
    /// `place` now, in one probe.
    pub(crate) fn claim(&self, key: u64, place: Place, holds: impl Fn(Place) -> bool) -> Claim {
        let wanted = hash(key) << PLACE_BITS;
        let home = self.home(hash(key));
        let (mut at, mut spot) = (home, None);
        loop {
            let bucket = &self.buckets[at];
            if let Some(held) = bucket.held(wanted, &holds) {
                return Claim::Held(held);
            }
            spot = spot.or_else(|| Some((at, bucket.free()?)));
            if bucket.is_last() {
                break;
            }
            at = self.after(at);
        }
        if self.is_full() {
            return Claim::Full;
        }
        let (end, free) = loop {
            if let Some(spot) = spot {
                break spot;
            }
            at = self.after(at);
            spot = self.buckets[at].free().map(|free| (at, free));
        };
        self.pass(home, end, 1);
        self.buckets[end].set(free, wanted | place.pack());
        self.count(1);
        Claim::Noted
    }

    fn is_full(&self) -> bool {
        self.room() == 0
    }

    /// Entries that fit before a larger table is needed.
    pub(crate) fn room(&self) -> usize {
        self.most
            .saturating_sub(self.counts.len.load(Ordering::Relaxed))
    }

    fn count(&self, more: isize) {
        let len = self.counts.len.load(Ordering::Relaxed);
        self.counts
            .len
            .store(len.wrapping_add_signed(more), Ordering::Relaxed);
    }

    /// So many more keys went past the buckets from `home` to before `end`.
    fn pass(&self, home: usize, end: usize, more: i64) {
        let mut at = home;
        while at != end {
            let bucket = &self.buckets[at];
            let state = bucket.state().wrapping_add_signed(more << USED_BITS);
            bucket.state.store(state, Ordering::Relaxed);
            at = self.after(at);
        }
    }

    /// Notes that a key is at a place. Where the table is full, nothing is
    /// noted: a larger one is needed.
    #[must_use]
    pub(crate) fn insert(&self, key: u64, place: Place) -> bool {
        let fits = !self.is_full();
        if fits {
            self.count(1);
            self.put(hash(key) << PLACE_BITS | place.pack());
        }
        fits
    }

    fn put(&self, entry: u64) {
        let home = self.home(entry >> PLACE_BITS);
        let mut at = home;
        loop {
            if let Some(free) = self.buckets[at].free() {
                self.pass(home, at, 1);
                self.buckets[at].set(free, entry);
                return;
            }
            at = self.after(at);
        }
    }

    /// Takes out that a key is at a place; nothing where it was not noted.
    pub(crate) fn remove(&self, key: u64, place: Place) {
        let wanted = hash(key) << PLACE_BITS | place.pack();
        let home = self.home(hash(key));
        let mut at = home;
        loop {
            let bucket = &self.buckets[at];
            let mut entries = bucket.entries.iter();
            if let Some(entry) = entries.position(|entry| entry.load(Ordering::Relaxed) == wanted) {
                let gone = self.counts.gone.load(Ordering::Relaxed);
                self.counts
                    .gone
                    .store(gone.wrapping_add(1), Ordering::Release);
                bucket.set(entry, 0);
                break;
            }
            if bucket.is_last() {
                return;
            }
            at = self.after(at);
        }
        self.pass(home, at, -1);
        self.count(-1);
    }

    /// Entries.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.counts.len.load(Ordering::Relaxed)
    }

    /// Whether so few entries are left that a smaller table would do.
    pub(crate) fn is_sparse(&self) -> bool {
        let most = self.buckets.len() * WIDTH;
        self.buckets.len() > 16 * SMALLEST
            && self.counts.len.load(Ordering::Relaxed) * 10 < most * 3
    }

    /// A table with the same entries and room for as many more.
    pub(crate) fn resized(&self) -> Self {
        let len = self.counts.len.load(Ordering::Relaxed);
        let larger = Self::with_buckets((len * 5 / 2 / WIDTH).max(SMALLEST));
        for bucket in &self.buckets {
            for entry in &bucket.entries {
                let entry = entry.load(Ordering::Relaxed);
                if entry != 0 {
                    larger.put(entry);
                }
            }
        }
        larger.counts.len.store(len, Ordering::Relaxed);
        larger
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Keys that have the same home, so that they fill it and pass on.
    fn neighbours(table: &Table) -> Vec<u64> {
        let at_home = |key: &u64| table.home(hash(*key)) == 0;
        (1..).filter(at_home).take(WIDTH + 3).collect()
    }

    /// A reader that needs a key finds it, whatever is noted and taken out
    /// meanwhile, before it and behind it.
    #[test]
    fn a_key_is_found_while_others_come_and_go() {
        loom::model(|| {
            let table = loom::sync::Arc::new(Table::new());
            let keys = neighbours(&table);
            let place = |at: usize| Place {
                run: at + 1,
                slot: 0,
            };
            // The last of these, the one to be found, is in the next bucket.
            for (at, key) in keys[..WIDTH + 2].iter().enumerate() {
                assert!(table.insert(*key, place(at)));
            }
            let writer = {
                let (table, keys) = (table.clone(), keys.clone());
                loom::thread::spawn(move || {
                    table.remove(keys[WIDTH], place(WIDTH));
                    assert!(table.insert(keys[WIDTH + 2], place(WIDTH + 2)));
                })
            };
            let names: BTreeMap<u64, usize> =
                (0..).map(|at| (keys[at], at)).take(WIDTH + 3).collect();
            let wanted = keys[WIDTH + 1];
            let found = table.find(wanted, |at| at == place(names[&wanted]));
            assert_eq!(found, Some(place(WIDTH + 1)));
            writer.join().unwrap();
        });
    }
}
