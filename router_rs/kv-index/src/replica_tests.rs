//! The two copies stay equal, and nothing is left behind in what they share,
//! whatever is read while they change.
#![allow(clippy::unwrap_used)]

use crate::{CacheChange, IndexSettings, Knowledge, KvIndex, Tier, WorkerSlot};
use proptest::prelude::*;
use std::collections::BTreeSet;

const WORKERS: u32 = 3;

/// A change of one worker's cache; values are few, so that changes meet.
#[derive(Debug, Clone)]
struct Step {
    worker: u32,
    store: bool,
    parent: Option<u64>,
    chain: Vec<u64>,
}

fn step() -> impl Strategy<Value = Step> {
    let chain = (1u64..60, 1u64..40, any::<bool>()).prop_map(|(from, count, turned)| {
        let chain: Vec<u64> = (from..from + count).collect();
        if turned {
            chain.into_iter().rev().collect()
        } else {
            chain
        }
    });
    let parent = prop::option::of(0u64..60);
    (0..WORKERS, prop::bool::weighted(0.6), parent, chain).prop_map(
        |(worker, store, parent, chain)| Step {
            worker,
            store,
            parent,
            chain,
        },
    )
}

fn make(index: &KvIndex, model: &mut BTreeSet<(u32, u64)>, step: &Step) {
    let (chain, tier) = (step.chain.as_slice(), Tier::Device);
    let change = match (step.store, step.parent) {
        (true, Some(parent)) => CacheChange::StoredAfter {
            parent,
            chain,
            tier,
        },
        (true, None) => CacheChange::Stored { chain, tier },
        (false, _) => CacheChange::Removed { chain, tier },
    };
    index.apply(WorkerSlot(step.worker), &[change]).unwrap();
    for value in &step.chain {
        if step.store {
            model.insert((step.worker, *value));
        } else {
            model.remove(&(step.worker, *value));
        }
    }
}

fn check(index: &KvIndex, model: &BTreeSet<(u32, u64)>) {
    // A look-up that ends brings in what waits.
    while index.is_behind() {
        index.lookup(&[]);
    }
    // A change brings the second copy up to date.
    index.apply(WorkerSlot(0), &[]).unwrap();
    index.both(|core, other| {
        let other = other.unwrap();
        core.check();
        other.check();
        assert_eq!(core.layout(), other.layout());
        assert_eq!(core.notes(), core.blocks());
        assert_eq!(core.entries(), model.len() as u64);
    });
    for worker in 0..WORKERS {
        for value in 0..100 {
            let held = index.lookup(&[value]).tokens(WorkerSlot(worker)) > 0;
            assert_eq!(held, model.contains(&(worker, value)));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// Each group of changes is made while a look-up is held up in the middle.
    #[test]
    fn copies_stay_equal_beside_slow_readers(
        groups in prop::collection::vec(prop::collection::vec(step(), 1..8), 1..6),
    ) {
        let index = KvIndex::new(IndexSettings::default());
        for _ in 0..WORKERS {
            index.add_worker(16, Knowledge::Events).unwrap();
        }
        let mut model = BTreeSet::new();
        for group in &groups {
            index.held_up(|| {
                for step in group {
                    make(&index, &mut model, step);
                }
            });
            check(&index, &model);
        }
    }

    /// A bound so small that most of what comes goes again.
    #[test]
    fn copies_stay_equal_under_the_bound(steps in prop::collection::vec(step(), 1..200)) {
        let settings = IndexSettings { max_bytes: 6_000, ..IndexSettings::default() };
        let index = KvIndex::new(settings);
        for _ in 0..WORKERS {
            index.add_worker(16, Knowledge::Events).unwrap();
        }
        for step in &steps {
            make(&index, &mut BTreeSet::new(), step);
            index.lookup(&step.chain);
        }
        index.both(|core, other| {
            core.check();
            other.unwrap().check();
            assert_eq!(core.layout(), other.unwrap().layout());
            assert_eq!(core.notes(), core.blocks());
        });
    }
}
