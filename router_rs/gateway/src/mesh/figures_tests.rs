#![allow(clippy::unwrap_used)]
use super::*;
use crate::mesh::tests::request;

/// What a decode worker tells of KV that took 950 ms to come.
fn decode(tail_ms: f64, wait_ms: f64) -> v1::StageTimings {
    v1::StageTimings {
        transfer_ms: 950.0,
        transfer_tail_ms: Some(tail_ms),
        decode_wait_ms: Some(wait_ms),
        ..v1::StageTimings::default()
    }
}

/// A stream whose first token comes 1 s after its arrival, its second one so much later,
/// and whose prefill hands off after so many ms. Its decode worker tells this.
fn split(handed_off: u64, gap: u64, told: &v1::StageTimings) -> (Figures, AdmittedRequest) {
    let request = request(&[1; 64], 8);
    let at = |ms| request.arrived + Duration::from_millis(ms);
    let mut figures = Figures::default();
    figures.dispatched(at(10), Duration::ZERO, 1, v1::PhaseTimes::default());
    let mut marks = [1_000, 1_000 + gap, 1_010 + gap]
        .map(|ms| (ms, false))
        .to_vec();
    marks.push((handed_off, true));
    marks.sort_unstable();
    for (ms, hands_off) in marks {
        if hands_off {
            figures.stage_ended(Stage::Prefill, 1, &v1::StageTimings::default());
            figures.handed_off(at(ms));
        } else {
            figures.tokens_arrived(at(ms));
            figures.tokens_taken(at(ms));
        }
    }
    figures.stage_ended(Stage::Decode, 1, told);
    (figures, request)
}

/// The transfer's tail, and why the longest gap was so long.
fn told((figures, request): (Figures, AdmittedRequest)) -> (f64, String) {
    let timings = figures.timings(&request);
    (timings.transfer_tail_ms, timings.longest_gap_cause)
}

#[test]
fn the_step_that_ran_when_the_kv_came_is_no_part_of_the_transfer() {
    let (figures, request) = split(1_001, 1_200, &decode(1.0, 1_150.0));
    let actual = figures.prediction().unwrap().2;
    assert_eq!(actual.transfer_ms, 1.0);
    let by_router = (1.0, "the step that ran when its KV came".to_owned());
    assert_eq!(told((figures, request)), by_router);
    // What the worker knows of it is told instead.
    let mut known = decode(1.0, 1_150.0);
    known.trace.push(v1::TraceSpan {
        name: "decode_wait".to_owned(),
        start_ms: 1_002.0,
        duration_ms: 1_150.0,
        tokens: 512,
        cause: "prompts in the step that ran when its KV came".to_owned(),
        ..v1::TraceSpan::default()
    });
    let by_worker = "prompts in the step that ran when its KV came (512 tokens)";
    assert_eq!(told(split(1_001, 1_200, &known)).1, by_worker);
    // Of another time it is not the cause.
    known.trace[0].start_ms = 10.0;
    assert_eq!(told(split(1_001, 1_200, &known)), by_router);
}

#[test]
fn a_gap_is_the_hand_offs_where_half_of_it_is_the_transfers_tail() {
    for (tail, wait, cause) in [
        (600.0, 300.0, "the hand-off to the decode worker"),
        (500.0, 500.0, "the hand-off to the decode worker"),
        (400.0, 500.0, "the step that ran when its KV came"),
        (5.0, 5.0, "a step of the worker"),
        (300.0, 300.0, "a step of the worker"),
    ] {
        let (tail_ms, said) = told(split(1_001, 1_000, &decode(tail, wait)));
        assert_eq!((tail_ms, said.as_str()), (tail, cause));
    }
}

#[test]
fn of_a_worker_that_does_not_tell_the_tail_ends_with_the_next_token() {
    let hand_off = "the hand-off to the decode worker".to_owned();
    let silent = v1::StageTimings {
        transfer_ms: 950.0,
        ..v1::StageTimings::default()
    };
    let short = split(1_001, 200, &silent);
    assert_eq!(told(short), (199.0, hand_off.clone()));
    // No more than moving KV took at all.
    let long = split(1_001, 1_200, &silent);
    assert_eq!(told(long), (950.0, hand_off));
}

#[test]
fn what_a_worker_tells_is_within_the_transfer() {
    for (said, tail_ms) in [(2_000.0, 950.0), (-1.0, 0.0), (f64::NAN, 0.0)] {
        assert_eq!(told(split(1_001, 100, &decode(said, 0.0))).0, tail_ms);
    }
}

#[test]
fn a_hand_off_before_the_first_token_is_not_the_cause_of_what_comes_after_it() {
    let (tail_ms, cause) = told(split(900, 300, &decode(40.0, 50.0)));
    assert_eq!((tail_ms, cause.as_str()), (40.0, "a step of the worker"));
}

#[test]
fn a_hand_over_between_decode_workers_has_no_tail_of_prefill() {
    let (mut figures, request) = split(1_001, 100, &decode(7.0, 1.0));
    figures.handed_over(1, 2);
    figures.stage_ended(Stage::Decode, 2, &decode(90.0, 60.0));
    let timings = figures.timings(&request);
    assert_eq!(
        (timings.transfer_tail_ms, timings.transfer_ms),
        (7.0, 1_900.0)
    );
}
