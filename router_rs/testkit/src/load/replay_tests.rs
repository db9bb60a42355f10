#![allow(clippy::unwrap_used)]

use super::*;
use crate::load::read_arrivals;
use crate::mock::{MockConfig, MockWorker};

const GRACE: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_millis(10);

/// A worker whose first tokens and steps take 10 ms at least.
fn paced() -> MockWorker {
    MockWorker::start(MockConfig {
        step: STEP,
        prefill: STEP,
        ..MockConfig::default()
    })
    .unwrap()
}

/// It answers nothing within the life of a test.
fn silent() -> MockWorker {
    let worker = paced();
    let hour = Duration::from_secs(3_600);
    worker.faults().set(|plan| plan.delay_first_token = hour);
    worker
}

fn lines(lines: &[&str]) -> Vec<Arrival> {
    read_arrivals(&lines.join("\n")).unwrap()
}

fn config(worker: &MockWorker, arrivals: Vec<Arrival>) -> ReplayConfig {
    ReplayConfig {
        target: worker.addr(),
        model: String::new(),
        arrivals,
        block_tokens: 16,
        seed: 0,
        connections: 2,
        warm_up: Duration::ZERO,
        grace: GRACE,
    }
}

fn bring(config: ReplayConfig) -> ReplayFigures {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(replay(config)).unwrap()
}

fn class<'a>(figures: &'a ReplayFigures, name: &str) -> &'a ClassFigures {
    figures
        .classes
        .iter()
        .find(|one| one.class == name)
        .unwrap()
}

#[test]
fn arrivals_are_answered_at_their_lengths_and_judged_by_their_targets() {
    let worker = paced();
    // An hour is kept whatever the machine does; a millisecond never is.
    let kept = r#""ttft_target_ms": 3600000, "itl_target_ms": 3600000"#;
    let figures = bring(config(
        &worker,
        lines(&[
            &format!(
                r#"{{"arrival_ms": 0, "prompt_tokens": 40, "output_tokens": 3, "class": "interactive", {kept}}}"#
            ),
            &format!(
                r#"{{"arrival_ms": 30, "prompt_tokens": 40, "output_tokens": 1, "class": "interactive", {kept}}}"#
            ),
            r#"{"arrival_ms": 60, "prompt_tokens": 40, "output_tokens": 2, "ttft_target_ms": 1}"#,
            r#"{"arrival_ms": 60, "prompt_tokens": 40, "output_tokens": 9, "ttft_target_ms": 3600000, "itl_target_ms": 1}"#,
        ]),
    ));
    assert_eq!(figures.first_error, "");
    let urgent = class(&figures, "interactive");
    assert_eq!((urgent.requests, urgent.good, urgent.failed), (2, 2, 0));
    // One token has nothing between.
    assert_eq!(urgent.itl_ms.count, 1);
    let standard = class(&figures, "standard");
    assert_eq!(
        (
            standard.requests,
            standard.late_first_token,
            standard.slow_tokens
        ),
        (2, 1, 1)
    );
    assert_eq!(figures.late_ms.count, 4);
    assert!((figures.seconds - 0.06).abs() < 1e-9);
    assert!(figures.classes.iter().all(|one| one.class != "batch"));
}

#[test]
fn what_warms_up_counts_nowhere_and_what_fails_counts_as_failed() {
    let worker = paced();
    let arrivals = lines(&[
        r#"{"arrival_ms": 0, "prompt_tokens": 4, "output_tokens": 2}"#,
        r#"{"arrival_ms": 100, "prompt_tokens": 4, "output_tokens": 2, "class": "batch"}"#,
    ]);
    let warm = ReplayConfig {
        warm_up: Duration::from_millis(50),
        ..config(&worker, arrivals.clone())
    };
    let figures = bring(warm);
    let names: Vec<&str> = figures.classes.iter().map(|one| one.class).collect();
    assert_eq!(names, ["batch"]);
    assert_eq!(class(&figures, "batch").good, 1);

    let unknown = ReplayConfig {
        model: "no such model".to_owned(),
        ..config(&worker, arrivals.clone())
    };
    let figures = bring(unknown);
    assert_eq!(class(&figures, "standard").failed, 1);
    assert!(figures.first_error.contains("grpc-status"), "{figures:?}");

    // Who does not answer in time failed, too.
    let silent = silent();
    let given_up = ReplayConfig {
        grace: Duration::from_millis(200),
        ..config(&silent, arrivals)
    };
    let figures = bring(given_up);
    assert_eq!(class(&figures, "batch").failed, 1);
    assert_eq!(class(&figures, "batch").first_token_ms.count, 0);
}

#[test]
fn nobody_waits_for_who_came_before() {
    let worker = silent();
    let ten: Vec<String> = (0..10)
        .map(|at| {
            format!(
                r#"{{"arrival_ms": {}, "prompt_tokens": 4, "output_tokens": 2}}"#,
                at * 10
            )
        })
        .collect();
    let ten: Vec<&str> = ten.iter().map(String::as_str).collect();
    let figures = bring(ReplayConfig {
        grace: Duration::from_millis(200),
        ..config(&worker, lines(&ten))
    });
    // All were sent, though none was answered.
    assert_eq!(figures.late_ms.count, 10);
    assert_eq!(class(&figures, "standard").failed, 10);
}
