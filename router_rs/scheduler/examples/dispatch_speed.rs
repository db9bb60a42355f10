//! What 64 waiting requests cost on one core: `cargo run --release -p
//! kvmesh-scheduler --example dispatch_speed [-- reports]`. Prints a line of JSON a
//! cluster: benchmarks/decision.py makes a table of them.
//!
//! Every worker is busy for long, so all 64 wait, and workers report one after
//! the other, two a millisecond. A report goes into the views; where it may let
//! somebody go, the first 32 are tried: each is chosen for, judged, and listed
//! where it would go. Timed is all of that; look-ups in the index are not part of
//! it (decision_speed has them).
#![allow(clippy::unwrap_used)]

use kvmesh_kv_index::{Matches, WorkerSlot};
use kvmesh_scheduler::{
    Abilities, Bookings, ByClass, Class, CostSettings, Dispatch, DispatchSettings, Entry, KvCost,
    KvRoom, Lane, Load, LocalPrefill, Look, Needs, Outcome, Phase, Policy, Reload, Reported,
    RequestView, Role, Roster, Share, StepModel, UsualStreams, Verdict, Work, WorkerView,
    virtual_deadline_ms,
};
use std::sync::Arc;
use std::time::Instant;

const WAITING: u32 = 64;
const PROMPT: u32 = 5_000;
const WARM_UP: usize = 500;
const MODEL: &str = "llama-3.1-70b-instruct";

/// splitmix64.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A report of a worker in the middle of a long step. Some of them have few
/// tokens left to compute, so that a look at those who wait is due.
fn load(seed: u64, now_ms: f64) -> Load {
    let tokens = mix(seed) % 4_000;
    let decoding = (mix(seed + 1) % 24) as u32;
    let own = Share {
        queued: 1,
        queued_prefill_tokens: tokens,
        decoding,
        decode_context: u64::from(decoding) * 2_500,
        classes: ByClass {
            waiting: [1, 0, 0],
            waiting_tokens: [tokens, 0, 0],
            decoding: [decoding, 0, 0],
        },
        ..Share::default()
    };
    Load {
        own,
        others: Share::default(),
        kv: KvRoom {
            free: 20_000,
            evictable: 10_000,
            running: 10_000,
            ..KvRoom::default()
        },
        step_ends_ms: now_ms + 1e6,
    }
}

fn roster(workers: u32) -> Roster {
    let abilities = Arc::new(Abilities {
        streamed_hand_off: true,
        prefill_emits_first_token: true,
        layer_preemption: false,
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
    for slot in 0..workers {
        roster.insert(WorkerView {
            slot: WorkerSlot(slot),
            role: Role::Both,
            phase: Phase::Serving,
            draining: false,
            suspect: false,
            model: MODEL.into(),
            digest: "6f".repeat(32).as_str().into(),
            adapters: Arc::default(),
            abilities: Arc::clone(&abilities),
            step: StepModel {
                a_ms: 12.0,
                b_ms: 0.05,
                c_ms: 1e-6,
                d_ms: 0.05,
                e_ms: 2e-5,
                relative_error: 0.1,
                saturating_chunk: 2_048,
            },
            load: load(u64::from(slot), 0.0),
            booked: Work::default(),
            computed: Work::default(),
            prompts: Vec::new(),
            left: [200.0; 3],
            usual: UsualStreams::default(),
            relay_ms: 0.0,
        });
    }
    roster
}

fn request(at: u32, key_ms: f64, cached: &Matches) -> RequestView<'_> {
    RequestView {
        id: u128::from(at),
        model: MODEL,
        digest: "",
        adapter: "",
        prompt_tokens: PROMPT,
        output_tokens: 0,
        max_tokens: 1_024,
        expected_output: 300,
        class: Class::Interactive,
        itl_target_ms: None,
        virtual_deadline_ms: key_ms,
        affinity: 0,
        needs: Needs::default(),
        cached,
        excluded: &[],
    }
}

fn run(workers: u32, reports: usize) {
    let (mut roster, bookings, cached) = (roster(workers), Bookings::new(), Matches::default());
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    let mut policy = KvCost::default();
    let targets = CostSettings::default().targets;
    for at in 0..WAITING {
        let key_ms = virtual_deadline_ms(&targets, Class::Interactive, f64::from(at), 200.0);
        let entry = Entry {
            model: MODEL.into(),
            lane: Lane {
                class: Class::Interactive,
                tenant: u64::from(at % 4),
            },
            key_ms,
            work_ms: 200.0,
            goes_on: false,
        };
        dispatch.waits(&entry, 0.0, at).unwrap();
    }
    let (mut passes, mut decisions, mut began) = (0u64, 0u64, Instant::now());
    for n in 0..reports + WARM_UP {
        if n == WARM_UP {
            (passes, decisions, began) = (0, 0, Instant::now());
        }
        let now_ms = n as f64 / 2.0;
        let view = roster
            .get_mut(WorkerSlot(mix(n as u64) as u32 % workers))
            .unwrap();
        view.load = load(n as u64, now_ms);
        let report = Reported::of(view, 50.0, LocalPrefill::ByCost, &bookings);
        if dispatch.look(&report, now_ms) != Look::Now {
            continue;
        }
        passes += 1;
        let mut pass = dispatch.pass(&report.model, now_ms);
        while let Some(next) = dispatch.next(&mut pass, now_ms) {
            roster.refresh(&bookings);
            let cluster = roster.cluster(1).at(now_ms);
            let view = request(next.item, next.turn.chosen_by_ms(), &cached);
            let decision = policy.choose(&cluster, &view).unwrap();
            decisions += 1;
            let rules = dispatch.settings();
            let outcome = match rules.judge(&decision, next.turn, 50.0, &bookings) {
                Verdict::Waits(hold) => Outcome::Waits(next.item, Some(hold)),
                Verdict::Goes(_) => Outcome::Waits(next.item, None),
            };
            dispatch.came_of(&mut pass, &next.place, outcome, now_ms);
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{{\"workers\": {workers}, \"waiting\": {}, \"reports\": {reports}, \"passes\": {passes}, \
         \"decisions_per_s\": {:.0}, \"us_per_report\": {:.2}}}",
        dispatch.len(),
        decisions as f64 / seconds,
        seconds * 1e6 / reports as f64,
    );
}

fn main() {
    let reports = std::env::args()
        .nth(1)
        .and_then(|count| count.parse().ok())
        .unwrap_or(20_000);
    for workers in [64, 1_024] {
        run(workers, reports);
    }
}
