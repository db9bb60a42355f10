//! What a decision takes on one core: `cargo run --release -p kvmesh-scheduler
//! --example decision_speed [-- decisions]`. Prints a line of JSON a case:
//! benchmarks/decision.py makes a table of them.
//!
//! A decision is all that a router does between a request's chain values and a
//! booked plan: look-up in the index, what changed since the last decision
//! brought into the views, choice, bookings. A choice whose plans a function
//! scores is timed apart, without the function, and so are the same decisions made
//! three times, of which each one's least time is its own: what a machine interrupts
//! is in the others. Between two of them, not timed, a
//! worker reports, and bookings made a while ago are released. Hashing of the
//! prompt is timed apart.
#![allow(clippy::unwrap_used)]

use kvmesh_kv_index::{
    CacheChange, IndexSettings, Knowledge, KvIndex, Matches, Tier, WorkerSlot, chain_values,
};
use kvmesh_scheduler::{
    Abilities, AdmissionSettings, Booking, Bookings, ByClass, Class, Columns, CostSettings,
    Estimate, KvCost, KvRoom, Load, Needs, Path, Phase, Policy, Reload, RequestView, Role, Roster,
    ScoreError, ScoredPolicy, Scorer, Share, StepModel, TransferRates, UsualStreams, Work,
    WorkerView, placeable, virtual_deadline_ms,
};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

const PROMPT: usize = 5_000;
const PROMPTS: u64 = 64;
const WARM_UP: usize = 500;

/// splitmix64.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A worker with some load, all from its seed.
fn view(slot: WorkerSlot, role: Role, abilities: &Arc<Abilities>) -> WorkerView {
    WorkerView {
        slot,
        role,
        phase: Phase::Serving,
        draining: false,
        suspect: false,
        model: "llama-3.1-70b-instruct".into(),
        digest: "6f".repeat(32).as_str().into(),
        adapters: Arc::default(),
        abilities: Arc::clone(abilities),
        step: StepModel {
            a_ms: 12.0,
            b_ms: 0.05,
            c_ms: 1e-6,
            d_ms: 0.05,
            e_ms: 2e-5,
            relative_error: 0.1,
            saturating_chunk: 2_048,
        },
        load: load(u64::from(slot.0), role, 0.0),
        booked: Work::default(),
        computed: Work::default(),
        prompts: Vec::new(),
        left: [200.0; 3],
        usual: UsualStreams::default(),
        relay_ms: (mix(u64::from(slot.0)) % 100) as f64 / 100.0,
    }
}

/// A load report: of prompts where they are computed, of streams where they
/// decode.
fn load(seed: u64, role: Role, now_ms: f64) -> Load {
    let pick = |at: u64, below: u64| mix(seed * 8 + at) % below;
    let share = |at: u64| {
        let (mut queued, mut decoding) = (pick(at, 3) as u32, pick(at + 1, 24) as u32);
        match role {
            Role::Prefill => decoding = 0,
            Role::Decode => queued = 0,
            Role::Both => {}
        }
        let tokens = u64::from(queued) * (500 + pick(at + 2, 4_000));
        Share {
            queued,
            queued_prefill_tokens: tokens,
            running_prefill_tokens: u64::from(queued) * pick(at + 3, 1_000),
            decoding,
            decode_context: u64::from(decoding) * 2_500,
            receiving: 0,
            classes: ByClass {
                waiting: [queued, 0, 0],
                waiting_tokens: [tokens, 0, 0],
                decoding: [decoding / 2, decoding - decoding / 2, 0],
            },
        }
    };
    Load {
        own: share(0),
        others: share(4),
        kv: KvRoom {
            free: 20_000,
            evictable: 10_000,
            running: 10_000,
            ..KvRoom::default()
        },
        step_ends_ms: now_ms + pick(7, 30) as f64,
    }
}

/// The cost itself, as somebody else's function would give it back.
struct Totals;

impl Scorer for Totals {
    fn score(&self, plans: &Columns) -> Result<Vec<f64>, ScoreError> {
        Ok(plans.column("total").unwrap().to_vec())
    }

    fn failed(&self, error: &ScoreError) {
        panic!("{error}");
    }
}

/// Identical runs of which each decision's least time is its own.
const RUNS: usize = 3;

/// Times of a run, in ns.
#[derive(Default)]
struct Times {
    decisions: Vec<u64>,
    /// Of the choice in each.
    choices: Vec<u64>,
    /// Of each request's admission before it.
    admissions: Vec<u64>,
    /// Of the same choice where a function scores.
    scored: Vec<u64>,
}

struct Case {
    name: &'static str,
    workers: usize,
    roles: [Role; 4],
}

struct Bench {
    index: KvIndex,
    roster: Roster,
    slots: Vec<WorkerSlot>,
    /// As after a day: of every pair.
    rates: TransferRates,
    ids: Vec<Vec<u32>>,
    chains: Vec<Vec<u64>>,
}

impl Bench {
    fn new(case: &Case) -> Self {
        let index = KvIndex::new(IndexSettings::default());
        let abilities = Arc::new(Abilities {
            streamed_hand_off: true,
            prefill_emits_first_token: true,
            layer_preemption: true,
            host: "".into(),
            engine_connector: "".into(),
            pairing: "KvCompatibility { dtype: bfloat16, format: 1, layers: 80 } 16".into(),
            prefix_pull: true,
            reload: Reload::default(),
            grammars: false,
            grammars_over_continuation: false,
            penalties_over_continuation: true,
            max_logprobs: 20,
            no_cache_salt: false,
            block_tokens: 16,
            pool_blocks: 40_000,
            block_bytes: 5 << 20,
            max_batch: 256,
            context_length: 131_072,
        });
        let mut roster = Roster::new();
        let slots: Vec<WorkerSlot> = (0..case.workers)
            .map(|at| {
                let slot = index.add_worker(16, Knowledge::Events).unwrap();
                roster.insert(view(slot, case.roles[at % 4], &abilities));
                slot
            })
            .collect();
        let ids: Vec<Vec<u32>> = (0..PROMPTS)
            .map(|prompt| {
                let id = |at: usize| mix(prompt << 20 | at as u64) as u32 % 128_000;
                (0..PROMPT).map(id).collect()
            })
            .collect();
        let chains: Vec<Vec<u64>> = ids.iter().map(|ids| chain_values(7, ids)).collect();
        // Each prompt is held by an eighth of the workers, to different depths.
        for (prompt, chain) in chains.iter().enumerate() {
            for slot in &slots {
                let draw = mix((prompt as u64) << 32 | u64::from(slot.0));
                if draw.is_multiple_of(8) {
                    let depth = (draw >> 8) as usize % chain.len();
                    let held = [CacheChange::Stored {
                        chain: &chain[..depth],
                        tier: Tier::Device,
                    }];
                    index.apply(*slot, &held).unwrap();
                }
            }
        }
        let mut rates = TransferRates::new();
        let (bytes, prior) = (64u64 << 20, Path::Network.prior());
        for (source, target) in slots
            .iter()
            .flat_map(|s| slots.iter().map(move |t| (*s, *t)))
        {
            let draw = mix(u64::from(source.0) << 32 | u64::from(target.0)) % 1_000;
            let ms = prior.ms(bytes as f64) * (0.8 + 0.4 * draw as f64 / 1e3);
            rates.observe(source, target, Path::Network, bytes, ms);
        }
        Self {
            index,
            roster,
            slots,
            rates,
            ids,
            chains,
        }
    }

    /// `scores`: with the choice where a function scores.
    fn run(&mut self, decisions: usize, scores: bool) -> Times {
        let bookings = Bookings::new();
        let targets = CostSettings::default().targets;
        let mut policy = KvCost::default();
        let mut scored = ScoredPolicy::new(CostSettings::default(), Arc::new(Totals));
        let (mut at_entry, mut cached) = (Matches::default(), Matches::default());
        let mut guards: VecDeque<Vec<Booking>> = VecDeque::new();
        let mut times = Times::default();
        for n in 0..decisions + WARM_UP {
            let slot = self.slots[mix(n as u64) as usize % self.slots.len()];
            let reporting = self.roster.get_mut(slot).unwrap();
            reporting.load = load(n as u64, reporting.role, n as f64);
            if guards.len() > self.slots.len() {
                guards.pop_front();
            }
            let chain = &self.chains[n % self.chains.len()];
            let now_ms = n as f64;
            let none = Matches::default();
            let request = RequestView {
                id: u128::from(mix(n as u64)),
                model: "llama-3.1-70b-instruct",
                digest: "",
                adapter: "",
                prompt_tokens: PROMPT as u32,
                output_tokens: 0,
                max_tokens: 1_024,
                expected_output: 300,
                class: Class::Interactive,
                itl_target_ms: None,
                virtual_deadline_ms: virtual_deadline_ms(
                    &targets,
                    Class::Interactive,
                    now_ms,
                    200.0,
                ),
                affinity: 0,
                needs: Needs::default(),
                cached: &none,
                excluded: &[],
            };
            // Entry looks up, too, and asks whether anybody can take it, what it would
            // wait for, and, with its key, whether it may.
            let entered = Instant::now();
            self.index.lookup_into(chain, &mut at_entry);
            let asked = RequestView {
                cached: &at_entry,
                ..request
            };
            let keyless = RequestView {
                virtual_deadline_ms: f64::INFINITY,
                ..asked
            };
            self.roster.refresh(&bookings);
            let cluster = self
                .roster
                .cluster(1)
                .at(now_ms)
                .with_transfers(&self.rates);
            placeable(&cluster, &keyless).unwrap();
            let bound = AdmissionSettings::default();
            for view in [&keyless, &asked] {
                // Whether it is admitted is not what is measured.
                let estimate = Estimate::of(&cluster, view);
                std::hint::black_box(estimate.admit(0.0, None, &bound)).ok();
            }
            let admitted = entered.elapsed();
            let began = Instant::now();
            self.index.lookup_into(chain, &mut cached);
            let request = RequestView {
                cached: &cached,
                ..request
            };
            self.roster.refresh(&bookings);
            let cluster = self
                .roster
                .cluster(1)
                .at(now_ms)
                .with_transfers(&self.rates);
            let choosing = Instant::now();
            let decision = policy.choose(&cluster, &request).unwrap();
            let chose = choosing.elapsed();
            let booked = decision.work.iter().map(|(slot, work)| {
                bookings.book_prompt(*slot, *work, request.virtual_deadline_ms)
            });
            guards.push_back(booked.collect());
            let took = began.elapsed();
            let cluster = self
                .roster
                .cluster(1)
                .at(now_ms)
                .with_transfers(&self.rates);
            let scoring = Instant::now();
            if scores {
                std::hint::black_box(scored.choose(&cluster, &request).unwrap());
            }
            let scoring = scoring.elapsed();
            if n >= WARM_UP {
                times.decisions.push(took.as_nanos() as u64);
                times.choices.push(chose.as_nanos() as u64);
                times.admissions.push(admitted.as_nanos() as u64);
                if scores {
                    times.scored.push(scoring.as_nanos() as u64);
                }
            }
        }
        times
    }

    /// Median time of hashing one prompt, ns.
    fn hashing(&self) -> u64 {
        let mut times: Vec<u64> = (0..500)
            .map(|n| {
                let began = Instant::now();
                std::hint::black_box(chain_values(n as u64, &self.ids[n % self.ids.len()]));
                began.elapsed().as_nanos() as u64
            })
            .collect();
        quantile(&mut times, 0.5)
    }
}

/// What decisions take where nothing interrupts them: the same ones are made again
/// and again, and of each the least time counts.
fn undisturbed(case: &Case, decisions: usize) -> Vec<u64> {
    let mut least = vec![u64::MAX; decisions];
    for _ in 0..RUNS {
        let times = Bench::new(case).run(decisions, false).decisions;
        for (least, time) in least.iter_mut().zip(times) {
            *least = time.min(*least);
        }
    }
    least
}

fn quantile(times: &mut [u64], share: f64) -> u64 {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * share) as usize]
}

fn main() {
    let decisions = std::env::args()
        .nth(1)
        .and_then(|count| count.parse().ok())
        .unwrap_or(20_000);
    let (p, d, b) = (Role::Prefill, Role::Decode, Role::Both);
    for workers in [64, 1_024] {
        for (name, roles) in [
            ("prefill and decode", [p, d, p, d]),
            ("both", [b, b, b, b]),
            ("mixed", [p, d, b, d]),
        ] {
            let case = Case {
                name,
                workers,
                roles,
            };
            let mut bench = Bench::new(&case);
            let hash = bench.hashing();
            let mut times = bench.run(decisions, false);
            let few = (decisions / 8).max(100);
            times.scored = Bench::new(&case).run(few, true).scored;
            let mut own = undisturbed(&case, few);
            let mut row = format!(
                "\"workers\": {}, \"roles\": \"{}\", \"decisions\": {decisions}, \"hash_us\": {:.2}",
                case.workers,
                case.name,
                hash as f64 / 1e3,
            );
            for (name, times) in [
                ("", &mut times.decisions),
                ("choice_", &mut times.choices),
                ("admission_", &mut times.admissions),
                ("scored_", &mut times.scored),
                ("own_", &mut own),
            ] {
                for (share, at) in [("p50", 0.5), ("p99", 0.99)] {
                    let us = quantile(times, at) as f64 / 1e3;
                    row += &format!(", \"{name}{share}_us\": {us:.2}");
                }
            }
            println!("{{{row}}}");
        }
    }
}
