//! What each term of the cost says, seen from outside: plans as `explain`
//! shows them.
#![allow(clippy::unwrap_used)]

mod common;

use common::{cached, request, worker};
use kvmesh_kv_index::{CacheChange, IndexSettings, Knowledge, KvIndex, Matches, Tier, WorkerSlot};
use kvmesh_scheduler::{
    Bookings, Class, ClassTargets, Cluster, Considered, CostSettings, KvCost, Path, Plan, Policy,
    Prompt, Reload, RequestView, Role, Roster, Terms, TransferRates, Work, WorkerView,
    prefill_context,
};
use proptest::prelude::*;
use std::sync::Arc;

fn explain(workers: &[WorkerView], request: &RequestView<'_>) -> Vec<Considered> {
    KvCost::default()
        .explain(&Cluster::new(7, workers), request)
        .unwrap()
}

/// The terms of one worker that does all of it.
fn whole(worker: &WorkerView, request: &RequestView<'_>) -> Terms {
    explain(std::slice::from_ref(worker), request)[0].terms
}

/// The terms of the cheapest pair.
fn split(workers: &[WorkerView], request: &RequestView<'_>) -> Terms {
    let plans = explain(workers, request);
    let split = plans
        .iter()
        .find(|one| matches!(one.plan, Plan::Split { .. }));
    split.unwrap().terms
}

fn of_class(class: Class, request: RequestView<'_>) -> RequestView<'_> {
    RequestView { class, ..request }
}

fn prompt(class: Class, virtual_deadline_ms: f64, tokens: u64) -> Prompt {
    Prompt {
        virtual_deadline_ms,
        class,
        tokens,
        context: prefill_context(0, tokens) as u64,
    }
}

/// A worker on which these own prompts wait.
fn with_prompts(prompts: &[Prompt]) -> WorkerView {
    let mut worker = worker(0, Role::Both);
    for prompt in prompts {
        worker.load.own.queued += 1;
        worker.load.own.queued_prefill_tokens += prompt.tokens;
        let classes = &mut worker.load.own.classes;
        classes.waiting[prompt.class.index()] += 1;
        classes.waiting_tokens[prompt.class.index()] += prompt.tokens;
    }
    worker.prompts = prompts.to_vec();
    worker
}

/// A worker on which so many streams of a class decode.
fn with_streams(class: Class, streams: u32) -> WorkerView {
    let mut worker = worker(0, Role::Both);
    worker.load.own.decoding = streams;
    worker.load.own.decode_context = u64::from(streams) * 500;
    worker.load.own.classes.decoding[class.index()] = streams;
    worker
}

#[test]
fn an_idle_worker_costs_the_prompt_and_nothing_else() {
    let none = Matches::default();
    let terms = whole(&worker(0, Role::Both), &request(&none, 1));
    // 1,024 tokens in four chunks: 4 x 5 + 0.5 x 1,024 + 1e-5 x 524,800.
    assert!((terms.prefill_ms - 537.248).abs() < 1e-9, "{terms:?}");
    assert_eq!(terms.ttft_ms(), terms.prefill_ms);
    // The default class counts a fifth of an interactive one.
    assert!(
        (terms.total_ms() - 0.2 * terms.prefill_ms).abs() < 1e-9,
        "{terms:?}"
    );
}

#[test]
fn those_before_a_request_are_waited_for_and_those_behind_it_are_counted() {
    let none = Matches::default();
    let waiting = [
        prompt(Class::Standard, 1_000.0, 200),
        prompt(Class::Interactive, 5_000.0, 400),
        prompt(Class::Batch, 30_000.0, 800),
    ];
    let worker = with_prompts(&waiting);
    let at = |virtual_deadline_ms| {
        let keyed = RequestView {
            virtual_deadline_ms,
            ..request(&none, 1)
        };
        whole(&worker, &keyed)
    };
    let (first, second, last) = (at(0.0), at(2_000.0), at(40_000.0));
    assert_eq!(first.wait_ms, 0.0);
    assert!(second.wait_ms > 100.0 && last.wait_ms > 6.0 * second.wait_ms);
    // Each behind it waits for its prompt, by the weight of its class.
    let weight = |terms: &Terms| terms.queued_ms / terms.prefill_ms;
    assert!((weight(&first) - (0.2 + 1.0 + 1.0 / 60.0)).abs() < 1e-9);
    assert!((weight(&second) - (1.0 + 1.0 / 60.0)).abs() < 1e-9);
    assert_eq!(last.queued_ms, 0.0);
}

#[test]
fn of_other_routers_prompts_the_class_says_who_is_first() {
    let none = Matches::default();
    let mut worker = worker(0, Role::Both);
    worker.load.others.queued = 2;
    worker.load.others.queued_prefill_tokens = 1_000;
    let class = Class::Batch.index();
    worker.load.others.classes.waiting[class] = 2;
    worker.load.others.classes.waiting_tokens[class] = 1_000;
    let keyed = RequestView {
        virtual_deadline_ms: 3_000.0,
        ..request(&none, 1)
    };
    let cluster = std::slice::from_ref(&worker);
    let at = |now_ms| {
        let cluster = Cluster::new(7, cluster).at(now_ms);
        KvCost::default().explain(&cluster, &keyed).unwrap()[0].terms
    };
    // Batch prompts that came now are due in 30 s and more.
    let now = at(0.0);
    assert_eq!(now.wait_ms, 0.0);
    assert!((now.queued_ms / now.prefill_ms - 2.0 / 60.0).abs() < 1e-9);
    // A request whose deadline is farther than theirs goes behind them.
    let later = at(-40_000.0);
    assert!(later.wait_ms > 400.0 && later.queued_ms == 0.0);
}

#[test]
fn a_running_step_is_waited_for_unless_layers_let_a_more_urgent_one_in() {
    let none = Matches::default();
    let mut worker = with_prompts(&[prompt(Class::Batch, 30_000.0, 4_000)]);
    worker.load.step_ends_ms = 300.0;
    let urgent = RequestView {
        virtual_deadline_ms: 1_000.0,
        ..request(&none, 1)
    };
    assert!(whole(&worker, &urgent).wait_ms <= 10.0);
    // It is known when the step ends: what is left of it shrinks by itself.
    Arc::make_mut(&mut worker.abilities).layer_preemption = false;
    assert_eq!(whole(&worker, &urgent).wait_ms, 300.0);
    let patient = request(&none, 1);
    Arc::make_mut(&mut worker.abilities).layer_preemption = true;
    assert!(whole(&worker, &patient).wait_ms > 2_000.0);
    // Nor is one stopped that also carries a stream.
    worker.load.own.decoding = 1;
    worker.load.own.classes.decoding[Class::Batch.index()] = 1;
    assert_eq!(whole(&worker, &urgent).wait_ms, 300.0);
}

#[test]
fn a_stream_counts_by_its_class() {
    let none = Matches::default();
    let cost = |class, streams| whole(&with_streams(class, streams), &request(&none, 1));
    let at = |class, streams| cost(class, streams).others_stretch_ms;
    assert!(at(Class::Interactive, 8) > at(Class::Standard, 8));
    assert!(at(Class::Standard, 8) > at(Class::Batch, 8));
}

#[test]
fn streams_are_slowed_by_another_until_the_pool_is_level() {
    let none = Matches::default();
    let joined = |streams| {
        let mut decode = with_streams(Class::Batch, streams);
        (decode.slot, decode.role) = (WorkerSlot(1), Role::Decode);
        split(&[worker(0, Role::Prefill), decode], &request(&none, 1)).others_stretch_ms
    };
    // Of B streams one ends, and another comes, B times as often as of one: each
    // is slowed for an (1 + B)th of what it has left.
    let (one, nine) = (joined(1), joined(9));
    assert!(one > 0.0 && (nine / one - (9.0 / 10.0) / (1.0 / 2.0)).abs() < 1e-9);
}

#[test]
fn those_that_end_soon_make_the_pool_level_for_those_that_stay() {
    let none = Matches::default();
    // Ten streams of a class with little left, or with much, beside ten long ones
    // that alone weigh anything here: batch counts next to nothing.
    let slowed = |left| {
        let mut decode = with_streams(Class::Interactive, 10);
        (decode.slot, decode.role) = (WorkerSlot(1), Role::Decode);
        decode.load.own.decoding += 10;
        decode.load.own.classes.decoding[Class::Batch.index()] = 10;
        decode.left = [500.0, 0.0, left];
        split(&[worker(0, Role::Prefill), decode], &request(&none, 1)).others_stretch_ms
    };
    // Ending: 10 / 500 + 10 / 500 a step, and 10 / 500 + 10 / 20.
    let ratio = slowed(20.0) / slowed(500.0);
    let expected = (1.0 / 500.0 + 20.0 / 500.0) / (1.0 / 500.0 + 10.0 / 500.0 + 10.0 / 20.0);
    assert!((ratio / expected - 1.0).abs() < 0.05, "{ratio} {expected}");
}

#[test]
fn beyond_the_target_a_millisecond_counts_four_times() {
    let none = Matches::default();
    // Alone a step takes 7 ms, the gap to the second token is what the
    // transfer leaves: of 32 MB at 2.5 GB/s, or 1.1 GB/s.
    let mut workers = vec![worker(0, Role::Prefill), worker(1, Role::Decode)];
    for worker in &mut workers {
        let abilities = Arc::make_mut(&mut worker.abilities);
        abilities.block_bytes = 32 << 16;
    }
    let of = |beyond_target| {
        let settings = CostSettings {
            beyond_target,
            ..CostSettings::default()
        };
        let interactive = of_class(Class::Interactive, request(&none, 1));
        let plans = KvCost::new(settings)
            .explain(&Cluster::new(7, &workers), &interactive)
            .unwrap();
        plans[0].terms
    };
    let (plain, steep) = (of(1.0), of(4.0));
    let (gap, stretch) = (plain.transfer_ms, CostSettings::default().stretch);
    assert!((plain.gap_ms - stretch * gap).abs() < 1e-9, "{plain:?}");
    let alone = 5.0 + 1.0 + 0.001 * 1_024.0;
    let beyond = (alone + gap - 50.0f64).max(0.0);
    assert!(
        (steep.gap_ms - stretch * (gap + 3.0 * beyond)).abs() < 1e-9,
        "{steep:?}"
    );
    // Prefill emits the first token: the gap is not part of it.
    assert_eq!(steep.ttft_ms(), steep.wait_ms + steep.prefill_ms);
    Arc::make_mut(&mut workers[0].abilities).prefill_emits_first_token = false;
    let late = split(&workers, &request(&none, 1));
    assert!(late.first_from_decode && late.ttft_ms() > late.prefill_ms + late.transfer_ms);
    assert_eq!(late.gap_ms, 0.0);
}

#[test]
fn a_pool_that_will_be_full_costs_computing_again() {
    let none = Matches::default();
    let mut worker = with_streams(Class::Standard, 20);
    let roomy = whole(&worker, &request(&none, 1)).recompute_ms;
    assert_eq!(roomy, 0.0);
    worker.load.kv.free = 90;
    let tight = whole(&worker, &request(&none, 1)).recompute_ms;
    worker.load.kv.free = 70;
    let full = whole(&worker, &request(&none, 1)).recompute_ms;
    assert!(tight > 0.0 && full > tight, "{tight} {full}");
    // At most certain, and then all of it, by the weight of the class.
    let all = whole(&worker, &request(&none, 1)).prefill_ms;
    assert!(full <= 0.2 * 1.2 * all, "{full} {all}");
}

#[test]
fn blocks_below_the_device_cost_their_reload() {
    let mut workers: Vec<WorkerView> = (0..3).map(|slot| worker(slot, Role::Both)).collect();
    for worker in &mut workers {
        let abilities = Arc::make_mut(&mut worker.abilities);
        abilities.block_bytes = 16_000;
        abilities.reload = Reload {
            host: 40_000,
            disk: 4_000,
        };
        abilities.prefix_pull = false;
    }
    let index = KvIndex::new(IndexSettings::default());
    let chain: Vec<u64> = (1..=64).collect();
    for (slot, tier) in [Tier::Device, Tier::Host, Tier::Disk]
        .into_iter()
        .enumerate()
    {
        index.add_worker(16, Knowledge::Events).unwrap();
        let chain = &chain[..40];
        let stored = [CacheChange::Stored { chain, tier }];
        index.apply(WorkerSlot(slot as u32), &stored).unwrap();
    }
    let held = index.lookup(&chain);
    let plans = explain(&workers, &request(&held, 1));
    let terms = |slot| {
        let of = plans
            .iter()
            .find(|one| one.plan.prefill() == WorkerSlot(slot));
        of.unwrap().terms
    };
    // 640 tokens of 1,000 bytes each.
    assert_eq!(
        [0, 1, 2].map(|slot| terms(slot).reload_ms),
        [0.0, 16.0, 160.0]
    );
    assert_eq!(terms(0).prefill_ms, terms(2).prefill_ms);
    assert_eq!(terms(2).ttft_ms() - terms(0).ttft_ms(), 160.0);
    assert!(terms(2).rows().contains(&("reload", 0.2 * 160.0)));
    assert_eq!(plans[0].plan.prefill(), WorkerSlot(0));
}

#[test]
fn a_gap_counts_by_the_itl_that_the_client_asked_for() {
    let none = Matches::default();
    let mut workers = vec![worker(0, Role::Prefill), worker(1, Role::Decode)];
    for worker in &mut workers {
        // 64 MiB in all, 16 MiB after prefill's end: some 17 ms by the prior.
        Arc::make_mut(&mut worker.abilities).block_bytes = 1 << 20;
    }
    let gap = |itl_target_ms| {
        let asked = RequestView {
            itl_target_ms,
            ..request(&none, 1)
        };
        let plans = explain(&workers, &asked);
        let split = plans
            .iter()
            .find(|one| matches!(one.plan, Plan::Split { .. }));
        split.unwrap().terms.gap_ms
    };
    // The class asks for 100 ms: the gap is within it.
    assert_eq!(gap(None), gap(Some(100.0)));
    let (usual, strict) = (gap(None), gap(Some(12.0)));
    assert!(strict > 1.5 * usual, "{strict} {usual}");
    // In force is 1.5 of the worker's own step at least.
    assert_eq!(gap(Some(1.0)), gap(Some(2.0)));
}

#[test]
fn learnt_transfers_decide_where_a_prefix_comes_from() {
    let held = cached(&[(1, 1_008)]);
    let mut workers: Vec<WorkerView> = (0..2).map(|slot| worker(slot, Role::Both)).collect();
    workers[1].load.others.queued_prefill_tokens = 50_000;
    let plan = |rates: &TransferRates| {
        let cluster = Cluster::new(7, &workers).with_transfers(rates);
        KvCost::default()
            .choose(&cluster, &request(&held, 1))
            .unwrap()
            .plan()
    };
    let mut rates = TransferRates::new();
    let pulled = Plan::Whole {
        worker: WorkerSlot(0),
        source: Some(WorkerSlot(1)),
    };
    assert_eq!(plan(&rates), pulled);
    // The path turns out to take longer than computing it.
    for _ in 0..200 {
        let (from, to) = (WorkerSlot(1), WorkerSlot(0));
        rates.observe(from, to, Path::Network, 64 << 10, 5_000.0);
    }
    let computed = Plan::Whole {
        worker: WorkerSlot(0),
        source: None,
    };
    assert_eq!(plan(&rates), computed);
}

#[test]
fn a_decode_worker_that_computes_prompts_stretches_what_joins_it() {
    let none = Matches::default();
    let mut workers = vec![
        worker(0, Role::Prefill),
        worker(1, Role::Both),
        worker(2, Role::Both),
        worker(3, Role::Decode),
    ];
    workers[1].load.own.queued_prefill_tokens = 4_000;
    let plans = explain(&workers, &request(&none, 1));
    let joined = |decode: u32| {
        let split = |one: &&Considered| {
            let split = matches!(one.plan, Plan::Split { .. });
            split && one.plan.prefill().0 == 0 && one.plan.decode().0 == decode
        };
        plans.iter().find(split).unwrap().terms.own_stretch_ms
    };
    assert!(joined(1) > joined(2), "{} {}", joined(1), joined(2));
    assert_eq!(joined(2), joined(3));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Another router's or this one's: more of anything makes a worker no
    /// cheaper; beside more streams chunks are smaller, which may spare some of
    /// them a little.
    #[test]
    fn more_load_never_costs_less(
        tokens in 0u64..20_000,
        streams in 0u32..60,
        more in 1u32..20,
        class in 0usize..3,
        own in any::<bool>(),
    ) {
        let none = Matches::default();
        let request = of_class(Class::ALL[class], request(&none, 1));
        let with = |tokens: u64, streams: u32| {
            let mut worker = worker(0, Role::Both);
            let share = if own { &mut worker.load.own } else { &mut worker.load.others };
            share.queued = u32::from(tokens > 0);
            share.queued_prefill_tokens = tokens;
            share.decoding = streams;
            share.decode_context = u64::from(streams) * 300;
            share.classes.decoding[class] = streams;
            worker
        };
        let base = with(tokens, streams);
        let longer = with(tokens + u64::from(more) * 100, streams);
        let fuller = with(tokens, streams + more);
        let cost = |worker: &WorkerView| whole(worker, &request).total_ms();
        prop_assert!(cost(&longer) >= cost(&base) - 1e-9);
        prop_assert!(cost(&fuller) >= 0.97 * cost(&base));
    }

    /// A roster says the same as its views counted anew, whatever happened to
    /// it.
    #[test]
    fn a_roster_is_its_views(
        actions in prop::collection::vec((0u8..5, 0u32..6, 1u64..3_000), 1..60),
        virtual_deadline_ms in 0.0f64..1e4,
    ) {
        let none = Matches::default();
        let keyed = RequestView { virtual_deadline_ms, ..request(&none, 1) };
        let bookings = Bookings::new();
        let mut roster = Roster::new();
        let mut guards = Vec::new();
        for (kind, slot, amount) in actions {
            let at = WorkerSlot(slot);
            match kind {
                0 => roster.insert(worker(slot, Role::Both)),
                1 => { roster.remove(at); }
                2 => {
                    let mut work = Work { prefills: 1, prefill_tokens: amount, ..Work::default() };
                    work.classes.waiting[1] = 1;
                    work.classes.waiting_tokens[1] = amount;
                    guards.push(bookings.book_prompt(at, work, amount as f64));
                }
                3 if !guards.is_empty() => { guards.swap_remove(amount as usize % guards.len()); }
                _ => if let Some(view) = roster.get_mut(at) {
                    view.load.others.decoding = amount as u32 % 40;
                    view.load.others.decode_context = amount;
                },
            }
        }
        roster.refresh(&bookings);
        for view in roster.views() {
            // A view that came after its bookings is told when they change.
            let fresh = view.booked == bookings.booked(view.slot);
            prop_assert!(fresh || view.booked == Work::default());
        }
        let kept = KvCost::default().explain(&roster.cluster(7), &keyed);
        let counted = KvCost::default().explain(&Cluster::new(7, roster.views()), &keyed);
        prop_assert_eq!(kept, counted);
    }
}

#[test]
fn the_way_to_the_client_is_predicted_and_only_its_differences_cost() {
    let none = Matches::default();
    let with = |ways: [f64; 2]| {
        let mut workers = [worker(0, Role::Both), worker(1, Role::Both)];
        for (worker, relay_ms) in workers.iter_mut().zip(ways) {
            worker.relay_ms = relay_ms;
        }
        let mut terms = [Terms::default(); 2];
        for one in explain(&workers, &request(&none, 1)) {
            terms[one.plan.decode().0 as usize] = one.terms;
        }
        terms
    };
    let (near, alike, apart) = (with([0.0; 2]), with([14.0; 2]), with([14.0, 44.0]));
    for at in 0..2 {
        // What all plans have moves every prediction and no choice.
        assert_eq!(alike[at].ttft_ms(), near[at].ttft_ms() + 14.0);
        assert!((alike[at].total_ms() - near[at].total_ms()).abs() < 1e-9);
        let sum: f64 = apart[at].rows().iter().map(|(_, ms)| ms).sum();
        assert!((sum - apart[at].total_ms()).abs() < 1e-9);
    }
    let farther = apart[1].total_ms() - apart[0].total_ms();
    assert!((farther - apart[1].weight * 30.0).abs() < 1e-9);
}

#[test]
fn weights_follow_the_targets() {
    let none = Matches::default();
    let mut targets = ClassTargets::default();
    targets.standard.ttft_ms = 500.0;
    let settings = CostSettings {
        targets,
        ..CostSettings::default()
    };
    let workers = [worker(0, Role::Both)];
    let plans = KvCost::new(settings)
        .explain(&Cluster::new(7, &workers), &request(&none, 1))
        .unwrap();
    assert_eq!(plans[0].terms.weight, 2.0);
}
