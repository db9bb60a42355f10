//! What a replay promises, seen from outside.
#![allow(clippy::unwrap_used)]

mod common;

use common::{cost, settings, traffic};
use kvmesh_simulator::{
    Failure, LocalPrefill, Noise, Order, PlannerNumbers, PolicySettings, QueueSettings, Row, Run,
    Settings, SimulationError, replay_json, simulate,
};

fn every_policy() -> Vec<PolicySettings> {
    vec![
        cost(),
        PolicySettings::RoundRobin,
        PolicySettings::Random,
        PolicySettings::LeastLoaded,
        PolicySettings::PowerOfTwo,
        PolicySettings::ConsistentHash,
        PolicySettings::PrefixGreedy,
        PolicySettings::OverlapLoad {
            overlap_weight: None,
            temperature: Some(0.1),
        },
        PolicySettings::Weighted {
            overlap: 1.0,
            decode: 0.1,
        },
        PolicySettings::Clairvoyant,
    ]
}

#[test]
fn equal_seeds_give_equal_bytes_and_others_do_not() {
    let trace = traffic(400, 20.0);
    let run = |seed| {
        let settings = Settings {
            seed,
            ..settings(2, 2, 1)
        };
        serde_json::to_string(&simulate(&settings, &trace).unwrap()).unwrap()
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn every_request_ends_once_under_every_policy_and_kind_of_pool() {
    let trace = traffic(300, 15.0);
    for policy in every_policy() {
        let pools = [(0, 0, 3), (2, 2, 0), (1, 1, 2)];
        for ((prefill, decode, both), pulls) in pools
            .into_iter()
            .flat_map(|pool| [(pool, false), (pool, true)])
        {
            let settings = Settings {
                policy: policy.clone(),
                warm_up: 0.0,
                prefix_pull: pulls,
                ..settings(prefill, decode, both)
            };
            let run = simulate(&settings, &trace).unwrap();
            let what = format!("{policy:?} {prefill}P{decode}D+{both}, pulls {pulls}");
            assert_eq!(run.summary.unfinished + run.summary.rejected, 0, "{what}");
            assert_eq!(run.rows.len(), 300, "{what}");
            for row in &run.rows {
                assert!(row.arrival_ms < row.first_ms, "{what} {row:?}");
                assert!(row.first_ms <= row.end_ms, "{what} {row:?}");
            }
        }
    }
}

#[test]
fn the_pool_controller_gives_workers_to_the_pool_that_is_short() {
    // Prompts keep some four workers busy, and there is one; decode workers that
    // computed prompts by cost would hide it.
    let mut trace = traffic(3_000, 20.0);
    for request in &mut trace.requests {
        (request.prompt, request.output) = (5_000, 20);
        request.blocks = 0..0;
    }
    let run = |planner| {
        let settings = Settings {
            planner,
            local_prefill: Some(LocalPrefill::WithoutPrefillWorkers),
            ..settings(1, 7, 0)
        };
        simulate(&settings, &trace).unwrap()
    };
    let (left_alone, planned) = (run(None), run(Some(PlannerNumbers::default())));
    assert!(left_alone.flips.is_empty());
    assert!(planned.flips.len() >= 2, "{:?}", planned.flips);
    for flip in &planned.flips {
        assert_eq!((flip.from, flip.to), ("decode", "prefill"), "{flip:?}");
        assert!(flip.prefill_pressure > 1.0);
    }
    assert_eq!(planned.summary.unfinished, 0);
    let mean = |run: &Run| run.summary.ttft_ms.mean;
    assert!(mean(&planned) < mean(&left_alone) / 2.0);
}

#[test]
fn where_a_role_has_one_worker_the_pool_controller_shares_the_other() {
    // Prompts keep a good worker and a quarter busy; streams are few.
    let mut trace = traffic(1_500, 6.5);
    for request in &mut trace.requests {
        (request.prompt, request.output) = (5_000, 20);
        request.blocks = 0..0;
    }
    let run = |planner| {
        let settings = Settings {
            planner,
            local_prefill: Some(LocalPrefill::WithoutPrefillWorkers),
            ..settings(1, 1, 0)
        };
        simulate(&settings, &trace).unwrap()
    };
    let (left_alone, planned) = (run(None), run(Some(PlannerNumbers::default())));
    let flips: Vec<_> = planned
        .flips
        .iter()
        .map(|flip| (flip.from, flip.to))
        .collect();
    assert_eq!(flips, [("decode", "both")], "{:?}", planned.flips);
    assert_eq!(planned.summary.unfinished, 0);
    let mean = |run: &Run| run.summary.ttft_ms.mean;
    assert!(mean(&planned) < mean(&left_alone) / 2.0);
    // It is seen at work in its new role.
    let both = planned
        .summary
        .pools
        .iter()
        .find(|pool| pool.role == "both");
    assert!(
        both.is_some_and(|pool| pool.busy > 0.1),
        "{:?}",
        planned.summary.pools
    );
}

#[test]
fn a_scorer_that_fails_ends_the_run_and_is_no_other_policy() {
    let settings = Settings {
        policy: PolicySettings::Weighted {
            overlap: f64::NAN,
            decode: 0.1,
        },
        ..settings(0, 0, 2)
    };
    let error = simulate(&settings, &traffic(20, 5.0)).unwrap_err();
    assert!(matches!(error, SimulationError::Scorer(_)), "{error}");
}

#[test]
fn without_load_and_noise_first_tokens_come_in_their_unloaded_time() {
    // Far apart, and nothing shared.
    let mut trace = traffic(40, 0.05);
    trace.ids.clear();
    for request in &mut trace.requests {
        request.blocks = 0..0;
    }
    let settings = Settings {
        noise: Noise::none(),
        warm_up: 0.0,
        ..settings(0, 0, 2)
    };
    let run = simulate(&settings, &trace).unwrap();
    let slowdown = run.summary.slowdown;
    assert!((0.98..1.02).contains(&slowdown.mean), "{slowdown:?}");
    assert!(slowdown.p99 < 1.05, "{slowdown:?}");
    assert!(run.summary.hit_rate == 0.0);
}

#[test]
fn the_scheduler_learns_what_it_is_not_told() {
    // Workers of half and of one and a half times the speed that the prior says.
    let trace = traffic(3_000, 25.0);
    let settings = Settings {
        noise: Noise {
            speed: 0.5,
            ..Noise::default()
        },
        ..settings(0, 0, 4)
    };
    let run = simulate(&settings, &trace).unwrap();
    let prediction = run.summary.prediction;
    assert!(prediction.median < 0.25, "{prediction:?}");
    assert!(prediction.bias.abs() < 0.25, "{prediction:?}");
    let count = |worker| run.rows.iter().filter(|row| row.prefill == worker).count();
    let shares: Vec<usize> = (0..4).map(count).collect();
    // The fastest gets more than the slowest.
    assert!(shares.iter().max() > shares.iter().min(), "{shares:?}");
}

#[test]
fn a_small_pool_sends_streams_back_and_loses_none() {
    let trace = traffic(300, 30.0);
    let mut settings = Settings {
        warm_up: 0.0,
        ..settings(0, 0, 2)
    };
    settings.profile.pool_tokens = 24_000;
    settings.profile.context_length = 24_000;
    let run = simulate(&settings, &trace).unwrap();
    assert!(run.summary.returned > 0, "the pool was never full");
    assert_eq!(run.summary.unfinished, 0);
    for row in &run.rows {
        assert!(row.end_ms >= row.first_ms, "{row:?}");
    }
}

#[test]
fn what_a_lost_worker_had_goes_on_elsewhere() {
    let trace = traffic(600, 20.0);
    for (prefill, decode, both) in [(0, 0, 3), (2, 3, 0)] {
        let workers = prefill + decode + both;
        let settings = Settings {
            warm_up: 0.0,
            failures: (0..workers)
                .filter(|worker| *worker == 0 || *worker + 1 == workers)
                .map(|worker| Failure {
                    at_ms: 10_000.0 + 3_000.0 * worker as f64,
                    worker,
                    back_after_ms: (worker == 0).then_some(2_000.0),
                    noticed_after_ms: 50.0,
                })
                .collect(),
            ..settings(prefill, decode, both)
        };
        let run = simulate(&settings, &trace).unwrap();
        assert!(run.summary.returned > 0, "nobody was there");
        assert_eq!(run.summary.unfinished, 0, "{prefill}P{decode}D+{both}");
        let last = (workers - 1) as u32;
        let gone_ms = 10_000.0 + 3_000.0 * f64::from(last);
        let late = run
            .rows
            .iter()
            .filter(|row| row.arrival_ms > gone_ms + 100.0);
        assert!(late.clone().count() > 50);
        for row in late {
            assert!(row.prefill != last && row.decode != last, "{row:?}");
        }
    }
}

#[test]
fn urgent_requests_go_before_others_and_fifo_does_not_care() {
    let mut lines = String::new();
    for at in 0..400 {
        let class = if at % 4 == 0 { "interactive" } else { "batch" };
        lines += &format!(
            r#"{{"arrival_ms": {}, "prompt_tokens": 3000, "output_tokens": 20, "class": "{class}"}}"#,
            at * 50
        );
        lines.push('\n');
    }
    let trace = kvmesh_simulator::trace::read_simple(&lines, 64).unwrap();
    let ttft = |order| {
        let ahead = matches!(order, Order::Deadline).then_some(50.0);
        let settings = Settings {
            queue: QueueSettings {
                order,
                dispatch_ahead_ms: ahead,
                max_wait_ms: None,
            },
            ..settings(0, 0, 2)
        };
        let run = simulate(&settings, &trace).unwrap();
        let of = |urgent: bool| {
            let rows = run
                .rows
                .iter()
                .filter(|row| (row.request % 4 == 0) == urgent);
            let times: Vec<f64> = rows.map(|row| row.first_ms - row.arrival_ms).collect();
            times.iter().sum::<f64>() / times.len() as f64
        };
        (of(true), of(false))
    };
    let (urgent, batch) = ttft(Order::Deadline);
    assert!(urgent * 2.0 < batch, "{urgent} {batch}");
    let (urgent, batch) = ttft(Order::Arrival);
    assert!((0.7..1.4).contains(&(urgent / batch)), "{urgent} {batch}");
}

#[test]
fn several_routers_share_the_workers() {
    let trace = traffic(1_200, 30.0);
    let ttft = |routers| {
        let settings = Settings {
            routers,
            ..settings(0, 0, 4)
        };
        let run = simulate(&settings, &trace).unwrap();
        assert_eq!(run.summary.unfinished, 0);
        run.summary.ttft_ms.mean
    };
    // They see each other's work in reports only.
    assert!(ttft(3) < 2.0 * ttft(1));
}

#[test]
fn a_system_prompt_that_all_share_sends_them_to_everybody() {
    // 3,000 tokens that all begin with, and 320 of their own: cached, a prompt takes a
    // tenth of its time.
    let mut trace = traffic(2_000, 30.0);
    trace.ids.clear();
    let unit = trace.block_tokens;
    let (shared, own) = (u64::from(3_000 / unit), u64::from(320 / unit));
    assert!(shared > 1 && own > 0, "units of {unit}");
    for (at, request) in trace.requests.iter_mut().enumerate() {
        request.prompt = (shared + own) as u32 * unit;
        let start = trace.ids.len();
        trace.ids.extend(0..shared);
        let first = shared + at as u64 * own;
        trace.ids.extend(first..first + own);
        request.blocks = start..trace.ids.len();
    }
    let shares = |policy: PolicySettings, (prefill, decode, both): (usize, usize, usize)| {
        let settings = Settings {
            policy,
            local_prefill: Some(LocalPrefill::WithoutPrefillWorkers),
            ..settings(prefill, decode, both)
        };
        let run = simulate(&settings, &trace).unwrap();
        assert_eq!(run.summary.unfinished + run.summary.rejected, 0);
        let cached = run
            .rows
            .iter()
            .filter(|row| u64::from(row.cached) >= shared * u64::from(unit));
        assert!(
            cached.count() > run.rows.len() * 9 / 10,
            "the prompt is cached"
        );
        let share = |of: fn(&Row) -> u32, workers: std::ops::Range<usize>| -> Vec<f64> {
            let fair = run.rows.len() as f64 / workers.len() as f64;
            let count = |worker| {
                run.rows
                    .iter()
                    .filter(|row| of(row) == worker as u32)
                    .count()
            };
            workers.map(|worker| count(worker) as f64 / fair).collect()
        };
        match both {
            0 => {
                let decode = prefill..prefill + decode;
                (
                    share(|row| row.prefill, 0..prefill),
                    share(|row| row.decode, decode),
                )
            }
            _ => (
                share(|row| row.prefill, 0..both),
                share(|row| row.decode, 0..both),
            ),
        }
    };
    let even = |share: &f64| (0.5..1.5).contains(share);
    for pool in [(0, 0, 6), (3, 4, 0)] {
        let (prefill, decode) = shares(cost(), pool);
        let all = prefill.iter().chain(&decode);
        assert!(
            all.into_iter().all(even),
            "{pool:?}: {prefill:?} {decode:?}"
        );
        // What it is where the longest prefix decides.
        let (prefill, _) = shares(PolicySettings::PrefixGreedy, pool);
        assert!(!prefill.iter().all(even), "{pool:?}: {prefill:?}");
    }
}

#[test]
fn what_cannot_be_run_is_said() {
    let error = |replay: &str, text: &str| replay_json(replay, text).unwrap_err().to_string();
    assert!(error("{}", "").contains("source"));
    let mut given = serde_json::json!({
        "source": {"format": "simple", "block_tokens": 64},
        "settings": serde_json::to_value(settings(0, 0, 1)).unwrap(),
    });
    let line = r#"{"arrival_ms": 0, "prompt_tokens": 5, "output_tokens": 5, "class": "urgent"}"#;
    assert!(error(&given.to_string(), line).contains("line 1"));
    given["settings"]["both"] = 0.into();
    assert!(error(&given.to_string(), "").contains("workers are needed"));
    given["settings"]["both"] = 1.into();
    given["settings"]["speed"] = 0.into();
    assert!(error(&given.to_string(), "").contains("speed"));
}
