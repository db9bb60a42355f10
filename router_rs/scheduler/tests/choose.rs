//! What policies choose, and what they say where they cannot.
#![allow(clippy::unwrap_used)]

mod common;

use common::{cached, request, worker};
use kvmesh_kv_index::{Matches, WorkerSlot};
use kvmesh_scheduler::{
    Cluster, CostSettings, Decision, Feature, FixedPolicy, KvCost, LocalPrefill, Needs, NoPlan,
    Path, Phase, Plan, Policy, RequestView, Role, Rule, TransferRates, UsualStreams, WorkerView,
};
use proptest::prelude::*;
use std::sync::Arc;

/// Decode workers compute prompts only where they must.
fn pairing() -> KvCost {
    KvCost::new(CostSettings {
        local_prefill: LocalPrefill::WithoutPrefillWorkers,
        ..CostSettings::default()
    })
}

fn choose(workers: &[WorkerView], request: &RequestView<'_>) -> Result<Decision, NoPlan> {
    pairing().choose(&Cluster::new(7, workers), request)
}

fn pd(prefill: u32, decode: u32) -> Vec<WorkerView> {
    let roles = (0..prefill)
        .map(|_| Role::Prefill)
        .chain((0..decode).map(|_| Role::Decode));
    roles
        .enumerate()
        .map(|(slot, role)| worker(slot as u32, role))
        .collect()
}

fn every_policy() -> Vec<Box<dyn Policy>> {
    let mut policies: Vec<Box<dyn Policy>> = Rule::NAMES
        .into_iter()
        .map(|name| Box::new(FixedPolicy::new(Rule::named(name, 1).unwrap())) as Box<dyn Policy>)
        .collect();
    policies.push(Box::new(pairing()));
    policies
}

#[test]
fn every_policy_pairs_prefill_and_decode_workers() {
    let (workers, none) = (pd(2, 2), Matches::default());
    for mut policy in every_policy() {
        for id in 0..20 {
            let decision = policy
                .choose(&Cluster::new(1, &workers), &request(&none, id))
                .unwrap();
            let Plan::Split {
                prefill,
                decode,
                source: None,
            } = decision.plan()
            else {
                panic!("{}", policy.name())
            };
            assert!(prefill.0 < 2 && decode.0 >= 2, "{}", policy.name());
            let booked: Vec<WorkerSlot> = decision.work.iter().map(|(slot, _)| *slot).collect();
            assert_eq!(booked, [prefill, decode]);
        }
    }
}

#[test]
fn every_policy_serves_a_cluster_of_workers_that_do_both() {
    let workers: Vec<WorkerView> = (0..3).map(|slot| worker(slot, Role::Both)).collect();
    let none = Matches::default();
    for mut policy in every_policy() {
        let mut seen = [0; 3];
        for id in 0..300 {
            let decision = policy
                .choose(&Cluster::new(1, &workers), &request(&none, id))
                .unwrap();
            let Plan::Whole {
                worker,
                source: None,
            } = decision.plan()
            else {
                panic!("{}", policy.name())
            };
            seen[worker.0 as usize] += 1;
        }
        let spreads = !matches!(policy.name(), "least-loaded" | "prefix-greedy");
        assert!(
            !spreads || seen.iter().all(|count| *count > 60),
            "{}: {seen:?}",
            policy.name()
        );
    }
}

#[test]
fn decode_workers_compute_prompts_where_no_prefill_worker_is() {
    let none = Matches::default();
    let plan = choose(&pd(0, 2), &request(&none, 1)).unwrap().plan();
    assert!(matches!(plan, Plan::Whole { .. }));
    let mut workers = pd(1, 1);
    workers[0].draining = true;
    assert!(matches!(
        choose(&workers, &request(&none, 1)).unwrap().plan(),
        Plan::Whole { .. }
    ));
    // One that is only full will have room: wait for it.
    workers[0].draining = false;
    workers[0].load.kv.free = 3;
    assert_eq!(
        choose(&workers, &request(&none, 1)),
        Err(NoPlan::NoRoom { tokens: 1_088 })
    );
}

#[test]
fn the_cached_prefix_wins_until_the_queue_is_longer_than_it_saves() {
    let mut workers: Vec<WorkerView> = (0..2).map(|slot| worker(slot, Role::Both)).collect();
    for worker in &mut workers {
        Arc::make_mut(&mut worker.abilities).prefix_pull = false;
    }
    let held = cached(&[(1, 1_008)]);
    assert_eq!(
        choose(&workers, &request(&held, 1))
            .unwrap()
            .plan()
            .prefill(),
        WorkerSlot(1)
    );
    workers[1].load.others.queued_prefill_tokens = 500;
    assert_eq!(
        choose(&workers, &request(&held, 1))
            .unwrap()
            .plan()
            .prefill(),
        WorkerSlot(1)
    );
    workers[1].load.others.queued_prefill_tokens = 5_000;
    assert_eq!(
        choose(&workers, &request(&held, 1))
            .unwrap()
            .plan()
            .prefill(),
        WorkerSlot(0)
    );
}

#[test]
fn a_prefix_is_pulled_where_its_holder_is_busy() {
    let mut workers: Vec<WorkerView> = (0..2).map(|slot| worker(slot, Role::Both)).collect();
    workers[1].load.others.queued_prefill_tokens = 5_000;
    let held = cached(&[(1, 1_008)]);
    let decision = choose(&workers, &request(&held, 1)).unwrap();
    assert_eq!(
        decision.plan(),
        Plan::Whole {
            worker: WorkerSlot(0),
            source: Some(WorkerSlot(1))
        }
    );
    assert_eq!(
        (decision.chosen.cached_tokens, decision.chosen.pulled_tokens),
        (0, 1_008)
    );
}

#[test]
fn each_kind_of_kv_pulls_from_the_best_holder_of_its_own() {
    // 0 and 1 are of one kind, 2 and 3 of the other; of each the second holds the
    // prefix and is busy, and that of the other kind holds more.
    let mut workers: Vec<WorkerView> = (0..4).map(|slot| worker(slot, Role::Both)).collect();
    for worker in &mut workers[2..] {
        Arc::make_mut(&mut worker.abilities).pairing = "fp16".into();
    }
    for busy in [1, 3] {
        workers[busy].load.others.queued_prefill_tokens = 50_000;
    }
    let held = cached(&[(1, 800), (3, 1_008)]);
    let plans = KvCost::default()
        .explain(&Cluster::new(7, &workers), &request(&held, 1))
        .unwrap();
    let source = |slot| {
        let of = plans
            .iter()
            .find(|one| one.plan.prefill() == WorkerSlot(slot));
        of.unwrap().plan.source()
    };
    assert_eq!(source(0), Some(WorkerSlot(1)));
    assert_eq!(source(2), Some(WorkerSlot(3)));
}

#[test]
fn of_equal_holders_each_gives_its_share() {
    let mut workers: Vec<WorkerView> = (0..6).map(|slot| worker(slot, Role::Both)).collect();
    for worker in &mut workers[1..] {
        worker.load.others.queued_prefill_tokens = 50_000;
    }
    let held = cached(&[(1, 1_008), (2, 1_008), (3, 1_008), (4, 1_008), (5, 1_008)]);
    let mut asked = [0; 6];
    for id in 0..500u64 {
        // Ids as they are drawn: any 64 bits.
        let id = u128::from(id.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let source = choose(&workers, &request(&held, id))
            .unwrap()
            .plan()
            .source();
        asked[source.unwrap().0 as usize] += 1;
    }
    assert_eq!(asked[0], 0);
    assert!(
        asked[1..].iter().all(|times| (50..=150).contains(times)),
        "{asked:?}"
    );
}

#[test]
fn of_equal_holders_the_one_with_the_better_path_is_asked() {
    let mut workers: Vec<WorkerView> = (0..3).map(|slot| worker(slot, Role::Both)).collect();
    for busy in [1, 2] {
        workers[busy].load.others.queued_prefill_tokens = 50_000;
    }
    let held = cached(&[(1, 1_008), (2, 1_008)]);
    let mut rates = TransferRates::new();
    for _ in 0..100 {
        rates.observe(WorkerSlot(1), WorkerSlot(0), Path::Network, 64 << 10, 60.0);
    }
    let cluster = Cluster::new(7, &workers).with_transfers(&rates);
    for id in 0..20 {
        let decision = KvCost::default()
            .choose(&cluster, &request(&held, id))
            .unwrap();
        assert_eq!(decision.plan().source(), Some(WorkerSlot(2)));
    }
}

#[test]
fn by_cost_a_short_prompt_stays_with_decode_and_a_long_one_does_not() {
    let mut workers = pd(1, 1);
    // A prompt that is being computed and is not stopped, and a stream on decode.
    workers[0].load.step_ends_ms = 200.0;
    Arc::make_mut(&mut workers[0].abilities).layer_preemption = false;
    workers[1].load.own.decoding = 8;
    workers[1].load.own.decode_context = 8_000;
    let none = Matches::default();
    let plan = |prompt_tokens| {
        let asked = RequestView {
            prompt_tokens,
            ..request(&none, 1)
        };
        KvCost::default()
            .choose(&Cluster::new(7, &workers), &asked)
            .unwrap()
            .plan()
    };
    assert!(matches!(plan(64), Plan::Whole { .. }));
    assert!(matches!(plan(4_000), Plan::Split { .. }));
}

/// Both workers are idle but for a moment's work where prompts are computed.
#[test]
fn a_long_prompt_keeps_away_from_where_streams_usually_are() {
    let none = Matches::default();
    let mut by_cost = KvCost::new(CostSettings::default());
    let mut workers = pd(1, 1);
    workers[0].load.step_ends_ms = 100.0;
    let mut whole = |workers: &[WorkerView], prompt_tokens| {
        let request = RequestView {
            prompt_tokens,
            ..request(&none, 1)
        };
        let decision = by_cost.choose(&Cluster::new(1, workers), &request).unwrap();
        matches!(decision.plan(), Plan::Whole { .. })
    };
    assert!(whole(&workers, 4_096), "nobody is expected to decode");
    workers[1].usual = UsualStreams::of([1.0, 0.0, 0.0]);
    assert!(!whole(&workers, 4_096));
    assert!(whole(&workers, 64), "over before somebody comes");
    // Where prompts and streams share all workers, every plan meets streams.
    workers.iter_mut().for_each(|one| one.role = Role::Both);
    assert!(whole(&workers, 4_096));
}

#[test]
fn what_is_booked_counts_as_load() {
    let mut workers = pd(2, 2);
    let none = Matches::default();
    let first = choose(&workers, &request(&none, 1)).unwrap();
    for (slot, work) in &first.work {
        workers[slot.0 as usize].booked = *work;
    }
    let second = choose(&workers, &request(&none, 1)).unwrap();
    assert_ne!(first.plan().prefill(), second.plan().prefill());
    assert_ne!(first.plan().decode(), second.plan().decode());
}

#[test]
fn two_routers_break_ties_apart_and_each_the_same_way_again() {
    let workers: Vec<WorkerView> = (0..4).map(|slot| worker(slot, Role::Both)).collect();
    let none = Matches::default();
    let run = |router| -> Vec<Plan> {
        let cluster = Cluster::new(router, &workers);
        (0..64)
            .map(|id| {
                KvCost::default()
                    .choose(&cluster, &request(&none, id))
                    .unwrap()
                    .plan()
            })
            .collect()
    };
    assert_eq!(run(1), run(1));
    let equal = run(1).iter().zip(run(2)).filter(|(a, b)| **a == *b).count();
    assert!(equal < 32, "{equal} of 64 alike");
}

#[test]
fn two_equal_workers_share_evenly() {
    let workers: Vec<WorkerView> = (0..2).map(|slot| worker(slot, Role::Both)).collect();
    let none = Matches::default();
    for router in 0..10 {
        let cluster = Cluster::new(router, &workers);
        let to_first = (0..1_000)
            .filter(|id| {
                KvCost::default()
                    .choose(&cluster, &request(&none, *id))
                    .unwrap()
                    .plan()
                    .prefill()
                    .0
                    == 0
            })
            .count();
        assert!((450..=550).contains(&to_first), "{to_first}");
    }
}

fn unsalted(worker: &mut WorkerView) {
    Arc::make_mut(&mut worker.abilities).no_cache_salt = true;
}

#[test]
fn who_cannot_keep_salts_apart_is_taken_for_unsalted_prompts_alone() {
    let none = Matches::default();
    let mut workers = vec![worker(0, Role::Both), worker(1, Role::Both)];
    unsalted(&mut workers[0]);
    // Else the other would be the better one.
    workers[1].load.kv.free = 500;
    workers[1].step.a_ms = 50.0;
    let salt = |cache_salt| RequestView {
        needs: Needs {
            cache_salt,
            ..Needs::default()
        },
        ..request(&none, 1)
    };
    let decode = |request: &RequestView<'_>| choose(&workers, request).unwrap().plan().decode();
    assert_eq!(decode(&salt(false)), WorkerSlot(0));
    assert_eq!(decode(&salt(true)), WorkerSlot(1));
}

#[test]
fn where_there_is_no_plan_the_nearest_miss_is_told() {
    let none = Matches::default();
    let plain = request(&none, 1);
    let told = |change: &dyn Fn(&mut WorkerView), request: &RequestView<'_>| {
        let mut workers = pd(1, 1);
        workers.iter_mut().for_each(change);
        choose(&workers, request).unwrap_err()
    };
    let keep = |_: &mut WorkerView| {};
    assert_eq!(choose(&[], &plain), Err(NoPlan::UnknownModel));
    assert_eq!(
        told(
            &keep,
            &RequestView {
                model: "x",
                ..plain
            }
        ),
        NoPlan::UnknownModel
    );
    assert_eq!(
        told(
            &keep,
            &RequestView {
                digest: "other",
                ..plain
            }
        ),
        NoPlan::UnknownModel
    );
    assert_eq!(
        told(
            &keep,
            &RequestView {
                adapter: "a",
                ..plain
            }
        ),
        NoPlan::UnknownAdapter
    );
    let grammar = Needs {
        grammar: true,
        ..Needs::default()
    };
    assert_eq!(
        told(
            &keep,
            &RequestView {
                needs: grammar,
                ..plain
            }
        ),
        NoPlan::Unsupported(Feature::Grammar)
    );
    let logprobs = Needs {
        logprobs: Some(21),
        ..Needs::default()
    };
    assert_eq!(
        told(
            &keep,
            &RequestView {
                needs: logprobs,
                ..plain
            }
        ),
        NoPlan::Unsupported(Feature::Logprobs)
    );
    let salted = RequestView {
        needs: Needs {
            cache_salt: true,
            ..Needs::default()
        },
        ..plain
    };
    assert_eq!(
        told(&unsalted, &salted),
        NoPlan::Unsupported(Feature::CacheSalt)
    );
    assert!(choose(&pd(1, 1), &salted).is_ok());
    let long = RequestView {
        prompt_tokens: 9_000,
        ..plain
    };
    assert_eq!(
        told(&keep, &long),
        NoPlan::TooLong {
            tokens: 9_064,
            limit: 8_192
        }
    );
    let draining = |w: &mut WorkerView| w.draining = true;
    assert_eq!(
        told(&draining, &plain),
        NoPlan::NotReady {
            role: Role::Decode,
            draining: true
        }
    );
    let loading = |w: &mut WorkerView| w.phase = Phase::Loading;
    assert_eq!(
        told(&loading, &plain),
        NoPlan::NotReady {
            role: Role::Decode,
            draining: false
        }
    );
    let suspect = |w: &mut WorkerView| w.suspect = true;
    assert_eq!(
        told(&suspect, &plain),
        NoPlan::NotReady {
            role: Role::Decode,
            draining: false
        }
    );
    let full = |w: &mut WorkerView| w.load.kv.free = 0;
    assert_eq!(told(&full, &plain), NoPlan::NoRoom { tokens: 1_088 });
    assert!(NoPlan::NoRoom { tokens: 1 }.passes() && !NoPlan::UnknownModel.passes());
    assert_eq!(
        choose(&pd(2, 0), &plain),
        Err(NoPlan::NoWorker(Role::Decode))
    );
    let excluded = RequestView {
        excluded: &[WorkerSlot(0), WorkerSlot(1)],
        ..plain
    };
    assert_eq!(told(&keep, &excluded), NoPlan::NoRoom { tokens: 1_088 });
}

#[test]
fn kv_of_other_kinds_is_not_paired() {
    let none = Matches::default();
    let mut workers = pd(1, 2);
    Arc::make_mut(&mut workers[1].abilities).pairing = "fp16".into();
    for id in 0..20 {
        assert_eq!(
            choose(&workers, &request(&none, id))
                .unwrap()
                .plan()
                .decode(),
            WorkerSlot(2)
        );
    }
    workers.pop();
    // What is left does not pair: decode computes the prompt itself.
    assert_eq!(
        choose(&workers, &request(&none, 1)).unwrap().plan(),
        Plan::Whole {
            worker: WorkerSlot(1),
            source: None
        }
    );
}

prop_compose! {
    fn any_worker(slot: u32)(
        role in prop_oneof![Just(Role::Prefill), Just(Role::Decode), Just(Role::Both)],
        queued in 0u64..5_000,
        decoding in 0u32..80,
        context in 0u64..2_000,
        b_ms in 0.1f64..2.0,
        free in 50u64..1_000,
        pull in any::<bool>(),
        draining in prop::bool::weighted(0.1),
        usual in 0f64..20.0,
    ) -> WorkerView {
        let mut w = worker(slot, role);
        w.usual = UsualStreams::of([usual, 0.5, 0.0]);
        w.load.own.queued_prefill_tokens = queued;
        w.load.others.decoding = decoding;
        w.load.others.decode_context = u64::from(decoding) * context;
        w.step.b_ms = b_ms;
        w.load.kv.free = free;
        w.draining = draining;
        Arc::make_mut(&mut w.abilities).prefix_pull = pull;
        w
    }
}

fn any_cluster() -> impl Strategy<Value = Vec<WorkerView>> {
    (1u32..16).prop_flat_map(|count| (0..count).map(any_worker).collect::<Vec<_>>())
}

/// 30 to 40 workers of two kinds of KV, with tokens of KV large enough for their
/// transfers to matter, and what a prompt and each stream find there.
fn large_cluster() -> impl Strategy<Value = Vec<WorkerView>> {
    // Of the first kind there are some 20 on each side: far more than are paired.
    let kinds = prop::collection::vec(prop::bool::weighted(0.25), 40);
    let workers =
        (30u32..=40).prop_flat_map(|count| (0..count).map(any_worker).collect::<Vec<_>>());
    (workers, kinds).prop_map(|(mut workers, kinds)| {
        for (worker, other) in workers.iter_mut().zip(kinds) {
            let abilities = Arc::make_mut(&mut worker.abilities);
            abilities.block_bytes = 2 << 20;
            if other {
                abilities.pairing = "fp16".into();
            }
        }
        workers
    })
}

/// What is learnt of the paths between 40 workers: from slower than a disk to
/// shared memory.
fn any_rates() -> impl Strategy<Value = TransferRates> {
    prop::collection::vec(1e5f64..4e6, 40 * 40).prop_map(|learnt| {
        let mut rates = TransferRates::new();
        for (at, bytes_per_ms) in learnt.into_iter().enumerate() {
            let (from, to) = (WorkerSlot(at as u32 / 40), WorkerSlot(at as u32 % 40));
            for bytes in [1u64 << 20, 1 << 24, 1 << 27].into_iter().cycle().take(12) {
                let ms = 2.0 + bytes as f64 / bytes_per_ms;
                rates.observe(from, to, Path::Network, bytes, ms);
            }
        }
        rates
    })
}

/// Cost of the choice among the best eight of each side, and among all.
fn narrow_and_full(
    cluster: &Cluster<'_>,
    request: &RequestView<'_>,
    local_prefill: LocalPrefill,
) -> Option<(f64, f64)> {
    let cost = |best_of_side| {
        let mut policy = KvCost::new(CostSettings {
            best_of_side,
            local_prefill,
            tie_ms: 0.0,
            tie_share: 0.0,
            ..CostSettings::default()
        });
        let decision = policy.choose(cluster, request).ok()?;
        Some(decision.chosen.terms.total_ms())
    };
    match (cost(8), cost(usize::MAX)) {
        (Some(narrow), Some(full)) => Some((narrow, full)),
        (narrow, full) => {
            assert_eq!(narrow.is_some(), full.is_some());
            None
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Taking the best of each side loses next to nothing against weighing every
    /// pair, where all paths are alike.
    #[test]
    fn the_best_of_each_side_is_as_good_as_the_full_search(
        workers in large_cluster(),
        held in prop::collection::vec((0u32..40, 0u32..64), 0..10),
        by_cost in any::<bool>(),
        id in any::<u64>(),
    ) {
        let held: Vec<(u32, u32)> = held.into_iter().map(|(slot, blocks)| (slot, blocks * 16)).collect();
        let matches = cached(&held);
        let local = if by_cost { LocalPrefill::ByCost } else { LocalPrefill::WithoutPrefillWorkers };
        let cluster = Cluster::new(1, &workers);
        if let Some((narrow, full)) = narrow_and_full(&cluster, &request(&matches, u128::from(id)), local) {
            prop_assert!(narrow <= full * 1.03 + 2.0, "{} for {}", narrow, full);
        }
    }

    /// Where paths differ forty-fold a side cannot know its best partner by itself:
    /// what is chosen is as near to the full search as where all paths are alike.
    #[test]
    fn the_best_of_each_side_is_as_good_where_paths_are_unequal(
        workers in large_cluster(),
        rates in any_rates(),
        held in prop::collection::vec((0u32..40, 0u32..64), 0..10),
        by_cost in any::<bool>(),
        id in any::<u64>(),
    ) {
        let held: Vec<(u32, u32)> = held.into_iter().map(|(slot, blocks)| (slot, blocks * 16)).collect();
        let matches = cached(&held);
        let local = if by_cost { LocalPrefill::ByCost } else { LocalPrefill::WithoutPrefillWorkers };
        let cluster = Cluster::new(1, &workers).with_transfers(&rates);
        if let Some((narrow, full)) = narrow_and_full(&cluster, &request(&matches, u128::from(id)), local) {
            prop_assert!(narrow <= full * 1.03 + 2.0, "{} for {}", narrow, full);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whoever is chosen can do it; every term is a time.
    #[test]
    fn a_chosen_worker_takes_the_work(workers in any_cluster(), id in any::<u64>()) {
        let none = Matches::default();
        let request = request(&none, u128::from(id));
        for mut policy in every_policy() {
            let Ok(decision) = policy.choose(&Cluster::new(1, &workers), &request) else { continue };
            let find = |slot: WorkerSlot| workers.iter().find(|w| w.slot == slot).unwrap();
            let (p, d) = (find(decision.plan().prefill()), find(decision.plan().decode()));
            prop_assert!(!p.draining && !d.draining && d.role != Role::Prefill);
            prop_assert!(p.load.kv.free >= 68 && d.load.kv.free >= 68);
            prop_assert_eq!(matches!(decision.plan(), Plan::Whole { .. }), p.slot == d.slot);
            let t = decision.chosen.terms;
            for (name, ms) in t.rows() {
                prop_assert!(ms.is_finite() && ms >= 0.0, "{}: {:?}", name, t);
            }
            let sum: f64 = t.rows().iter().map(|(_, ms)| ms).sum();
            prop_assert!((sum - t.total_ms()).abs() <= 1e-6 * sum.max(1.0), "{:?}", t);
            prop_assert_eq!(&policy.explain(&Cluster::new(1, &workers), &request).is_ok(), &true);
        }
    }
}
