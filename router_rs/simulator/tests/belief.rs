//! What the scheduler believes, and what it comes to know.
#![allow(clippy::unwrap_used)]

mod common;

use common::{settings, traffic};
use kvmesh_simulator::{
    LocalPrefill, Noise, PolicySettings, QueueSettings, Run, Settings, simulate,
};

/// Requests whose prompt was computed by each worker.
fn shares(run: &Run, workers: u32) -> Vec<usize> {
    let count = |worker| run.rows.iter().filter(|row| row.prefill == worker).count();
    (0..workers).map(count).collect()
}

#[test]
fn two_equal_workers_share_evenly_while_they_are_learnt() {
    // Jitter and stalls differ from worker to worker, and so does what is learnt
    // of each; 1,000 requests count. Nothing is shared, so that no cache draws
    // requests to where others were.
    let mut trace = traffic(1_250, 12.0);
    trace.ids.clear();
    for request in &mut trace.requests {
        request.blocks = 0..0;
    }
    let mut first = 0;
    for seed in 1..=20 {
        let settings = Settings {
            noise: Noise {
                speed: 0.0,
                ..Noise::default()
            },
            seed,
            ..settings(0, 0, 2)
        };
        let run = simulate(&settings, &trace).unwrap();
        assert_eq!(run.rows.len(), 1_000);
        let shares = shares(&run, 2);
        // Four times what a coin's share varies by (the root of 1,000, halved).
        assert!(
            shares.iter().all(|share| (436..=564).contains(share)),
            "seed {seed}: {shares:?}"
        );
        first += shares[0];
    }
    // And all runs together, where chance has evened out.
    assert!((9_600..=10_400).contains(&first), "{first} of 20,000");
}

#[test]
fn a_prior_that_is_off_by_two_is_learnt_away() {
    let trace = traffic(3_000, 25.0);
    let run = |prior| {
        let settings = Settings {
            prior,
            ..settings(0, 0, 4)
        };
        simulate(&settings, &trace).unwrap().summary
    };
    let exact = run([1.0; 5]);
    for coefficient in 0..5 {
        for factor in [0.5, 2.0] {
            let mut prior = [1.0; 5];
            prior[coefficient] = factor;
            let off = run(prior);
            let what = format!("coefficient {coefficient} times {factor}");
            let ratio = off.ttft_ms.mean / exact.ttft_ms.mean;
            assert!(ratio < 1.1, "{what}: TTFT {ratio}");
            let (found, known) = (off.prediction, exact.prediction);
            assert!(
                found.median < known.median + 0.05,
                "{what}: {found:?}, {known:?}"
            );
        }
    }
}

#[test]
fn short_prompts_may_stay_with_decode_and_long_ones_go_to_prefill() {
    // Every tenth prompt is long; decode workers always have streams.
    let mut trace = traffic(1_000, 12.0);
    trace.ids.clear();
    for (at, request) in trace.requests.iter_mut().enumerate() {
        request.blocks = 0..0;
        request.prompt = if at % 10 == 0 { 8_000 } else { 200 };
    }
    let whole = |local_prefill| {
        let settings = Settings {
            local_prefill: Some(local_prefill),
            ..settings(2, 2, 0)
        };
        let run = simulate(&settings, &trace).unwrap();
        [200, 8_000].map(|prompt| {
            let of = run.rows.iter().filter(|row| row.prompt == prompt);
            let stay = of.clone().filter(|row| row.prefill == row.decode);
            stay.count() as f64 / of.count() as f64
        })
    };
    let [short, long] = whole(LocalPrefill::ByCost);
    assert!(short > 0.05 && long < short / 5.0, "{short} {long}");
    assert_eq!(whole(LocalPrefill::WithoutPrefillWorkers), [0.0, 0.0]);
}

#[test]
fn who_knows_everything_brings_first_tokens_no_later() {
    let trace = traffic(1_500, 45.0);
    for (prefill, decode, both) in [(0, 0, 12), (4, 6, 0)] {
        let ttft = |policy| {
            let settings = Settings {
                policy,
                queue: QueueSettings {
                    dispatch_ahead_ms: None,
                    ..QueueSettings::default()
                },
                noise: Noise {
                    reports_a_step_late: false,
                    report_ms: 0.0,
                    network_ms: 0.0,
                    ..Noise::default()
                },
                ..settings(prefill, decode, both)
            };
            simulate(&settings, &trace).unwrap().summary.ttft_ms.mean
        };
        let (knows, learns) = (ttft(PolicySettings::Clairvoyant), ttft(common::cost()));
        assert!(
            knows <= learns,
            "{prefill}P{decode}D+{both}: {knows} against {learns}"
        );
    }
}
