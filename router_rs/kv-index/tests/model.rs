//! The index against a naive model of it, over many histories.
#![allow(clippy::unwrap_used)]

use kvmesh_kv_index::{CacheChange, IndexSettings, Knowledge, KvIndex, Matches, Tier, WorkerSlot};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const UNITS: usize = 12;

/// Block sizes of the workers, in tokens.
const SIZES: [u32; 4] = [16, 32, 16, 64];

/// One worker: the blocks that it holds, by (value, tier).
type Held = BTreeSet<(u64, Tier)>;

#[derive(Debug, Clone)]
enum Action {
    /// With the value that it says comes before, be that so or not.
    Store(usize, Option<u64>, Vec<u64>, Tier),
    Remove(usize, Vec<u64>, Tier),
    Clear(usize),
    Snapshot(usize, Vec<(u64, Tier)>),
    Replace(usize),
}

/// Two prompts that share their first half, as chain values; small numbers, so
/// that histories meet.
fn prompt(which: usize) -> Vec<u64> {
    (0..UNITS as u64)
        .map(|at| {
            if at < 6 || which == 0 {
                at + 1
            } else {
                at + 101
            }
        })
        .collect()
}

fn values() -> impl Strategy<Value = Vec<u64>> {
    // Parts of a prompt, as engines store them: in order, from the end, or with
    // holes as workers of larger blocks do.
    let part = (
        0usize..2,
        0usize..UNITS,
        1usize..=UNITS,
        1usize..4,
        any::<bool>(),
    );
    part.prop_map(|(which, from, count, step, turned)| {
        let mut chain: Vec<u64> = prompt(which)
            .into_iter()
            .skip(from)
            .step_by(step)
            .take(count)
            .collect();
        if turned && step == 1 {
            chain.reverse();
        }
        chain
    })
}

fn tier() -> impl Strategy<Value = Tier> {
    prop_oneof![4 => Just(Tier::Device), 1 => Just(Tier::Host), 1 => Just(Tier::Disk)]
}

fn action() -> impl Strategy<Value = Action> {
    let worker = 0usize..SIZES.len();
    prop_oneof![
        8 => (worker.clone(), prop::option::of(0u64..13), values(), tier())
            .prop_map(|(w, p, v, t)| Action::Store(w, p, v, t)),
        4 => (worker.clone(), values(), tier()).prop_map(|(w, v, t)| Action::Remove(w, v, t)),
        1 => worker.clone().prop_map(Action::Clear),
        1 => (worker.clone(), prop::collection::vec((1u64..13, tier()), 0..20)).prop_map(|(w, v)| Action::Snapshot(w, v)),
        1 => worker.prop_map(Action::Replace),
    ]
}

/// Longest prefix without a hole, and how much of it lies below the device.
fn naive(held: &Held, chain: &[u64], block_tokens: u32) -> (u32, u32, u32) {
    let units = block_tokens as usize / 16;
    let (mut tokens, mut host, mut disk) = (0, 0, 0);
    for end in (units..=chain.len()).step_by(units) {
        let value = chain[end - 1];
        let Some(tier) = [Tier::Device, Tier::Host, Tier::Disk]
            .into_iter()
            .find(|tier| held.contains(&(value, *tier)))
        else {
            break;
        };
        tokens += block_tokens;
        match tier {
            Tier::Device => {}
            Tier::Host => host += block_tokens,
            Tier::Disk => disk += block_tokens,
        }
    }
    (tokens, host, disk)
}

fn check(
    index: &KvIndex,
    slots: &[WorkerSlot],
    sizes: &[u32],
    model: &BTreeMap<usize, Held>,
    found: &mut Matches,
) {
    for which in 0..2 {
        for length in 0..=UNITS {
            let chain = &prompt(which)[..length];
            index.lookup_into(chain, found);
            assert_eq!(found.by_slot().len(), slots.len());
            for (w, slot) in slots.iter().enumerate() {
                let got = (
                    found.tokens(*slot),
                    found.host_tokens(*slot),
                    found.disk_tokens(*slot),
                );
                assert_eq!(
                    got,
                    naive(&model[&w], chain, sizes[w]),
                    "worker {w}, {chain:?}"
                );
            }
        }
    }
    let stats = index.stats();
    assert_eq!(
        stats.entries,
        model.values().map(|held| held.len() as u64).sum::<u64>()
    );
    let distinct: BTreeSet<u64> = model.values().flatten().map(|(value, _)| *value).collect();
    assert_eq!(stats.blocks, distinct.len());
}

/// Histories in CI; `KVMESH_HISTORIES` asks for more.
fn histories() -> u32 {
    std::env::var("KVMESH_HISTORIES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(100_000)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: histories(), ..ProptestConfig::default() })]

    #[test]
    fn every_history_gives_the_exact_longest_prefix(
        actions in prop::collection::vec(action(), 0..24),
        // Workers of one block size are answered another way where nobody has the first block.
        alike in any::<bool>(),
    ) {
        let sizes = if alike { [SIZES[0]; SIZES.len()] } else { SIZES };
        // One that is used again, as a router does.
        let mut found = Matches::default();
        let index = KvIndex::new(IndexSettings::default());
        let mut slots: Vec<WorkerSlot> =
            sizes.iter().map(|size| index.add_worker(*size, Knowledge::Events).unwrap()).collect();
        let mut model: BTreeMap<usize, Held> = (0..SIZES.len()).map(|w| (w, Held::new())).collect();
        for action in &actions {
            match action {
                Action::Store(w, parent, chain, tier) => {
                    let tier = *tier;
                    let change = match *parent {
                        Some(parent) => CacheChange::StoredAfter { parent, chain, tier },
                        None => CacheChange::Stored { chain, tier },
                    };
                    index.apply(slots[*w], &[change]).unwrap();
                    model.get_mut(w).unwrap().extend(chain.iter().map(|value| (*value, tier)));
                }
                Action::Remove(w, chain, tier) => {
                    index.apply(slots[*w], &[CacheChange::Removed { chain, tier: *tier }]).unwrap();
                    model.get_mut(w).unwrap().retain(|(value, t)| t != tier || !chain.contains(value));
                }
                Action::Clear(w) => {
                    index.apply(slots[*w], &[CacheChange::Cleared]).unwrap();
                    model.get_mut(w).unwrap().clear();
                }
                Action::Snapshot(w, blocks) => {
                    let last = blocks.len().saturating_sub(1);
                    if blocks.is_empty() {
                        index.snapshot(slots[*w], &[], true, true).unwrap();
                    }
                    for (at, (value, tier)) in blocks.iter().enumerate() {
                        let part = [CacheChange::Stored { chain: &[*value], tier: *tier }];
                        index.snapshot(slots[*w], &part, at == 0, at == last).unwrap();
                    }
                    *model.get_mut(w).unwrap() = blocks.iter().copied().collect();
                }
                Action::Replace(w) => {
                    index.remove_worker(slots[*w]).unwrap();
                    slots[*w] = index.add_worker(sizes[*w], Knowledge::Events).unwrap();
                    model.get_mut(w).unwrap().clear();
                }
            }
            index.lookup_into(&prompt(0), &mut found);
        }
        check(&index, &slots, &sizes, &model, &mut found);
    }
}

/// Block sizes of the workers in the test below, in units.
const LONG: [usize; 4] = [1, 2, 32, 1];

proptest! {
    #![proptest_config(ProptestConfig { cases: histories() / 100, ..ProptestConfig::default() })]

    /// Prompts longer than anything that is kept together, in blocks of 16, 32
    /// and 512 tokens, stored in parts and lost from the end or the middle.
    #[test]
    fn long_prompts_in_several_block_sizes_are_exact(
        changes in prop::collection::vec(
            (0..LONG.len(), any::<bool>(), 0usize..1_300, 1usize..600, prop::bool::weighted(0.8)), 1..30),
    ) {
        // A second prompt leaves the first one after 700 units.
        let prompts: [Vec<u64>; 2] = [0, 1].map(|which| {
            (0..1_300).map(|at| at + 1 + if at < 700 { 0 } else { which * 10_000 }).collect()
        });
        let index = KvIndex::new(IndexSettings::default());
        let slots = LONG.map(|units| index.add_worker(16 * units as u32, Knowledge::Events).unwrap());
        let mut model: Vec<Held> = vec![Held::new(); LONG.len()];
        for (worker, second, from, count, store) in changes {
            let units = LONG[worker];
            let names: Vec<u64> =
                prompts[usize::from(second)].iter().skip(units - 1).step_by(units).copied().collect();
            let from = from.min(names.len() - 1);
            let chain = &names[from..names.len().min(from + count)];
            let (tier, parent) = (Tier::Device, from.checked_sub(1).map(|at| names[at]));
            let change = match (store, parent) {
                (true, Some(parent)) => CacheChange::StoredAfter { parent, chain, tier },
                (true, None) => CacheChange::Stored { chain, tier },
                (false, _) => CacheChange::Removed { chain, tier },
            };
            index.apply(slots[worker], &[change]).unwrap();
            for value in chain {
                if store {
                    model[worker].insert((*value, tier));
                } else {
                    model[worker].remove(&(*value, tier));
                }
            }
        }
        for prompt in &prompts {
            for length in [1_300, 1_299, 701, 512, 33, 0] {
                let found = index.lookup(&prompt[..length]);
                for (worker, slot) in slots.iter().enumerate() {
                    let want = naive(&model[worker], &prompt[..length], 16 * LONG[worker] as u32);
                    prop_assert_eq!(found.tokens(*slot), want.0, "worker {}", worker);
                }
            }
        }
    }
}
