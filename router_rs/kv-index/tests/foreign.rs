//! Events of engines that hash in a way of their own.
#![allow(clippy::unwrap_used)]

use kvmesh_kv_index::{
    CacheChange, Dropped, Foreign, ForeignBlocks, Heard, IndexSettings, Knowledge, KvIndex, Tier,
    chain_values, namespace_root,
};

fn ids(blocks: usize, block_tokens: usize) -> Vec<u32> {
    (0..(blocks * block_tokens) as u32)
        .map(|id| id * 7 + 3)
        .collect()
}

fn blocks<'a>(parent: Option<u64>, hashes: &'a [u64], ids: &'a [u32]) -> ForeignBlocks<'a> {
    ForeignBlocks {
        parent,
        hashes,
        ids,
        block_tokens: 32,
        group: 0,
        tier: Tier::Device,
        extra_keys: false,
    }
}

#[test]
fn a_foreign_engines_blocks_are_found_by_own_names_until_it_drops_them() {
    let (root, ids) = (namespace_root("m", "adapter", "salt"), ids(4, 32));
    let chain = chain_values(root, &ids);
    let mut foreign = Foreign::new(100, 0);
    let index = KvIndex::new(IndexSettings::default());
    let worker = index.add_worker(32, Knowledge::Events).unwrap();
    let parts = [
        (None, [901, 902], &ids[..64]),
        (Some(902), [903, 904], &ids[64..]),
    ];
    for (parent, hashes, ids) in parts {
        let own = foreign.stored(root, &blocks(parent, &hashes, ids)).unwrap();
        let (parent, chain, tier) = (own.parent, own.chain.as_slice(), Tier::Device);
        let change = CacheChange::StoredAfter {
            parent,
            chain,
            tier,
        };
        index.apply(worker, &[change]).unwrap();
    }
    assert_eq!(index.lookup(&chain).tokens(worker), 128);
    let gone = foreign.removed(0, Tier::Device, &[904, 903, 777]);
    assert_eq!(gone, [chain[7], chain[5]]);
    let (chain_gone, tier) = (gone.as_slice(), Tier::Device);
    let change = CacheChange::Removed {
        chain: chain_gone,
        tier,
    };
    index.apply(worker, &[change]).unwrap();
    assert_eq!(index.lookup(&chain).tokens(worker), 64);
    assert_eq!(foreign.stats().names, 2);
}

#[test]
fn a_removal_in_a_group_that_is_not_followed_removes_nothing() {
    let (root, ids) = (namespace_root("m", "", ""), ids(2, 32));
    let mut foreign = Foreign::new(100, 3);
    let told = ForeignBlocks {
        group: 3,
        ..blocks(None, &[1, 2], &ids)
    };
    let own = foreign.stored(root, &told).unwrap();
    // The other groups have the same hashes, and lose the blocks earlier.
    for group in [0, 4] {
        assert!(foreign.removed(group, Tier::Device, &[1, 2]).is_empty());
    }
    assert_eq!(foreign.stats().names, 2);
    assert_eq!(foreign.removed(3, Tier::Device, &[1, 2]), own.chain);
    assert_eq!(foreign.stats().names, 0);
}

#[test]
fn a_block_in_two_tiers_is_known_until_it_is_gone_from_both() {
    let (root, ids) = (namespace_root("m", "", ""), ids(2, 32));
    let chain = chain_values(root, &ids);
    let mut foreign = Foreign::new(100, 0);
    let index = KvIndex::new(IndexSettings::default());
    let worker = index.add_worker(32, Knowledge::Events).unwrap();
    let held = |foreign: &Foreign| {
        let found = index.lookup(&chain);
        let tokens = (found.tokens(worker), found.host_tokens(worker));
        (tokens, foreign.stats().names)
    };
    for tier in [Tier::Device, Tier::Host] {
        let told = ForeignBlocks {
            tier,
            ..blocks(None, &[1, 2], &ids)
        };
        let own = foreign.stored(root, &told).unwrap();
        let chain = own.chain.as_slice();
        let change = CacheChange::Stored { chain, tier };
        index.apply(worker, &[change]).unwrap();
    }
    let removes = |foreign: &mut Foreign, tier, hashes: &[u64]| {
        let gone = foreign.removed(0, tier, hashes);
        let change = CacheChange::Removed { chain: &gone, tier };
        index.apply(worker, &[change]).unwrap();
        gone.len()
    };
    // The device drops them: the host still has them, and says so later.
    assert_eq!(removes(&mut foreign, Tier::Device, &[1, 2]), 2);
    assert_eq!(held(&foreign), ((64, 64), 2));
    assert_eq!(removes(&mut foreign, Tier::Device, &[1, 2]), 0);
    assert_eq!(removes(&mut foreign, Tier::Disk, &[1, 2]), 0);
    assert_eq!(held(&foreign), ((64, 64), 2));
    assert_eq!(removes(&mut foreign, Tier::Host, &[2]), 1);
    assert_eq!(held(&foreign), ((32, 32), 1));
    assert_eq!(removes(&mut foreign, Tier::Host, &[1]), 1);
    assert_eq!(held(&foreign), ((0, 0), 0));
    assert_eq!(index.stats().entries, 0);
}

#[test]
fn what_can_no_longer_be_removed_by_name_is_told_with_every_tier() {
    let root = namespace_root("m", "", "");
    let (first, second) = (ids(1, 32), ids(2, 32)[32..].to_vec());
    for (most, hash) in [(1, 2), (100, 1)] {
        // For want of room, and since another block took its name.
        let mut foreign = Foreign::new(most, 0);
        let mut stored = |hash, ids: &[u32], tier| {
            let hashes = [hash];
            let told = ForeignBlocks {
                tier,
                ..blocks(None, &hashes, ids)
            };
            foreign.stored(root, &told).unwrap()
        };
        let own = stored(1, &first, Tier::Host).chain[0];
        assert!(stored(1, &first, Tier::Disk).forgotten.is_empty());
        let forgotten = stored(hash, &second, Tier::Device).forgotten;
        assert_eq!(forgotten, [(own, Tier::Host), (own, Tier::Disk)]);
        assert_eq!(foreign.stats().names, 1);
    }
}

#[test]
fn nothing_is_guessed() {
    let (root, ids) = (namespace_root("m", "", ""), ids(1, 32));
    let mut foreign = Foreign::new(100, 0);
    let known = blocks(None, &[1], &ids);
    let cases = [
        (blocks(Some(5), &[6], &ids), Dropped::UnknownParent),
        (ForeignBlocks { group: 1, ..known }, Dropped::Group),
        (
            ForeignBlocks {
                extra_keys: true,
                ..known
            },
            Dropped::ExtraKeys,
        ),
        (
            ForeignBlocks {
                block_tokens: 24,
                ..known
            },
            Dropped::Shape {
                block_tokens: 24,
                ids: 32,
                blocks: 1,
            },
        ),
        (
            ForeignBlocks {
                block_tokens: 16,
                ..known
            },
            Dropped::Shape {
                block_tokens: 16,
                ids: 32,
                blocks: 1,
            },
        ),
        (
            ForeignBlocks {
                block_tokens: 0,
                ..known
            },
            Dropped::Shape {
                block_tokens: 0,
                ids: 32,
                blocks: 1,
            },
        ),
    ];
    for (told, why) in cases {
        assert_eq!(foreign.stored(root, &told), Err(why));
    }
    // A block after a dropped one is dropped as well.
    assert_eq!(
        foreign.stored(root, &blocks(Some(6), &[7], &ids)),
        Err(Dropped::UnknownParent)
    );
    let stats = foreign.stats();
    assert_eq!(
        (stats.names, stats.unknown_parent, stats.ignored),
        (0, 2, 5)
    );
}

#[test]
fn names_are_bounded_and_what_is_forgotten_is_told() {
    let root = namespace_root("m", "", "");
    let mut foreign = Foreign::new(3, 0);
    let mut live = std::collections::BTreeSet::new();
    for number in 0..200u64 {
        let ids: Vec<u32> = (0..32).map(|id| id + 100 * number as u32).collect();
        let own = foreign
            .stored(root, &blocks(None, &[number], &ids))
            .unwrap();
        live.extend(own.chain);
        for (value, tier) in own.forgotten {
            assert_eq!(tier, Tier::Device);
            assert!(live.remove(&value));
        }
        assert!(foreign.stats().names <= 3);
        assert_eq!(live.len(), foreign.stats().names);
    }
    // The same block again and again leaves memory flat, and is not forgotten.
    let before = foreign.stats().bytes;
    for _ in 0..1_000 {
        let ids: Vec<u32> = (0..32).collect();
        let own = foreign.stored(root, &blocks(None, &[7], &ids)).unwrap();
        assert!(!own.forgotten.contains(&(own.chain[0], Tier::Device)));
    }
    assert!(foreign.stats().bytes <= 2 * before);
}

#[test]
fn a_gap_is_told_and_an_event_heard_twice_is_ignored() {
    let mut foreign = Foreign::new(10, 0);
    assert_eq!(foreign.hear(41), Heard::Next);
    assert_eq!(foreign.hear(42), Heard::Next);
    assert_eq!(foreign.hear(42), Heard::Again);
    assert_eq!(foreign.hear(45), Heard::Missed(43));
    // A replay closes it.
    assert_eq!(foreign.hear(43), Heard::Next);
    assert_eq!(foreign.hear(44), Heard::Next);
    assert_eq!(foreign.hear(45), Heard::Next);
    // Else everything goes and a snapshot follows.
    assert_eq!(foreign.hear(60), Heard::Missed(46));
    foreign.cleared(Some(61));
    assert_eq!(foreign.hear(60), Heard::Again);
    assert_eq!(foreign.hear(61), Heard::Next);
    assert_eq!(foreign.stats().gaps, 2);
}
