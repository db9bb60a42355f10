//! How fast the index is on one core: `cargo run --release -p kvmesh-kv-index
//! --example index_speed`. The workload: 2,000 prefixes of 512 blocks over 64
//! workers, a twentieth of them on 8 workers, stored in runs of 32.
#![allow(clippy::unwrap_used)]

use kvmesh_kv_index::{
    CacheChange, IndexSettings, Knowledge, KvIndex, Matches, Tier, WorkerSlot, chain_values,
};
use std::time::Instant;

const PREFIXES: u64 = 2_000;
const DEPTH: usize = 512;
const WORKERS: u64 = 64;

fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn main() {
    let ids: Vec<u32> = (0..1u32 << 20)
        .map(|at| mix(u64::from(at)) as u32 % 32_000)
        .collect();
    let begin = Instant::now();
    let rounds = 64;
    for round in 0..rounds {
        std::hint::black_box(chain_values(round, &ids));
    }
    let rate = ids.len() as f64 * rounds as f64 / begin.elapsed().as_secs_f64() / 1e6;
    println!("hash: {rate:.0} M ids/s");

    let index = KvIndex::new(IndexSettings::default());
    let slots: Vec<WorkerSlot> = (0..WORKERS)
        .map(|_| index.add_worker(16, Knowledge::Events).unwrap())
        .collect();
    let chain =
        |prefix: u64| -> Vec<u64> { (0..DEPTH as u64).map(|at| mix(prefix << 20 | at)).collect() };
    let chains: Vec<Vec<u64>> = (0..PREFIXES).map(chain).collect();
    let mut runs = Vec::new();
    for (prefix, chain) in chains.iter().enumerate() {
        let copies = if prefix % 20 == 0 { 8 } else { 1 };
        for copy in 0..copies {
            let slot = slots[(mix(prefix as u64) as usize + copy * 7) % slots.len()];
            runs.extend(
                chain
                    .chunks(32)
                    .enumerate()
                    .map(|(at, part)| (mix((at * 4_001 + prefix) as u64), slot, part)),
            );
        }
    }
    runs.sort_by_key(|(order, ..)| *order);
    let blocks: usize = runs.iter().map(|(.., part)| part.len()).sum();
    let begin = Instant::now();
    for (_, slot, part) in &runs {
        index
            .apply(
                *slot,
                &[CacheChange::Stored {
                    chain: part,
                    tier: Tier::Device,
                }],
            )
            .unwrap();
    }
    let took = begin.elapsed().as_secs_f64();
    let stats = index.stats();
    println!(
        "apply: {:.2} M blocks/s ({blocks} blocks)",
        blocks as f64 / took / 1e6
    );
    println!(
        "memory: {:.1} bytes an entry ({stats:?})",
        stats.bytes as f64 / stats.entries as f64
    );

    for hit in [0, 64, DEPTH] {
        let mut times = Vec::new();
        let mut found = Matches::default();
        for round in 0..20_000u64 {
            let mut query = chains[(mix(round) % PREFIXES) as usize][..hit].to_vec();
            query.extend((hit as u64..DEPTH as u64).map(|at| mix(at | (round + 1) << 32)));
            let begin = Instant::now();
            index.lookup_into(&query, &mut found);
            times.push(begin.elapsed().as_nanos());
            assert!(
                found
                    .by_slot()
                    .iter()
                    .all(|tokens| *tokens as usize == 16 * hit || *tokens == 0)
            );
        }
        times.sort_unstable();
        let at = |share: f64| times[(times.len() as f64 * share) as usize] as f64 / 1e3;
        println!(
            "lookup of {DEPTH} blocks, hit {hit}: p50 {:.2} us, p99 {:.2} us",
            at(0.5),
            at(0.99)
        );
    }
}
