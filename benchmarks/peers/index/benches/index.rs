//! How fast the index is on one core, on the workload of `benchmarks/kv_index.py`: `make bench-index`
//! writes it to the folder that INDEX_WORKLOAD names, and runs this.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../src/workload.rs"]
mod workload;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvmesh_kv_index::{
    CacheChange, IndexSettings, Knowledge, KvIndex, Matches, Tier, WorkerSlot, chain_values,
};
use std::path::PathBuf;
use workload::{Event, Query};

/// As the workload has it.
const WORKERS: u32 = 64;
const DEPTH: usize = 512;

fn folder() -> PathBuf {
    match std::env::var_os("INDEX_WORKLOAD") {
        Some(folder) => folder.into(),
        None => panic!("INDEX_WORKLOAD names no folder with the workload: run make bench-index"),
    }
}

fn events() -> Vec<Event> {
    workload::events(&folder().join("events")).unwrap()
}

fn queries() -> Vec<Query> {
    workload::queries(&folder().join("queries")).unwrap()
}

fn empty() -> KvIndex {
    let index = KvIndex::new(IndexSettings::default());
    for _ in 0..WORKERS {
        index.add_worker(16, Knowledge::Events).unwrap();
    }
    index
}

fn store(index: &KvIndex, events: &[Event]) {
    for event in events {
        let (chain, tier) = (event.chain.as_slice(), Tier::Device);
        let change = match event.parent {
            Some(parent) => CacheChange::StoredAfter {
                parent,
                chain,
                tier,
            },
            None => CacheChange::Stored { chain, tier },
        };
        index.apply(WorkerSlot(event.worker as u32), &[change]).unwrap();
    }
}

fn hashing(c: &mut Criterion) {
    let ids: Vec<u32> = (0..8_192u32).map(|at| at.wrapping_mul(0x9E37_79B9) % 32_000).collect();
    let mut group = c.benchmark_group("hash");
    group.throughput(Throughput::Elements(ids.len() as u64));
    group.bench_function("8,192 token ids", |b| b.iter(|| chain_values(7, &ids)));
    group.finish();
}

fn applying(c: &mut Criterion) {
    let events = events();
    let blocks: usize = events.iter().map(|event| event.chain.len()).sum();
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
    let queries = queries();
    for hit in [0, 64, DEPTH] {
        let prompts: Vec<&Query> = queries.iter().filter(|query| query.hit == hit).collect();
        assert!(!prompts.is_empty(), "no prompt of which {hit} blocks are held");
        let mut found = Matches::default();
        let mut next = prompts.iter().cycle();
        group.bench_function(BenchmarkId::new("hit", hit), |b| {
            b.iter(|| {
                next.next()
                    .map(|query| index.lookup_into(&query.chain, &mut found))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, hashing, applying, looking_up);
criterion_main!(benches);
