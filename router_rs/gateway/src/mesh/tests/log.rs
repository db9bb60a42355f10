//! What happens to attempts, in log lines.

use tracing::Level;

use super::*;
use crate::telemetry::log_lines::LogLines;

/// Message, attempt and reason of each line that tells of a generation.
fn told_of(lines: &LogLines, generation: &str) -> Vec<(String, u64, String)> {
    let lines = lines.all().into_iter();
    lines
        .filter(|line| line["generation"] == generation)
        .map(|line| {
            let told = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
            (
                told("message"),
                line["attempt"].as_u64().unwrap(),
                told("reason"),
            )
        })
        .collect()
}

/// A request that is refused once, given back once, and then finishes.
async fn told_at(level: Level) -> Vec<(String, u64, String)> {
    let (lines, _guard) = LogLines::at(level);
    let both = worker(Role::Both);
    both.faults().set(|plan| {
        plan.refuse_next = 1;
        plan.return_at = Some(7);
        plan.return_next = 1;
    });
    let mesh = mesh_of(&[&both]).await;
    let answer = collect(mesh.generate(request(&[1, 1], 20)).unwrap()).await;
    assert_eq!(answer.ids.len(), 20, "{:?}", answer.error);
    told_of(&lines, &answer.accepted.unwrap().generation_id)
}

#[tokio::test]
async fn each_event_of_an_attempt_is_a_line_with_its_number() {
    let told = told_at(Level::DEBUG).await;
    let events: Vec<_> = told
        .iter()
        .map(|(message, attempt, _)| (message.as_str(), *attempt))
        .collect();
    assert_eq!(
        events,
        [
            ("placed", 1),
            ("refused", 1),
            ("placed", 2),
            ("attempt ended", 2),
            ("placed", 3),
            ("attempt ended", 3),
        ]
    );
    assert_eq!(told[1].2, "NoRoom");
    assert_eq!(told[3].2, "Returned");
    assert!(told[5].2.starts_with("Finished"), "{told:?}");
}

#[tokio::test]
async fn at_level_info_only_what_went_wrong_is_told() {
    let told = told_at(Level::INFO).await;
    let returned = ("attempt ended".to_owned(), 2, "Returned".to_owned());
    assert_eq!(told, [returned]);
}

#[tokio::test]
async fn a_request_that_is_given_up_while_it_waits_says_so() {
    let (lines, _guard) = LogLines::at(Level::INFO);
    let mut both = worker(Role::Both);
    both.faults().set(|plan| plan.refuse_next = u32::MAX);
    let bound = MeshSettings {
        queue_timeout: Duration::from_millis(100),
        ..settings(&[&both])
    };
    let mesh = mesh_with(bound).await;
    let stream = mesh.generate(request(&[1], 5)).unwrap();
    assert!(until(|| mesh.counters().refusals.get() > 0).await);
    both.kill();
    let answer = collect(stream).await;
    assert!(answer.error.is_some());
    let told = told_of(&lines, &answer.accepted.unwrap().generation_id);
    let (message, attempt, reason) = told.last().unwrap();
    assert_eq!(message, "ended while it waited");
    assert!(*attempt > 0, "{told:?}");
    // By whether the worker was seen to be gone when its time was over.
    let either = ["NoPlan", "Stopped(Overloaded)"];
    assert!(either.contains(&reason.as_str()), "{told:?}");
}
