//! The index against a naive model of it, over many histories.
#![allow(clippy::unwrap_used)]

use kvmesh_kv_index::{CacheChange, IndexSettings, Knowledge, KvIndex, Matches, Tier, WorkerSlot};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

const UNITS: usize = 12;

/// Block sizes of the workers, in tokens.
const SIZES: [u32; 4] = [16, 32, 16, 64];

/// The nearest first.
const TIERS: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Disk];

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
        let Some(tier) = TIERS
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

/// Tokens of a worker's prefix, and how many of them lie on the host and on disk.
fn told(found: &Matches, slot: WorkerSlot) -> (u32, u32, u32) {
    (
        found.tokens(slot),
        found.host_tokens(slot),
        found.disk_tokens(slot),
    )
}

/// An index and what it should say.
struct History {
    index: KvIndex,
    sizes: Vec<u32>,
    slots: Vec<WorkerSlot>,
    model: Vec<Held>,
    /// One answer that is used again and again, as a router does.
    found: Matches,
}

impl History {
    fn new(sizes: &[u32], settings: IndexSettings) -> Self {
        let index = KvIndex::new(settings);
        let add = |size: &u32| index.add_worker(*size, Knowledge::Events).unwrap();
        Self {
            slots: sizes.iter().map(add).collect(),
            sizes: sizes.to_vec(),
            model: vec![Held::new(); sizes.len()],
            found: Matches::default(),
            index,
        }
    }

    fn act(&mut self, action: &Action) {
        let index = &self.index;
        match action {
            Action::Store(w, parent, chain, tier) => {
                let tier = *tier;
                let change = match *parent {
                    Some(parent) => CacheChange::StoredAfter {
                        parent,
                        chain,
                        tier,
                    },
                    None => CacheChange::Stored { chain, tier },
                };
                index.apply(self.slots[*w], &[change]).unwrap();
                self.model[*w].extend(chain.iter().map(|value| (*value, tier)));
            }
            Action::Remove(w, chain, tier) => {
                let tier = *tier;
                let change = CacheChange::Removed { chain, tier };
                index.apply(self.slots[*w], &[change]).unwrap();
                for value in chain {
                    self.model[*w].remove(&(*value, tier));
                }
            }
            Action::Clear(w) => {
                index
                    .apply(self.slots[*w], &[CacheChange::Cleared])
                    .unwrap();
                self.model[*w].clear();
            }
            Action::Snapshot(w, blocks) => {
                let last = blocks.len().saturating_sub(1);
                if blocks.is_empty() {
                    index.snapshot(self.slots[*w], &[], true, true).unwrap();
                }
                for (at, (value, tier)) in blocks.iter().enumerate() {
                    let part = [CacheChange::Stored {
                        chain: &[*value],
                        tier: *tier,
                    }];
                    index
                        .snapshot(self.slots[*w], &part, at == 0, at == last)
                        .unwrap();
                }
                self.model[*w] = blocks.iter().copied().collect();
            }
            Action::Replace(w) => {
                index.remove_worker(self.slots[*w]).unwrap();
                self.slots[*w] = index.add_worker(self.sizes[*w], Knowledge::Events).unwrap();
                self.model[*w].clear();
            }
        }
    }

    /// The longest prefix of each worker is what it holds, no more and no less.
    fn is_exact(&mut self, chain: &[u64]) {
        self.index.lookup_into(chain, &mut self.found);
        assert_eq!(self.found.by_slot().len(), self.slots.len());
        for (w, slot) in self.slots.iter().enumerate() {
            let want = naive(&self.model[w], chain, self.sizes[w]);
            assert_eq!(told(&self.found, *slot), want, "worker {w}, {chain:?}");
        }
    }

    /// What is said of each worker it holds: stored, and not removed since. Gives
    /// all tokens that were said.
    fn claims_nothing_else(&mut self, chain: &[u64]) -> u64 {
        self.index.lookup_into(chain, &mut self.found);
        let mut all = 0;
        for (w, slot) in self.slots.iter().enumerate() {
            let (tokens, host, disk) = told(&self.found, *slot);
            let prefix = &chain[..tokens as usize / 16];
            let units = self.sizes[w] as usize / 16;
            assert!(prefix.len().is_multiple_of(units));
            let said = [tokens - host - disk, host, disk];
            // A block may have gone and come back in one tier alone: of any tiers
            // no more is said than lies in one of them.
            for some in 1..8 {
                let tiers = || TIERS.iter().zip(said).enumerate();
                let tiers = || tiers().filter(|(at, _)| some >> at & 1 == 1);
                let claimed: u32 = tiers().map(|(_, (_, said))| said).sum();
                let held = |value: &u64| {
                    tiers().any(|(_, (tier, _))| self.model[w].contains(&(*value, *tier)))
                };
                let names = prefix.iter().skip(units - 1).step_by(units);
                let held = names.filter(|value| held(value)).count() as u32;
                assert!(
                    claimed <= held * self.sizes[w],
                    "worker {w}, {chain:?}: {said:?}"
                );
            }
            all += u64::from(tokens);
        }
        all
    }

    fn counts_what_is_held(&self) {
        let stats = self.index.stats();
        let entries: usize = self.model.iter().map(Held::len).sum();
        assert_eq!(stats.entries, entries as u64);
        let held = self.model.iter().flatten();
        let distinct: BTreeSet<u64> = held.map(|(value, _)| *value).collect();
        assert_eq!(stats.blocks, distinct.len());
    }
}

/// Histories in CI; `KVMESH_HISTORIES` asks for more.
fn histories() -> u32 {
    std::env::var("KVMESH_HISTORIES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(100_000)
}

fn cases(share: u32) -> ProptestConfig {
    ProptestConfig {
        cases: histories() / share,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(1))]

    #[test]
    fn every_history_gives_the_exact_longest_prefix_at_every_step(
        actions in prop::collection::vec(action(), 0..24),
        // Workers of one block size are answered another way where nobody has the first block.
        alike in any::<bool>(),
    ) {
        let sizes = if alike { [SIZES[0]; SIZES.len()] } else { SIZES };
        let mut history = History::new(&sizes, IndexSettings::default());
        let prompts = [prompt(0), prompt(1)];
        for action in &actions {
            history.act(action);
            for prompt in &prompts {
                history.is_exact(prompt);
            }
        }
        for prompt in &prompts {
            for length in 0..UNITS {
                history.is_exact(&prompt[..length]);
            }
        }
        history.counts_what_is_held();
    }
}

/// Runs histories in an index that has too little room for them, in bytes above what an
/// empty one takes. Something has to go in
/// some of them, and something to be left, or nothing was tested.
fn under_eviction<S: Strategy>(
    share: u32,
    of: S,
    room: usize,
    run: impl Fn(S::Value, IndexSettings) -> (u64, u64),
) {
    let (evicted, claimed) = (AtomicU64::new(0), AtomicU64::new(0));
    let empty = KvIndex::new(IndexSettings::default()).stats().bytes;
    let settings = IndexSettings {
        max_bytes: empty + room,
        ..IndexSettings::default()
    };
    let config = ProptestConfig {
        failure_persistence: None,
        ..cases(share)
    };
    let outcome = TestRunner::new(config).run(&of, |value| {
        let (gone, said) = run(value, settings.clone());
        evicted.fetch_add(u64::from(gone > 0), Ordering::Relaxed);
        claimed.fetch_add(u64::from(gone > 0 && said > 0), Ordering::Relaxed);
        Ok(())
    });
    if let Err(failed) = outcome {
        panic!("{failed}");
    }
    let least = u64::from(histories() / share / 10);
    let counts = (evicted.into_inner(), claimed.into_inner());
    assert!(counts.0 >= least && counts.1 >= least, "{counts:?}");
}

#[test]
fn nothing_is_claimed_under_eviction_that_was_not_stored_or_was_removed() {
    let actions = prop::collection::vec(action(), 0..24);
    under_eviction(4, actions, 1_500, |actions, settings| {
        let mut history = History::new(&SIZES, settings);
        let prompts = [prompt(0), prompt(1)];
        let mut said = 0;
        for action in &actions {
            history.act(action);
            for prompt in &prompts {
                said += history.claims_nothing_else(prompt);
            }
        }
        (history.index.stats().evicted, said)
    });
}

/// Block sizes of the workers in the tests below, in tokens.
const LONG: [u32; 4] = [16, 32, 512, 16];
const LONG_UNITS: u64 = 1_300;

/// Prompts longer than anything that is kept together. The second one leaves the
/// first one after 700 units.
fn long_prompts() -> [Vec<u64>; 2] {
    [0, 1].map(|which| {
        let apart = |at| if at < 700 { 0 } else { which * 10_000 };
        (0..LONG_UNITS).map(|at| at + 1 + apart(at)).collect()
    })
}

/// Changes of these: which worker and prompt, from which of its blocks on, how
/// many, and whether they are stored.
fn long_changes() -> impl Strategy<Value = Vec<(usize, usize, usize, usize, bool)>> {
    // Often from the first one on, else hardly anybody has a prefix.
    let from = prop_oneof![Just(0), 0..LONG_UNITS as usize];
    let stored = prop::bool::weighted(0.8);
    prop::collection::vec((0..LONG.len(), 0usize..2, from, 1usize..600, stored), 1..30)
}

fn long_action(
    prompts: &[Vec<u64>; 2],
    (worker, which, from, count, store): (usize, usize, usize, usize, bool),
) -> Action {
    let units = LONG[worker] as usize / 16;
    let names = prompts[which].iter().skip(units - 1).step_by(units);
    let names: Vec<u64> = names.copied().collect();
    let from = from.min(names.len() - 1);
    let chain = names[from..names.len().min(from + count)].to_vec();
    let parent = from.checked_sub(1).map(|at| names[at]);
    match store {
        true => Action::Store(worker, parent, chain, Tier::Device),
        false => Action::Remove(worker, chain, Tier::Device),
    }
}

proptest! {
    #![proptest_config(cases(100))]

    /// In blocks of 16, 32 and 512 tokens, stored in parts and lost from the end
    /// or the middle.
    #[test]
    fn long_prompts_in_several_block_sizes_are_exact_at_every_step(changes in long_changes()) {
        let prompts = long_prompts();
        let mut history = History::new(&LONG, IndexSettings::default());
        for change in changes {
            history.act(&long_action(&prompts, change));
            history.is_exact(&prompts[change.1]);
        }
        for prompt in &prompts {
            for length in [1_300, 1_299, 701, 512, 33, 0] {
                history.is_exact(&prompt[..length]);
            }
        }
        history.counts_what_is_held();
    }
}

#[test]
fn ends_of_long_prompts_that_had_to_go_are_not_claimed() {
    under_eviction(100, long_changes(), 60_000, |changes, settings| {
        let prompts = long_prompts();
        let mut history = History::new(&LONG, settings);
        let mut said = 0;
        for change in changes {
            history.act(&long_action(&prompts, change));
            said += history.claims_nothing_else(&prompts[change.1]);
        }
        (history.index.stats().evicted, said)
    });
}
