//! What a cluster's caches tell in a day, and whether the index stays as large
//! as it was. For one test a file, so that each has a process of its own: what
//! the kernel counts would else be that of other tests, too.
#![allow(clippy::unwrap_used)]

use kvmesh_kv_index::{CacheChange, IndexSettings, Knowledge, KvIndex, Tier, WorkerSlot};
use std::collections::VecDeque;

const WORKERS: usize = 64;
/// Blocks in an event: 512 tokens.
const BLOCKS: usize = 32;
/// Events in a day: 64 workers that each fill two events a second, which is
/// 1,024 new tokens a second, day and night.
pub(crate) const DAY: usize = WORKERS * 2 * 86_400;
/// Events that a worker holds, 65,536 tokens; then the oldest one goes.
const HELD: usize = 128;
/// Events of a worker after which it restarts: after eight minutes.
const LIFE: usize = 1_000;
/// Prompts that several workers hold at a time.
const SHARED: u64 = 256;
/// Samples in the whole time. The first ones are warm-up, the next ones say how
/// large it may be.
const SAMPLES: usize = 50;
const WARM: usize = 5;
const BASE: usize = 10;

/// splitmix64.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A part of a prompt that a worker stored: which prompt, and which part of it.
#[derive(Debug, Clone, Copy)]
struct Part {
    prompt: u64,
    at: u64,
}

impl Part {
    fn chain(self) -> [u64; BLOCKS] {
        let first = self.at * BLOCKS as u64;
        std::array::from_fn(|block| mix(self.prompt << 20 | (first + block as u64)))
    }

    fn parent(self) -> u64 {
        mix(self.prompt << 20 | (self.at * BLOCKS as u64).wrapping_sub(1) & 0xF_FFFF)
    }
}

struct Worker {
    slot: WorkerSlot,
    held: VecDeque<Part>,
    prompt: u64,
    /// Parts that the prompt still has, and how many went before.
    left: u64,
    at: u64,
    age: usize,
}

impl Worker {
    fn new(index: &KvIndex, age: usize) -> Self {
        Self {
            slot: index.add_worker(16, Knowledge::Events).unwrap(),
            held: VecDeque::new(),
            prompt: 0,
            left: 0,
            at: 0,
            age,
        }
    }

    /// The next part of what the worker computes: of a prompt of one to eight
    /// parts, a third of them shared, of which it holds none.
    fn next(&mut self, random: u64) -> Part {
        if self.left == 0 {
            let (kind, number) = (random % 3, random >> 8);
            self.prompt = match kind {
                0 => number % SHARED,
                _ => SHARED + number % (1 << 40),
            };
            if self.held.iter().any(|part| part.prompt == self.prompt) {
                self.prompt = SHARED + number % (1 << 40);
            }
            (self.left, self.at) = (1 + number % 8, 0);
        }
        let part = Part {
            prompt: self.prompt,
            at: self.at,
        };
        self.left -= 1;
        self.at += 1;
        part
    }

    fn step(&mut self, index: &KvIndex, random: u64) {
        let (part, tier) = (self.next(random), Tier::Device);
        let (chain, parent) = (part.chain(), part.parent());
        let chain = chain.as_slice();
        let stored = CacheChange::StoredAfter {
            parent,
            chain,
            tier,
        };
        index.apply(self.slot, &[stored]).unwrap();
        self.held.push_back(part);
        if self.held.len() > HELD {
            let chain = &self.held.pop_front().unwrap().chain();
            let removed = CacheChange::Removed { chain, tier };
            index.apply(self.slot, &[removed]).unwrap();
        }
        self.age += 1;
        if self.age == LIFE {
            index.remove_worker(self.slot).unwrap();
            *self = Self::new(index, 0);
        }
    }
}

/// Memory of this process in KiB (proc(5), status).
fn resident_kib() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.unwrap().trim().trim_end_matches(" kB");
    number.parse().unwrap()
}

/// So many events stored, and nearly as many removed: neither what the index
/// counts nor what the kernel counts grows after the first tenths, and once all
/// has gone, nothing is left.
pub(crate) fn leave_memory_flat(events: usize) {
    let index = KvIndex::new(IndexSettings::default());
    // They restart at different times.
    let mut workers: Vec<Worker> = (0..WORKERS)
        .map(|number| Worker::new(&index, number * LIFE / WORKERS))
        .collect();
    let mut samples = Vec::with_capacity(SAMPLES);
    for number in 0..events {
        workers[number % WORKERS].step(&index, mix(number as u64 ^ 1 << 50));
        if (number + 1) % (events / SAMPLES) == 0 {
            samples.push((index.stats().bytes / 1_024, resident_kib()));
        }
    }
    println!("{events} events; KiB counted and resident: {samples:?}");
    let most = |some: &[(usize, usize)]| {
        let counted = some.iter().map(|(counted, _)| *counted).max();
        (counted, some.iter().map(|(_, resident)| *resident).max())
    };
    let (base, later) = (most(&samples[WARM..BASE]), most(&samples[BASE..]));
    // A twentieth for how many blocks there are by chance.
    let flat = |base: Option<usize>, later: Option<usize>| later <= base.map(|kib| kib * 21 / 20);
    assert!(flat(base.0, later.0), "counted: {samples:?}");
    assert!(flat(base.1, later.1), "resident: {samples:?}");
    for worker in &workers {
        index.remove_worker(worker.slot).unwrap();
    }
    let stats = index.stats();
    assert_eq!((stats.blocks, stats.entries, stats.holder_sets), (0, 0, 0));
}
