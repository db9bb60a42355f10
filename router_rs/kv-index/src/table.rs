//! The map from chain value to the place where it is kept.
//!
//! Open addressing with linear probing, entries in the order of their hashes
//! (P. Celis, Robin Hood Hashing, 1986): a probe ends at the first larger hash,
//! taking out leaves no gap, and growing is one pass from front to back. An
//! entry has 29 bits of the hash and the place; whether the value is there is
//! asked of the place. Chain values are hashes already; one multiplication
//! spreads those that are not.

/// Spreads keys over the array (2^64 / golden ratio).
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;
const SMALLEST: usize = 64;
/// Free entries at the end when the array is made; more come as needed.
const SPILL: usize = 64;

const SLOT_BITS: u32 = 9;
const RUN_BITS: u32 = 26;
const PLACE_BITS: u32 = SLOT_BITS + RUN_BITS;
const HASH_BITS: u32 = 64 - PLACE_BITS;

/// Values a run can have.
pub(crate) const MOST_SLOTS: usize = 1 << SLOT_BITS;
/// Runs that can be numbered; 0 is none.
pub(crate) const MOST_RUNS: usize = 1 << RUN_BITS;

/// Bytes a block costs in a table that has just grown.
pub(crate) const BYTES_A_BLOCK: usize = 14;

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

#[derive(Debug)]
pub(crate) struct Table {
    /// 0 where free. The last one always is.
    entries: Vec<u64>,
    /// Entries that hashes are spread over.
    homes: usize,
    len: usize,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            entries: vec![0; SMALLEST + SPILL],
            homes: SMALLEST,
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<u64>()
    }

    fn home(&self, hash: u64) -> usize {
        ((hash * self.homes as u64) >> HASH_BITS) as usize
    }

    /// Reads the home entries of some keys, so that their cache lines are on
    /// the way together: probing ends in branches that wait for memory one
    /// after the other. Returns nothing of meaning.
    pub(crate) fn warm(&self, keys: &[u64]) -> u64 {
        keys.iter()
            .fold(0, |sum, key| sum ^ self.entries[self.home(hash(*key))])
    }

    /// Where a key is. `holds` says whether a place holds it.
    pub(crate) fn find(&self, key: u64, holds: impl Fn(Place) -> bool) -> Option<Place> {
        let hash = hash(key);
        for entry in &self.entries[self.home(hash)..] {
            let here = entry >> PLACE_BITS;
            if *entry == 0 || here > hash {
                break;
            }
            if here == hash {
                let place = Place::unpack(*entry);
                if holds(place) {
                    return Some(place);
                }
            }
        }
        None
    }

    /// Notes a key that is not here yet.
    pub(crate) fn insert(&mut self, key: u64, place: Place) {
        // Above this share probes grow long faster than memory shrinks.
        if self.len * 4 >= self.homes * 3 {
            self.resize(self.homes + self.homes / 4);
        }
        let mut carried = hash(key) << PLACE_BITS | place.pack();
        let mut at = self.home(hash(key));
        while self.entries[at] != 0 && self.entries[at] < carried {
            at += 1;
        }
        while carried != 0 {
            std::mem::swap(&mut self.entries[at], &mut carried);
            at += 1;
        }
        if at == self.entries.len() {
            self.entries.resize(at + SPILL, 0);
        }
        self.len += 1;
    }

    /// Takes out a key that is at a place.
    pub(crate) fn remove(&mut self, key: u64, place: Place) {
        let wanted = hash(key) << PLACE_BITS | place.pack();
        let mut at = self.home(hash(key));
        while self.entries[at] != wanted {
            if self.entries[at] == 0 || self.entries[at] > wanted {
                return;
            }
            at += 1;
        }
        // Those behind it that are not at home move up.
        loop {
            let next = self.entries[at + 1];
            if next == 0 || self.home(next >> PLACE_BITS) > at {
                break;
            }
            self.entries[at] = next;
            at += 1;
        }
        self.entries[at] = 0;
        self.len -= 1;
        if self.homes > 16 * SMALLEST && self.len * 4 < self.homes {
            self.resize(self.len * 5 / 3);
        }
    }

    fn resize(&mut self, homes: usize) {
        self.homes = homes;
        let mut entries = Vec::with_capacity(homes + SPILL);
        for entry in std::mem::take(&mut self.entries) {
            if entry != 0 {
                let at = self.home(entry >> PLACE_BITS).max(entries.len());
                entries.resize(at, 0);
                entries.push(entry);
            }
        }
        let length = homes.max(entries.len()) + SPILL;
        entries.resize(length, 0);
        self.entries = entries;
    }
}
