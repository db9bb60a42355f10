//! What is ruled out unseen is never what would be chosen.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::booking::Work;
use crate::fit::could_compute;
use crate::request::{Class, Needs};
use crate::step_model::{StepModel, prefill_context};
use crate::survey::Holder;
use crate::transfer::{Path, TransferRates};
use crate::usual::UsualStreams;
use crate::worker::{Abilities, KvRoom, Load, Phase, Prompt, Reload, Role, Share, WorkerView};
use kvmesh_kv_index::{CacheChange, IndexSettings, Knowledge, KvIndex, Matches, Tier, WorkerSlot};
use proptest::prelude::*;
use std::sync::Arc;

/// Numbers from a seed: splitmix64.
struct Draw(u64);

impl Draw {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mixed(self.0) % bound.max(1)
    }

    fn real(&mut self, most: f64) -> f64 {
        self.below(1 << 30) as f64 / f64::from(1 << 30) * most
    }

    fn yes(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }
}

fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn share(draw: &mut Draw) -> Share {
    let mut share = Share {
        queued: draw.below(4) as u32,
        decoding: draw.below(40) as u32,
        receiving: draw.below(3) as u32,
        running_prefill_tokens: draw.below(3_000),
        ..Share::default()
    };
    share.queued_prefill_tokens = u64::from(share.queued) * draw.below(6_000);
    share.decode_context = u64::from(share.decoding) * draw.below(4_000);
    // Of some the classes are told, of others not, or not all.
    let class = draw.below(3) as usize;
    if !draw.yes(3) {
        share.classes.waiting[class] = share.queued;
        share.classes.waiting_tokens[class] = share.queued_prefill_tokens;
        share.classes.decoding[draw.below(3) as usize] = draw.below(50) as u32;
    }
    share
}

fn worker(slot: u32, role: Role, draw: &mut Draw) -> WorkerView {
    let idle = draw.yes(4);
    let shares = if idle {
        Default::default()
    } else {
        (share(draw), share(draw))
    };
    let prompts = (0..if idle { 0 } else { draw.below(4) }).map(|_| {
        let tokens = 1 + draw.below(5_000);
        Prompt {
            virtual_deadline_ms: draw.real(20_000.0),
            class: Class::ALL[draw.below(3) as usize],
            tokens,
            context: prefill_context(0, tokens) as u64,
        }
    });
    WorkerView {
        prompts: prompts.collect(),
        slot: WorkerSlot(slot),
        role,
        phase: Phase::Serving,
        draining: draw.yes(20),
        suspect: draw.yes(20),
        model: "m".into(),
        digest: "d".into(),
        adapters: Arc::default(),
        abilities: Arc::new(Abilities {
            streamed_hand_off: !draw.yes(6),
            prefill_emits_first_token: !draw.yes(6),
            layer_preemption: !draw.yes(3),
            host: ["", "a", "b"][draw.below(3) as usize].into(),
            engine_connector: "nixl".into(),
            pairing: if draw.yes(8) { "other" } else { "kv" }.into(),
            prefix_pull: !draw.yes(4),
            reload: Reload::default(),
            grammars: false,
            grammars_over_continuation: false,
            penalties_over_continuation: true,
            max_logprobs: 0,
            no_cache_salt: false,
            block_tokens: 16,
            pool_blocks: 4_000,
            block_bytes: 1 << draw.below(23),
            max_batch: 1 + draw.below(80) as u32,
            context_length: 32_768,
        }),
        step: StepModel {
            a_ms: draw.real(20.0),
            b_ms: draw.real(0.5),
            c_ms: draw.real(1e-4),
            d_ms: draw.real(2.0),
            e_ms: draw.real(1e-3),
            relative_error: 0.1,
            saturating_chunk: 16 + draw.below(2_000) as u32,
        },
        load: Load {
            own: shares.0,
            others: shares.1,
            kv: KvRoom {
                free: draw.below(4_000),
                evictable: draw.below(1_000),
                running: draw.below(1_000),
                ..KvRoom::default()
            },
            // On the clock of what asks: most of them are over.
            step_ends_ms: draw.real(25_000.0),
        },
        booked: Work::default(),
        computed: Work::default(),
        left: [draw.real(500.0), draw.real(500.0), draw.real(500.0)],
        usual: UsualStreams::of([draw.real(9.0), draw.real(3.0), 0.0]),
        relay_ms: draw.real(50.0),
    }
}

/// A cluster, what is learnt of its transfers, and what it holds of a prompt.
fn cluster(draw: &mut Draw, kinds: u64) -> (Vec<WorkerView>, TransferRates, Matches) {
    let roles = [Role::Both, Role::Prefill, Role::Decode];
    let index = KvIndex::new(IndexSettings::default());
    let chain: Vec<u64> = (1..=256).collect();
    let mut rates = TransferRates::new();
    let count = 2 + draw.below(70);
    let learns = draw.yes(2);
    let workers = (0..count).map(|_| {
        let slot = index.add_worker(16, Knowledge::Events).unwrap();
        if draw.yes(3) {
            let depth = draw.below(256) as usize;
            let held = [CacheChange::Stored {
                chain: &chain[..depth],
                tier: [Tier::Device, Tier::Host, Tier::Disk][draw.below(3) as usize],
            }];
            index.apply(slot, &held).unwrap();
        }
        let role = roles[(draw.below(kinds) % 3) as usize];
        worker(slot.0, role, draw)
    });
    let workers: Vec<WorkerView> = workers.collect();
    for target in workers.iter().filter(|_| learns) {
        let source = &workers[draw.below(count) as usize];
        let path = Path::between(&source.abilities, &target.abilities);
        for _ in 0..1 + draw.below(3) {
            let (bytes, ms) = (1 + draw.below(1 << 28), 0.1 + draw.real(500.0));
            rates.observe(source.slot, target.slot, path, bytes, ms);
        }
    }
    // Some move to another host, or leave and come again.
    let mut workers = workers;
    for at in 0..workers.len() {
        if draw.yes(8) {
            Arc::make_mut(&mut workers[at].abilities).host = ["", "a", "b"][at % 3].into();
        } else if draw.yes(8) {
            rates.forget(workers[at].slot);
        }
    }
    (workers, rates, index.lookup(&chain))
}

fn request<'a>(draw: &mut Draw, cached: &'a Matches) -> RequestView<'a> {
    let max_tokens = 1 + draw.below(2_000) as u32;
    RequestView {
        id: u128::from(draw.below(u64::MAX)),
        model: "m",
        digest: "",
        adapter: "",
        prompt_tokens: 1 + draw.below(8_000) as u32,
        output_tokens: draw.below(3) as u32 * 50,
        max_tokens,
        expected_output: 1 + draw.below(u64::from(max_tokens)) as u32,
        class: Class::ALL[draw.below(3) as usize],
        itl_target_ms: draw.yes(3).then_some(20.0),
        virtual_deadline_ms: if draw.yes(10) {
            f64::INFINITY
        } else {
            draw.real(40_000.0)
        },
        affinity: 0,
        needs: Needs::default(),
        cached,
        excluded: &[],
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// The same plans at the same costs in the same order, whatever is ruled
    /// out on the way.
    #[test]
    fn ruling_out_changes_no_plan(seed in any::<u64>(), kinds in 1u64..4, keep in 1usize..10, by_cost in any::<bool>()) {
        let mut draw = Draw(seed);
        let (workers, rates, cached) = cluster(&mut draw, kinds);
        let request = request(&mut draw, &cached);
        let now_ms = draw.real(20_000.0);
        let cluster = Cluster::new(seed, &workers).at(now_ms).with_transfers(&rates);
        let settings = CostSettings {
            best_of_side: keep,
            local_prefill: if by_cost { LocalPrefill::ByCost } else { LocalPrefill::default() },
            plans_kept: [1, 8, 100][draw.below(3) as usize],
            ..CostSettings::default()
        };
        let mut pruned = KvCost::new(settings);
        let mut unpruned = pruned.clone();
        unpruned.prune = false;
        // One policy for all: nothing of a choice is left for the next one.
        for count in [workers.len(), draw.below(workers.len() as u64) as usize, workers.len()] {
            let cluster = Cluster { workers: &workers[..count], ..cluster };
            prop_assert_eq!(pruned.choose(&cluster, &request), unpruned.choose(&cluster, &request));
        }
    }

    /// Of a plain request a worker's gate says at once what its view says at length.
    #[test]
    fn gates_know_who_could_compute_a_plain_prompt(seed in any::<u64>(), long in 1u32..70_000) {
        let mut draw = Draw(seed);
        let (workers, _, cached) = cluster(&mut draw, 3);
        let request = RequestView { prompt_tokens: long, ..request(&mut draw, &cached) };
        prop_assert!(request.is_plain());
        let held = Asked::of(&request, 0.0).held;
        Cluster::new(seed, &workers).with_table(|table| {
            for (worker, gate) in workers.iter().zip(&table.gates) {
                if gate.ready || worker.suspect && worker.takes_work() {
                    prop_assert_eq!(held <= gate.limit, could_compute(worker, &request));
                }
            }
            Ok(())
        })?;
    }

    /// Floors stay those of their workers while some leave and others come.
    #[test]
    fn floors_follow_who_leaves_and_who_comes(seed in any::<u64>(), changes in 0usize..60) {
        let mut draw = Draw(seed);
        let (mut workers, rates, cached) = cluster(&mut draw, 3);
        let request = request(&mut draw, &cached);
        let mut kept = Table::new(&ClassTargets::default());
        kept.count_all(&workers);
        for _ in 0..changes {
            let place = draw.below(workers.len() as u64) as usize;
            if draw.yes(2) && workers.len() > 1 {
                workers.swap_remove(place);
                kept.swap_remove(place);
                continue;
            }
            let place = if draw.yes(3) { workers.len() } else { place };
            let slot = workers.get(place).map_or(1_000 + draw.below(1_000) as u32, |one| one.slot.0);
            let view = worker(slot, Role::Both, &mut draw);
            kept.count(place, &view);
            match workers.get_mut(place) {
                Some(there) => *there = view,
                None => workers.push(view),
            }
        }
        let mut fresh = Table::new(&ClassTargets::default());
        fresh.count_all(&workers);
        let people = CostSettings::default().people();
        let cluster = Cluster::new(seed, &workers).at(draw.real(20_000.0)).with_transfers(&rates);
        let lows = |table: &Table| {
            let mut lows = Lows::default();
            let question = Question {
                cluster: &cluster,
                table,
                request: &request,
                asked: Asked::of(&request, cluster.now_ms),
                people: &people,
                holders: &[],
                tiered: request.is_tiered(),
                pull_from_tokens: 128,
                relay_least_ms: 0.0,
            };
            lows.count(&question, &vec![true; workers.len()]);
            let mut all = Vec::new();
            for list in [&lows.prefill, &lows.decode, &lows.whole] {
                all.extend_from_slice(&list[..workers.len()]);
            }
            all
        };
        prop_assert_eq!(lows(&kept), lows(&fresh));
    }

    /// No floor is over the cost, for whichever side.
    #[test]
    fn no_floor_is_over_the_cost(seed in any::<u64>(), kinds in 1u64..4) {
        let mut draw = Draw(seed);
        let (workers, rates, cached) = cluster(&mut draw, kinds);
        let request = request(&mut draw, &cached);
        let now_ms = draw.real(20_000.0);
        let cluster = Cluster::new(seed, &workers).at(now_ms).with_transfers(&rates);
        let people = CostSettings::default().people();
        cluster.with_table(|table| {
            let holders: Vec<Holder> = (0..workers.len())
                .step_by(5)
                .map(|at| Holder {
                    at: at as u32,
                    kind: table.gates[at].kind,
                    tokens: request.cached_on(workers[at].slot),
                })
                .collect();
            let question = Question {
                cluster: &cluster,
                table,
                request: &request,
                asked: Asked::of(&request, now_ms),
                people: &people,
                holders: &holders,
                tiered: request.is_tiered(),
                pull_from_tokens: 128,
                relay_least_ms: workers.iter().map(|one| one.relay_ms).fold(f64::INFINITY, f64::min),
            };
            let mut lows = Lows::default();
            lows.count(&question, &vec![true; workers.len()]);
            for at in 0..workers.len() as u32 {
                let place = at as usize;
                let prefill = question.prefill_side(at).total_ms;
                let floor = lows.prefill[place];
                prop_assert!(floor <= prefill, "{} for {:?}", floor, question.prefill_side(at).terms);
                let decode = question.decode_cost(&question.decode_side(at));
                prop_assert!(lows.decode[place] <= decode);
                let whole = question.whole(at).considered.terms.total_ms();
                prop_assert!(lows.whole[place] <= whole);
            }
            Ok(())
        })?;
    }
}
