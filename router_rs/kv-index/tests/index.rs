//! What the index promises beside exactness: bounds, whole batches,
//! harmless collisions, approximate workers.
#![allow(clippy::unwrap_used)]

use kvmesh_kv_index::{
    CacheChange, IndexSettings, Knowledge, KvIndex, Matches, SlotError, Tier, WorkerSlot,
    chain_values, namespace_root,
};
use std::sync::atomic::{AtomicBool, Ordering};

fn stored(chain: &[u64]) -> [CacheChange<'_>; 1] {
    [CacheChange::Stored {
        chain,
        tier: Tier::Device,
    }]
}

fn exact(index: &KvIndex) -> WorkerSlot {
    index.add_worker(16, Knowledge::Events).unwrap()
}

fn prompt(seed: u32, units: usize) -> Vec<u64> {
    let ids: Vec<u32> = (0..units as u32 * 16)
        .map(|at| at.wrapping_mul(2_654_435_761) ^ seed)
        .collect();
    chain_values(namespace_root("m", "", ""), &ids)
}

#[test]
fn namespaces_are_apart_and_cannot_be_confused() {
    let roots = [
        namespace_root("ab", "c", ""),
        namespace_root("a", "bc", ""),
        namespace_root("ab", "", "c"),
        namespace_root("", "ab", "c"),
        namespace_root("ab", "c", "\0"),
    ];
    for (at, root) in roots.iter().enumerate() {
        assert!(!roots[..at].contains(root));
    }
    let ids: Vec<u32> = (0..32).collect();
    assert_ne!(chain_values(roots[0], &ids), chain_values(roots[1], &ids));
    assert_eq!(
        chain_values(roots[0], &ids[..31]),
        chain_values(roots[0], &ids)[..1]
    );
}

#[test]
fn a_thousand_workers_are_told_apart() {
    let index = KvIndex::new(IndexSettings::default());
    let chain = prompt(1, 32);
    let slots: Vec<WorkerSlot> = (0..1_024).map(|_| exact(&index)).collect();
    for (w, slot) in slots.iter().enumerate() {
        index.apply(*slot, &stored(&chain[..w % 33])).unwrap();
    }
    let found = index.lookup(&chain);
    for (w, slot) in slots.iter().enumerate() {
        assert_eq!(found.tokens(*slot) as usize, w % 33 * 16);
    }
    assert_eq!(index.stats().holder_sets, 32);
}

#[test]
fn block_sizes_of_16_32_and_512_share_a_pool() {
    let index = KvIndex::new(IndexSettings::default());
    let chain = prompt(1, 100);
    for (units, held) in [(1usize, 99), (2, 98), (32, 96)] {
        let slot = index
            .add_worker(16 * units as u32, Knowledge::Events)
            .unwrap();
        let ends: Vec<u64> = chain
            .iter()
            .skip(units - 1)
            .step_by(units)
            .take(held / units)
            .copied()
            .collect();
        index.apply(slot, &stored(&ends)).unwrap();
    }
    assert_eq!(index.lookup(&chain).by_slot(), [99 * 16, 98 * 16, 96 * 16]);
    assert_eq!(
        index.lookup(&chain[..33]).by_slot(),
        [33 * 16, 32 * 16, 32 * 16]
    );
}

#[test]
fn slots_are_used_again_and_start_empty() {
    let index = KvIndex::new(IndexSettings {
        max_workers: 2,
        ..IndexSettings::default()
    });
    let (a, b) = (exact(&index), exact(&index));
    assert_eq!(
        index.add_worker(16, Knowledge::Events),
        Err(SlotError::Full(2))
    );
    let chain = prompt(1, 4);
    index.apply(a, &stored(&chain)).unwrap();
    index.apply(b, &stored(&chain)).unwrap();
    index.remove_worker(a).unwrap();
    assert_eq!(
        index.apply(a, &stored(&chain)),
        Err(SlotError::Unknown(a.0))
    );
    assert_eq!(index.lookup(&chain).by_slot(), [0, 64]);
    assert_eq!(index.add_worker(32, Knowledge::Events), Ok(a));
    assert_eq!(index.lookup(&chain).by_slot(), [0, 64]);
    assert_eq!(
        index.add_worker(24, Knowledge::Events),
        Err(SlotError::BlockSize(24))
    );
}

/// Two prompts whose values collide from the third unit on: the index then
/// says that a worker has the other one's blocks too, and stays whole.
#[test]
fn a_planted_collision_is_only_a_wrong_guess() {
    let index = KvIndex::new(IndexSettings::default());
    let (a, b) = (exact(&index), exact(&index));
    let (first, mut second) = (prompt(1, 6), prompt(2, 6));
    second[2..].copy_from_slice(&first[2..]);
    index.apply(a, &stored(&first)).unwrap();
    index.apply(b, &stored(&second)).unwrap();
    assert_eq!(index.lookup(&second).by_slot(), [0, 96]);
    index
        .apply(
            a,
            &[CacheChange::Removed {
                chain: &first,
                tier: Tier::Device,
            }],
        )
        .unwrap();
    index
        .apply(
            b,
            &[CacheChange::Removed {
                chain: &second,
                tier: Tier::Device,
            }],
        )
        .unwrap();
    assert_eq!(index.stats().entries, 0);
    assert_eq!(index.stats().blocks, 0);
}

#[test]
fn an_answer_is_used_again_with_a_larger_index_and_with_another_one() {
    let mut found = Matches::default();
    for seeds in [0..2_000, 5_000..5_003] {
        let index = KvIndex::new(IndexSettings::default());
        let slot = exact(&index);
        for seed in seeds {
            let chain = prompt(seed, 4);
            index.lookup_into(&chain, &mut found);
            assert_eq!(found.by_slot(), [0]);
            index.apply(slot, &stored(&chain)).unwrap();
            index.lookup_into(&chain, &mut found);
            assert_eq!(found.by_slot(), [64]);
        }
    }
}

#[test]
fn what_is_lost_and_what_a_new_block_size_brings_is_seen() {
    let index = KvIndex::new(IndexSettings::default());
    let (slot, chain) = (exact(&index), prompt(1, 4));
    let mut found = Matches::default();
    index.apply(slot, &stored(&chain)).unwrap();
    index.apply(slot, &[CacheChange::Cleared]).unwrap();
    index.lookup_into(&chain, &mut found);
    assert_eq!(found.by_slot(), [0]);
    let second = index.add_worker(32, Knowledge::Events).unwrap();
    index.apply(second, &stored(&chain[1..2])).unwrap();
    index.lookup_into(&chain, &mut found);
    assert_eq!(found.by_slot(), [0, 32]);
    index.remove_worker(slot).unwrap();
    index.lookup_into(&chain, &mut found);
    assert_eq!(found.by_slot(), [0, 32]);
    index.lookup_into(&chain[..1], &mut found);
    assert_eq!(found.by_slot(), [0, 0]);
}

#[test]
fn storing_at_once_is_refused_where_it_may_take_long() {
    let index = KvIndex::new(IndexSettings::default());
    let (slot, tier, chain) = (exact(&index), Tier::Device, prompt(1, 2_000));
    assert!(index.try_store(slot, None, &chain, tier).is_none());
    assert_eq!(index.stats().entries, 0);
    assert_eq!(
        index.try_store(slot, None, &chain[..32], tier),
        Some(Ok(()))
    );
    let parent = Some(chain[31]);
    let after = index.try_store(slot, parent, &chain[32..40], tier);
    assert_eq!(after, Some(Ok(())));
    assert_eq!(index.lookup(&chain).tokens(slot), 640);
    let unknown = WorkerSlot(7);
    assert_eq!(
        index.try_store(unknown, None, &chain[..1], tier),
        Some(Err(SlotError::Unknown(7)))
    );
}

#[test]
fn changes_of_several_workers_are_made_together_or_not_at_all() {
    let index = KvIndex::new(IndexSettings::default());
    let (a, b) = (exact(&index), exact(&index));
    let (chain, tier) = (prompt(1, 40), Tier::Device);
    let (first, rest) = chain.split_at(20);
    let parent = first[19];
    let changes = [
        (a, CacheChange::Stored { chain: first, tier }),
        (
            b,
            CacheChange::Stored {
                chain: &chain,
                tier,
            },
        ),
        (
            a,
            CacheChange::StoredAfter {
                parent,
                chain: rest,
                tier,
            },
        ),
        (
            b,
            CacheChange::Removed {
                chain: &rest[10..],
                tier,
            },
        ),
    ];
    let missing = WorkerSlot(7);
    let wrong = [changes[0], (missing, CacheChange::Cleared)];
    assert_eq!(index.apply_many(&wrong), Err(SlotError::Unknown(7)));
    assert_eq!(index.stats().blocks, 0);
    index.apply_many(&changes).unwrap();
    assert_eq!(index.lookup(&chain).by_slot(), [640, 480]);
    index
        .apply_many(&[(a, CacheChange::Cleared), changes[3]])
        .unwrap();
    assert_eq!(index.lookup(&chain).by_slot(), [0, 480]);
}

#[test]
fn the_old_view_stays_until_a_snapshot_is_whole() {
    let index = KvIndex::new(IndexSettings::default());
    let slot = exact(&index);
    let chain = prompt(1, 8);
    index.apply(slot, &stored(&chain)).unwrap();
    index
        .snapshot(slot, &stored(&chain[..2]), true, false)
        .unwrap();
    assert_eq!(index.lookup(&chain).tokens(slot), 128);
    index
        .snapshot(slot, &stored(&chain[2..3]), false, true)
        .unwrap();
    assert_eq!(index.lookup(&chain).tokens(slot), 48);
}

#[test]
fn snapshots_that_wait_for_their_last_part_share_the_bound() {
    let settings = IndexSettings {
        max_bytes: 16 * 100,
        max_workers: 8,
    };
    let index = KvIndex::new(settings);
    let chain = prompt(3, 80);
    let workers = [exact(&index), exact(&index)];
    let empty = index.stats().bytes;
    for worker in workers {
        index
            .snapshot(worker, &stored(&chain), true, false)
            .unwrap();
    }
    assert_eq!(index.stats().bytes, empty + 16 * 100);
    // The one that came first has all of its blocks, the other one what was left.
    let staged = index.stats().bytes;
    index
        .snapshot(workers[1], &stored(&chain), false, false)
        .unwrap();
    assert_eq!(index.stats().bytes, staged);
    // One that begins anew gives its part back.
    index.snapshot(workers[0], &[], true, false).unwrap();
    assert_eq!(index.stats().bytes, staged - 16 * 80);
    for worker in workers {
        index.snapshot(worker, &[], true, true).unwrap();
    }
    assert!(index.stats().bytes <= staged - 16 * 100);
}

#[test]
fn the_coldest_blocks_go_first_and_memory_is_bounded() {
    let settings = IndexSettings {
        max_bytes: 1 << 20,
        max_workers: 8,
    };
    let index = KvIndex::new(settings.clone());
    let slot = exact(&index);
    let hot = prompt(0, 64);
    index.apply(slot, &stored(&hot)).unwrap();
    for seed in 1..2_000 {
        index.apply(slot, &stored(&prompt(seed, 64))).unwrap();
        assert_eq!(
            index.lookup(&hot).tokens(slot),
            1_024,
            "after {seed} prompts"
        );
    }
    let stats = index.stats();
    assert!(stats.evicted > 90_000, "{stats:?}");
    assert!(stats.bytes <= settings.max_bytes, "{stats:?}");
    assert!(stats.blocks > 10_000, "{stats:?}");
}

/// docs/kv-index.md, "Bounds".
#[test]
fn memory_is_bounded_as_the_page_says_however_long_prompts_are() {
    let settings = IndexSettings {
        max_bytes: 1 << 20,
        max_workers: 8,
    };
    let fill = |index: &KvIndex, slot, units: usize, seed: u32| {
        let before = index.stats().evicted;
        for at in 0..(60_000 / units) as u32 {
            index
                .apply(slot, &stored(&prompt(seed + at, units)))
                .unwrap();
        }
        assert!(index.stats().evicted > before, "nothing had to go");
    };
    for units in [1, 8, 64, 512] {
        let index = KvIndex::new(settings.clone());
        let slot = exact(&index);
        fill(&index, slot, units, 0);
        let stats = index.stats();
        assert!(
            stats.bytes <= settings.max_bytes,
            "{units} units: {stats:?}"
        );
        assert!(
            stats.bytes > settings.max_bytes * 3 / 4,
            "{units} units: {stats:?}"
        );
    }
    // What other lengths needed is given back.
    let index = KvIndex::new(settings.clone());
    let slot = exact(&index);
    for (round, units) in [1, 512, 8, 64, 1].into_iter().enumerate() {
        fill(&index, slot, units, 100_000 * round as u32);
        let stats = index.stats();
        assert!(
            stats.bytes <= settings.max_bytes,
            "{units} units: {stats:?}"
        );
        assert!(
            stats.bytes > settings.max_bytes * 3 / 4,
            "{units} units: {stats:?}"
        );
    }
}

#[test]
fn approximate_workers_hold_what_was_sent_until_it_is_old() {
    let index = KvIndex::new(IndexSettings::default());
    let slot = index
        .add_worker(
            32,
            Knowledge::Approximate {
                ttl_ms: 100,
                max_units: 6,
            },
        )
        .unwrap();
    let chain = prompt(1, 9);
    index.record_sent(slot, &chain, 0).unwrap();
    assert_eq!(index.lookup(&chain).tokens(slot), 128);
    index.record_sent(slot, &chain[..4], 50).unwrap();
    index.expire(100);
    assert_eq!(index.lookup(&chain).tokens(slot), 64);
    index.expire(150);
    assert_eq!(index.lookup(&chain).tokens(slot), 0);
    assert_eq!(index.stats().blocks, 0);
    for seed in 0..10 {
        index.record_sent(slot, &prompt(seed, 8), 200).unwrap();
        assert!(index.stats().blocks <= 6);
        assert_eq!(index.lookup(&prompt(seed, 8)).tokens(slot), 128);
    }
    // What expires at the moment it is sent again stays.
    index.record_sent(slot, &prompt(9, 8), 300).unwrap();
    assert_eq!(index.lookup(&prompt(9, 8)).tokens(slot), 128);
}

/// Readers beside a writer that swaps a whole prompt in and out: they see all
/// of a batch or nothing of it.
#[test]
fn a_batch_is_visible_whole() {
    let index = KvIndex::new(IndexSettings::default());
    let (a, b) = (exact(&index), exact(&index));
    let chain = prompt(1, 200);
    let stop = AtomicBool::new(false);
    index.apply(b, &stored(&chain[..1])).unwrap();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut seen = [0u64; 2];
                    while !stop.load(Ordering::Relaxed) || seen.contains(&0) {
                        let found = index.lookup(&chain);
                        let tokens = found.tokens(a);
                        assert!(tokens == 0 || tokens == 3_200, "{tokens}");
                        assert_eq!(found.tokens(b), 16);
                        seen[usize::from(tokens > 0)] += 1;
                    }
                })
            })
            .collect();
        for round in 0..5_000 {
            index.apply(a, &stored(&chain)).unwrap();
            let removed = [CacheChange::Removed {
                chain: &chain,
                tier: Tier::Device,
            }];
            index
                .apply(
                    a,
                    if round % 2 == 0 {
                        &removed
                    } else {
                        &[CacheChange::Cleared]
                    },
                )
                .unwrap();
        }
        // Until every reader has seen both views.
        stop.store(true, Ordering::Relaxed);
        while readers.iter().any(|reader| !reader.is_finished()) {
            index.apply(a, &stored(&chain)).unwrap();
            index.apply(a, &[CacheChange::Cleared]).unwrap();
        }
        for reader in readers {
            reader.join().unwrap();
        }
    });
}
