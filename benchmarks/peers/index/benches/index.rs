//! How fast the index is on one core: `cargo bench` here. 500
//! prompts of 512 blocks over 64 workers, every twentieth on 8 of them, stored
//! in events of 32 blocks. `benchmarks/kv_index.py` has the whole workload.
#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvmesh_kv_index::{
    CacheChange, IndexSettings, Knowledge, KvIndex, Matches, Tier, WorkerSlot, chain_values,
};

const PROMPTS: u64 = 500;
const DEPTH: usize = 512;
const WORKERS: u64 = 64;

/// splitmix64.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn prompt(number: u64) -> Vec<u64> {
    (0..DEPTH as u64).map(|at| mix(number << 20 | at)).collect()
}

/// (worker, parent, values), the events of all prompts mixed.
fn events() -> Vec<(WorkerSlot, u64, Vec<u64>)> {
    let mut events = Vec::new();
    for number in 0..PROMPTS {
        let chain = prompt(number);
        for copy in 0..if number % 20 == 0 { 8 } else { 1 } {
            let worker = WorkerSlot(((mix(number) + copy * 7) % WORKERS) as u32);
            for (at, part) in chain.chunks(32).enumerate() {
                let parent = if at == 0 { 0 } else { chain[32 * at - 1] };
                // In order within a prompt, prompts mixed.
                let order = (at as u64) << 32 | mix(number * 31 + at as u64) >> 32;
                events.push((order, (worker, parent, part.to_vec())));
            }
        }
    }
    events.sort_by_key(|(order, _)| *order);
    events.into_iter().map(|(_, event)| event).collect()
}

fn empty() -> KvIndex {
    let index = KvIndex::new(IndexSettings::default());
    for _ in 0..WORKERS {
        index.add_worker(16, Knowledge::Events).unwrap();
    }
    index
}

fn store(index: &KvIndex, events: &[(WorkerSlot, u64, Vec<u64>)]) {
    for (worker, parent, chain) in events {
        let change = CacheChange::StoredAfter {
            parent: *parent,
            chain,
            tier: Tier::Device,
        };
        index.apply(*worker, &[change]).unwrap();
    }
}

fn hashing(c: &mut Criterion) {
    let ids: Vec<u32> = (0..8_192).map(|at| mix(at) as u32 % 32_000).collect();
    let mut group = c.benchmark_group("hash");
    group.throughput(Throughput::Elements(ids.len() as u64));
    group.bench_function("8,192 token ids", |b| b.iter(|| chain_values(7, &ids)));
    group.finish();
}

fn applying(c: &mut Criterion) {
    let events = events();
    let blocks: usize = events.iter().map(|(.., chain)| chain.len()).sum();
    let mut group = c.benchmark_group("apply");
    group
        .throughput(Throughput::Elements(blocks as u64))
        .sample_size(10);
    group.bench_function("stored, blocks", |b| {
        b.iter_batched_ref(empty, |index| store(index, &events), BatchSize::LargeInput);
    });
    group.finish();
}

fn looking_up(c: &mut Criterion) {
    let index = empty();
    store(&index, &events());
    let mut group = c.benchmark_group("look-up of 512 blocks");
    for hit in [0, 64, DEPTH] {
        let prompts: Vec<Vec<u64>> = (0..PROMPTS)
            .map(|number| {
                let mut chain = prompt(number);
                for (at, value) in chain.iter_mut().enumerate().skip(hit) {
                    *value = mix((number + 1) << 40 | at as u64);
                }
                chain
            })
            .collect();
        let mut found = Matches::default();
        let mut next = prompts.iter().cycle();
        group.bench_function(BenchmarkId::new("hit", hit), |b| {
            b.iter(|| {
                next.next()
                    .map(|chain| index.lookup_into(chain, &mut found))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, hashing, applying, looking_up);
criterion_main!(benches);
