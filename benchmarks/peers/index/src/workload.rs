//! The workload as `benchmarks/kv_index.py` writes it: u64s, little-endian.
//!
//! File of events: number of events, then for each: worker, 1 if it has a
//! parent, parent, number of blocks, their chain values, their local hashes.
//! File of queries: number, length in blocks, then for each its hit depth, its
//! chain values and its local hashes.

use std::path::Path;

/// Blocks that a worker stored.
pub struct Event {
    pub worker: u64,
    pub parent: Option<u64>,
    pub chain: Vec<u64>,
    pub local: Vec<u64>,
}

/// A prompt to look up.
pub struct Query {
    /// Blocks of it that somebody holds.
    pub hit: usize,
    pub chain: Vec<u64>,
    pub local: Vec<u64>,
}

struct Words(std::vec::IntoIter<u64>);

impl Words {
    fn read(path: &Path) -> std::io::Result<Self> {
        let bytes = std::fs::read(path)?;
        let words = bytes.as_chunks::<8>().0.iter();
        Ok(Self(words.map(|word| u64::from_le_bytes(*word)).collect::<Vec<_>>().into_iter()))
    }

    fn next(&mut self) -> u64 {
        self.0.next().expect("the file ends too early")
    }

    fn take(&mut self, count: usize) -> Vec<u64> {
        (0..count).map(|_| self.next()).collect()
    }
}

pub fn events(path: &Path) -> std::io::Result<Vec<Event>> {
    let mut words = Words::read(path)?;
    let count = words.next();
    let event = |_| {
        let worker = words.next();
        let (has_parent, parent) = (words.next(), words.next());
        let blocks = words.next() as usize;
        Event {
            worker,
            parent: (has_parent == 1).then_some(parent),
            chain: words.take(blocks),
            local: words.take(blocks),
        }
    };
    Ok((0..count).map(event).collect())
}

pub fn queries(path: &Path) -> std::io::Result<Vec<Query>> {
    let mut words = Words::read(path)?;
    let (count, length) = (words.next(), words.next() as usize);
    let query = |_| Query {
        hit: words.next() as usize,
        chain: words.take(length),
        local: words.take(length),
    };
    Ok((0..count).map(query).collect())
}
