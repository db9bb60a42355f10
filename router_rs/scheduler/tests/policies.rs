//! What each fixed policy goes by, and plans scored by a function.
#![allow(clippy::unwrap_used)]

mod common;

use common::{cached, request, worker};
use kvmesh_kv_index::{Matches, WorkerSlot};
use kvmesh_scheduler::{
    Cluster, Columns, CostSettings, FixedPolicy, KvCost, Policy, RequestView, Role, Rule,
    ScoreError, ScoredPolicy, Scorer, WorkerView,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn both(count: u32) -> Vec<WorkerView> {
    (0..count).map(|slot| worker(slot, Role::Both)).collect()
}

fn chosen(rule: Rule, workers: &[WorkerView], request: &RequestView<'_>) -> WorkerSlot {
    let cluster = Cluster::new(3, workers);
    let decision = FixedPolicy::new(rule).choose(&cluster, request).unwrap();
    decision.plan().decode()
}

#[test]
fn a_rule_has_its_name() {
    for name in Rule::NAMES {
        assert_eq!(Rule::named(name, 1).unwrap().name(), name);
    }
    assert_eq!(Rule::named("nothing", 1), None);
}

#[test]
fn what_belongs_together_goes_together_and_moves_only_with_its_worker() {
    let none = Matches::default();
    let of = |workers: &[WorkerView], affinity, id| {
        let asked = RequestView {
            affinity,
            ..request(&none, id)
        };
        chosen(Rule::ConsistentHash, workers, &asked)
    };
    let all = both(8);
    let mut without = both(8);
    without.remove(5);
    let mut seen = [0; 8];
    for affinity in 0..400 {
        let at = of(&all, affinity, 1);
        seen[at.0 as usize] += 1;
        assert_eq!(of(&all, affinity, 2), at);
        let then = of(&without, affinity, 1);
        assert!(at == WorkerSlot(5) || then == at, "{affinity} moved");
    }
    assert!(seen.iter().all(|count| *count > 20), "{seen:?}");
}

#[test]
fn the_usual_formula_weighs_blocks_to_compute_against_blocks_held() {
    let held = cached(&[(1, 512)]);
    let mut workers = both(2);
    let rule = |overlap_weight| Rule::OverlapLoad {
        overlap_weight,
        temperature: 0.0,
        seed: 1,
    };
    // 32 blocks fewer to compute against 40 blocks of streams more.
    workers[1].load.others.decoding = 1;
    workers[1].load.others.decode_context = 640;
    let asked = request(&held, 1);
    assert_eq!(chosen(rule(1.0), &workers, &asked), WorkerSlot(0));
    assert_eq!(chosen(rule(2.0), &workers, &asked), WorkerSlot(1));
    // Prompts that wait there count as blocks to compute.
    workers[1].load.others.queued_prefill_tokens = 1_024;
    assert_eq!(chosen(rule(2.0), &workers, &asked), WorkerSlot(0));
}

#[test]
fn temperature_spreads_and_the_cheaper_still_gets_more() {
    let none = Matches::default();
    let mut workers = both(2);
    workers[1].load.others.decoding = 1;
    workers[1].load.others.decode_context = 2_000;
    let at = |temperature| {
        let rule = Rule::OverlapLoad {
            overlap_weight: 1.0,
            temperature,
            seed: 1,
        };
        let to_first = |id: &u128| chosen(rule, &workers, &request(&none, *id)).0 == 0;
        (0..1_000).filter(to_first).count()
    };
    assert_eq!(at(0.0), 1_000);
    // exp(-1 / T) of the weight goes to the other: at T = 1 that is 0.37.
    let warm = at(1.0);
    assert!((680..=780).contains(&warm), "{warm}");
    let hot = at(100.0);
    assert!((450..=550).contains(&hot), "{hot}");
}

/// Scores by one column.
struct ByColumn {
    name: &'static str,
    sign: f64,
    failures: AtomicUsize,
}

impl Scorer for ByColumn {
    fn score(&self, plans: &Columns) -> Result<Vec<f64>, ScoreError> {
        let column = plans
            .column(self.name)
            .ok_or_else(|| ScoreError::Failed(self.name.to_owned()))?;
        Ok(column.iter().map(|value| value * self.sign).collect())
    }

    fn failed(&self, _: &ScoreError) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }
}

fn scorer(name: &'static str, sign: f64) -> Arc<ByColumn> {
    Arc::new(ByColumn {
        name,
        sign,
        failures: AtomicUsize::new(0),
    })
}

#[test]
fn the_least_score_is_chosen_and_booked() {
    let held = cached(&[(2, 512)]);
    let mut workers = both(4);
    workers[2].load.others.queued_prefill_tokens = 10_000;
    let cluster = Cluster::new(3, &workers);
    let asked = request(&held, 1);
    let most_cached = scorer("cached_tokens", -1.0);
    let mut policy = ScoredPolicy::new(CostSettings::default(), most_cached.clone());
    let decision = policy.choose(&cluster, &asked).unwrap();
    assert_eq!(decision.plan().decode(), WorkerSlot(2));
    assert_eq!(decision.work[0].1.prefill_tokens, 512);
    assert_eq!(most_cached.failures.load(Ordering::Relaxed), 0);
    // The sum of the terms is the cost: scored by that, both agree on the best.
    let mut by_total = ScoredPolicy::new(CostSettings::default(), scorer("total", 1.0));
    let best = KvCost::default().explain(&cluster, &asked).unwrap()[0].plan;
    assert_eq!(by_total.choose(&cluster, &asked).unwrap().plan(), best);
}

#[test]
fn where_the_scorer_fails_the_cost_decides() {
    let none = Matches::default();
    let workers = both(4);
    let cluster = Cluster::new(3, &workers);
    for id in 0..20 {
        let asked = request(&none, id);
        let by_cost = KvCost::default().choose(&cluster, &asked).unwrap().plan();
        for (name, sign) in [("no such column", 1.0), ("total", f64::NAN)] {
            let failing = scorer(name, sign);
            let mut policy = ScoredPolicy::new(CostSettings::default(), failing.clone());
            assert_eq!(policy.choose(&cluster, &asked).unwrap().plan(), by_cost);
            assert_eq!(failing.failures.load(Ordering::Relaxed), 1);
        }
    }
}

#[test]
fn columns_are_named_and_as_long_as_there_are_plans() {
    struct Look;
    impl Scorer for Look {
        fn score(&self, plans: &Columns) -> Result<Vec<f64>, ScoreError> {
            assert_eq!(plans.plans(), 4);
            for (name, column) in plans.iter() {
                assert_eq!(column.len(), 4, "{name}");
            }
            let total = plans.column("total").unwrap();
            let rows: Vec<&[f64]> = Columns::NAMES[5..17]
                .iter()
                .map(|name| plans.column(name).unwrap())
                .collect();
            for plan in 0..4 {
                let sum: f64 = rows.iter().map(|row| row[plan]).sum();
                assert!((sum - total[plan]).abs() < 1e-6);
            }
            Ok(vec![0.0; 4])
        }

        fn failed(&self, error: &ScoreError) {
            panic!("{error}");
        }
    }
    let none = Matches::default();
    let workers = both(4);
    let mut policy = ScoredPolicy::new(CostSettings::default(), Arc::new(Look));
    policy
        .choose(&Cluster::new(3, &workers), &request(&none, 1))
        .unwrap();
}
