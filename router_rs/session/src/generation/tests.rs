#![allow(clippy::unwrap_used)]

use super::*;
use crate::{
    Stage, TransferId,
    parse::{Answer, End},
};

const P: WorkerIndex = WorkerIndex(1);
const D: WorkerIndex = WorkerIndex(2);
const MESH: Plan = Plan::Mesh {
    prefill: P,
    decode: D,
    transfer: TransferId([9; 16]),
};
const RESERVED: Answer = Answer::Reserved {
    held: 0,
    reserved: 64,
};

fn planned(plan: Plan) -> (Generation, Actions) {
    let (mut generation, _) = Generation::start(1, 10, false, Policy::default());
    let actions = generation.apply(Event::Planned(plan)).unwrap();
    (generation, actions)
}

fn opening(from: WorkerIndex, fence: Fence, stage: Stage, answer: Answer) -> Event {
    Event::Opening {
        from,
        fence,
        stage,
        answer,
    }
}

/// A mesh attempt that both workers have reserved for.
fn running() -> Generation {
    let (mut generation, _) = planned(MESH);
    let fence = generation.fence();
    generation
        .apply(opening(D, fence, Stage::Decode, RESERVED))
        .unwrap();
    generation
        .apply(opening(P, fence, Stage::Prefill, RESERVED))
        .unwrap();
    generation
}

fn places(actions: &Actions) -> Vec<(WorkerIndex, Stage)> {
    let place = |action: &Action| match action {
        Action::Place { to, stage, .. } => Some((*to, *stage)),
        _ => None,
    };
    actions.iter().filter_map(place).collect()
}

fn cancels(actions: &Actions) -> Vec<WorkerIndex> {
    let cancel = |action: &Action| match action {
        Action::Cancel { to, .. } => Some(*to),
        _ => None,
    };
    actions.iter().filter_map(cancel).collect()
}

#[test]
fn prefill_is_placed_when_decode_has_reserved() {
    let (mut generation, actions) = planned(MESH);
    assert_eq!(places(&actions), [(D, Stage::Decode)]);
    let fence = generation.fence();
    let actions = generation
        .apply(opening(D, fence, Stage::Decode, RESERVED))
        .unwrap();
    assert_eq!(places(&actions), [(P, Stage::Prefill)]);
}

#[test]
fn each_index_is_taken_from_whoever_comes_first() {
    let mut generation = running();
    let fence = generation.fence();
    assert_eq!(
        generation.tokens(P, fence, 0, 1),
        Ok(Taken::New { skip: 0 })
    );
    // Decode repeats what was committed and goes on.
    assert_eq!(
        generation.tokens(D, fence, 0, 2),
        Ok(Taken::New { skip: 1 })
    );
    assert_eq!(generation.next_index(), 2);
    let mut late = running();
    assert_eq!(late.tokens(D, fence, 0, 3), Ok(Taken::New { skip: 0 }));
    assert_eq!(late.tokens(P, fence, 0, 1), Ok(Taken::Nothing));
}

#[test]
fn a_hole_a_repetition_and_an_overrun_are_violations() {
    let mut generation = running();
    let fence = generation.fence();
    assert_eq!(
        generation.tokens(P, fence, 1, 1),
        Err(Violation::Hole {
            expected: 0,
            got: 1
        })
    );
    generation.tokens(D, fence, 0, 2).unwrap();
    assert!(matches!(
        generation.tokens(D, fence, 1, 1),
        Err(Violation::Hole { .. })
    ));
    assert_eq!(
        generation.tokens(D, fence, 2, 9),
        Err(Violation::TooManyTokens(10))
    );
}

#[test]
fn what_was_not_asked_for_is_a_violation() {
    let (mut generation, _) = planned(MESH);
    let fence = generation.fence();
    assert!(matches!(
        generation.tokens(D, fence, 0, 1),
        Err(Violation::OutOfTurn { .. })
    ));
    let early = opening(P, fence, Stage::Prefill, RESERVED);
    assert!(generation.apply(early).is_err());
    let later = Fence {
        attempt: 2,
        ..fence
    };
    assert_eq!(
        generation.tokens(D, later, 0, 1),
        Err(Violation::UnknownAttempt(later))
    );
}

#[test]
fn a_lower_fence_is_stale() {
    let mut generation = running();
    let old = generation.fence();
    let end = End::Returned(Refusal::NoRoom);
    let event = Event::StageEnd {
        from: D,
        fence: old,
        stage: Stage::Decode,
        end,
    };
    let actions = generation.apply(event).unwrap();
    assert_eq!(cancels(&actions), [P]);
    assert!(matches!(
        actions.last(),
        Some(Action::Plan(PlanRequest {
            wait_for_room: true,
            cause: Cause::Returned,
            ..
        }))
    ));
    generation
        .apply(Event::Planned(Plan::Whole { on: D }))
        .unwrap();
    assert_eq!(generation.tokens(P, old, 0, 1), Ok(Taken::Stale));
}

#[test]
fn three_refusals_plan_again_and_the_fourth_waits() {
    let (mut generation, _) = Generation::start(1, 10, false, Policy::default());
    for round in 1..=4 {
        let on = WorkerIndex(round);
        generation
            .apply(Event::Planned(Plan::Whole { on }))
            .unwrap();
        let refused = Answer::Refused(Refusal::NoRoom);
        let event = opening(on, generation.fence(), Stage::Whole, refused);
        let actions = generation.apply(event).unwrap();
        let Some(Action::Plan(request)) = actions.last() else {
            panic!("{actions:?}")
        };
        assert_eq!(request.wait_for_room, round == 4);
        let excluded = if round == 4 { 0 } else { round as usize };
        assert_eq!(request.excluded.len(), excluded);
    }
}

#[test]
fn a_refusing_prefill_frees_decode() {
    let (mut generation, _) = planned(MESH);
    let fence = generation.fence();
    generation
        .apply(opening(D, fence, Stage::Decode, RESERVED))
        .unwrap();
    let refused = Answer::Refused(Refusal::Draining);
    let actions = generation
        .apply(opening(P, fence, Stage::Prefill, refused))
        .unwrap();
    assert_eq!(cancels(&actions), [D]);
    assert!(actions.contains(&Action::Release));
}

#[test]
fn stopping_cancels_both_and_ends_once() {
    let mut generation = running();
    let actions = generation.apply(Event::Stop(Stop::ClientGone)).unwrap();
    assert_eq!(cancels(&actions), [P, D]);
    assert_eq!(
        actions.last(),
        Some(&Action::End(Outcome::Stopped(Stop::ClientGone)))
    );
    assert!(
        generation
            .apply(Event::Fired(Timer::Deadline))
            .unwrap()
            .is_empty()
    );
}

#[test]
fn a_first_token_that_ends_the_request_cancels_decode() {
    let mut generation = running();
    let fence = generation.fence();
    generation.tokens(P, fence, 0, 1).unwrap();
    let end = End::Finished {
        reason: FinishReason::Stop,
        stop_token: Some(2),
    };
    let event = Event::StageEnd {
        from: P,
        fence,
        stage: Stage::Prefill,
        end,
    };
    let actions = generation.apply(event).unwrap();
    assert_eq!(cancels(&actions), [D]);
    assert!(generation.ended());
}

#[test]
fn prefills_broken_session_does_not_end_what_decode_reserved_for() {
    let mut generation = running();
    let fence = generation.fence();
    let broken = Event::SessionLost {
        worker: P,
        loss: Loss::Broken,
    };
    let actions = generation.apply(broken).unwrap();
    assert_eq!(actions[..], [Action::Arm(Timer::Orphaned { attempt: 1 })]);
    assert_eq!(
        generation.tokens(D, fence, 0, 1),
        Ok(Taken::New { skip: 0 })
    );
    assert!(
        generation
            .apply(Event::Fired(Timer::Orphaned { attempt: 1 }))
            .unwrap()
            .is_empty()
    );
}

#[test]
fn a_lost_decode_worker_ends_the_stream_or_moves_it() {
    for survive_loss in [false, true] {
        let policy = Policy {
            survive_loss,
            ..Policy::default()
        };
        let (mut generation, _) = Generation::start(1, 10, false, policy);
        generation
            .apply(Event::Planned(Plan::Whole { on: D }))
            .unwrap();
        let fence = generation.fence();
        generation
            .apply(opening(D, fence, Stage::Whole, RESERVED))
            .unwrap();
        generation.tokens(D, fence, 0, 3).unwrap();
        let lost = Event::SessionLost {
            worker: D,
            loss: Loss::Silent,
        };
        let actions = generation.apply(lost).unwrap();
        assert_eq!(cancels(&actions), [D]);
        assert_eq!(generation.next_index(), 3);
        assert_eq!(generation.ended(), !survive_loss);
    }
}

#[test]
fn an_unanswered_place_is_given_up_and_planned_elsewhere() {
    let (mut generation, _) = planned(Plan::Whole { on: D });
    let timer = Timer::Answer {
        attempt: 1,
        stage: Stage::Whole,
    };
    let actions = generation.apply(Event::Fired(timer)).unwrap();
    assert_eq!(cancels(&actions), [D]);
    assert!(matches!(actions.last(), Some(Action::Plan(_))));
}

#[test]
fn an_engine_hand_off_takes_its_payload_to_decode() {
    let plan = Plan::Engine {
        prefill: P,
        decode: D,
        prefill_emits: false,
    };
    let (mut generation, actions) = planned(plan);
    assert_eq!(places(&actions), [(P, Stage::Prefill)]);
    let fence = generation.fence();
    generation
        .apply(opening(P, fence, Stage::Prefill, RESERVED))
        .unwrap();
    assert_eq!(generation.tokens(P, fence, 0, 1), Ok(Taken::Nothing));
    let payload = kvmesh_wire::v1::EngineHandOff::default();
    let end = End::HandedOff {
        engine: Some(payload.clone()),
    };
    let event = Event::StageEnd {
        from: P,
        fence,
        stage: Stage::Prefill,
        end,
    };
    let actions = generation.apply(event).unwrap();
    let hand_off = PlannedHandOff::Engine(payload);
    assert_eq!(
        actions[0],
        Action::Place {
            to: D,
            fence,
            stage: Stage::Decode,
            hand_off
        }
    );
}

/// A cancel that crosses an engine's hand-off: what is done when prefill has ended.
fn crossed(plan: Plan, stop: Event, end: End) -> Actions {
    let (mut generation, _) = planned(plan);
    let fence = generation.fence();
    if matches!(plan, Plan::Mesh { .. }) {
        let answer = opening(D, fence, Stage::Decode, RESERVED);
        generation.apply(answer).unwrap();
    }
    generation
        .apply(opening(P, fence, Stage::Prefill, RESERVED))
        .unwrap();
    let actions = generation.apply(stop).unwrap();
    assert!(cancels(&actions).contains(&P));
    let ended = |from| Event::StageEnd {
        from,
        fence,
        stage: Stage::Prefill,
        end: end.clone(),
    };
    assert_eq!(generation.apply(ended(D)).unwrap().len(), 0);
    let actions = generation.apply(ended(P)).unwrap();
    // Once.
    assert_eq!(generation.apply(ended(P)).unwrap().len(), 0);
    actions
}

#[test]
fn an_engine_hand_off_that_crosses_the_cancel_is_dropped_by_decode() {
    let engine = Plan::Engine {
        prefill: P,
        decode: D,
        prefill_emits: false,
    };
    let hand_off = kvmesh_wire::v1::EngineHandOff {
        connector: "NixlConnector".to_owned(),
        ..Default::default()
    };
    let handed_off = End::HandedOff {
        engine: Some(hand_off.clone()),
    };
    let fence = Fence {
        owner: 1,
        attempt: 1,
    };
    let dropped = Action::DropHandOff {
        on: D,
        fence,
        hand_off,
    };
    for stop in [
        Event::Stop(Stop::ClientGone),
        Event::Stop(Stop::Overloaded),
        Event::Fired(Timer::Deadline),
    ] {
        let actions = crossed(engine, stop, handed_off.clone());
        assert_eq!(actions.as_slice(), std::slice::from_ref(&dropped));
    }
    // It heard of the cancel in time, or KV passed as it was computed.
    let gone = || Event::Stop(Stop::ClientGone);
    assert_eq!(crossed(engine, gone(), End::Cancelled).len(), 0);
    let committed = End::HandedOff { engine: None };
    assert_eq!(crossed(MESH, gone(), committed).len(), 0);
}

#[test]
fn a_hand_off_of_an_attempt_before_the_one_that_runs_is_left_to_its_lease() {
    let engine = Plan::Engine {
        prefill: P,
        decode: D,
        prefill_emits: false,
    };
    let (mut generation, _) = planned(engine);
    let fence = generation.fence();
    let timer = Timer::Answer {
        attempt: 1,
        stage: Stage::Prefill,
    };
    generation.apply(Event::Fired(timer)).unwrap();
    generation
        .apply(Event::Planned(Plan::Whole { on: D }))
        .unwrap();
    let end = End::HandedOff {
        engine: Some(kvmesh_wire::v1::EngineHandOff::default()),
    };
    let late = Event::StageEnd {
        from: P,
        fence,
        stage: Stage::Prefill,
        end,
    };
    assert_eq!(generation.apply(late.clone()).unwrap().len(), 0);
    // Nor is it taken for one of the attempt that was cancelled.
    generation.apply(Event::Stop(Stop::ClientGone)).unwrap();
    assert_eq!(generation.apply(late).unwrap().len(), 0);
}

#[test]
fn a_failure_is_tried_elsewhere_only_if_it_may_help() {
    for retryable in [true, false] {
        let (mut generation, _) = planned(Plan::Whole { on: D });
        let fence = generation.fence();
        generation
            .apply(opening(D, fence, Stage::Whole, RESERVED))
            .unwrap();
        let failure = Failure {
            code: 13,
            reason: String::new(),
            message: String::new(),
            retryable,
        };
        let end = End::Failed(failure);
        let event = Event::StageEnd {
            from: D,
            fence,
            stage: Stage::Whole,
            end,
        };
        generation.apply(event).unwrap();
        assert_eq!(generation.ended(), !retryable);
    }
}

#[test]
fn a_complete_output_is_not_begun_anew() {
    let mut generation = running();
    let fence = generation.fence();
    generation.tokens(D, fence, 0, 10).unwrap();
    let lost = Event::SessionLost {
        worker: D,
        loss: Loss::Broken,
    };
    let actions = generation.apply(lost).unwrap();
    assert_eq!(actions.last(), Some(&Action::End(LENGTH)));
}

/// A generation that runs whole on `D`.
fn whole(generation: &mut Generation) -> Fence {
    generation
        .apply(Event::Planned(Plan::Whole { on: D }))
        .unwrap();
    let fence = generation.fence();
    generation
        .apply(opening(D, fence, Stage::Whole, RESERVED))
        .unwrap();
    fence
}

fn lost(worker: WorkerIndex, loss: Loss) -> Event {
    Event::SessionLost { worker, loss }
}

fn outcome(actions: &Actions) -> Option<&Outcome> {
    match actions.last() {
        Some(Action::End(outcome)) => Some(outcome),
        _ => None,
    }
}

#[test]
fn a_worker_that_is_back_says_again_what_it_said_and_goes_on() {
    let (mut generation, _) = Generation::start(1, 10, false, Policy::default());
    let fence = whole(&mut generation);
    generation.tokens(D, fence, 0, 3).unwrap();
    assert_eq!(generation.reattach(D), Some((fence, 3)));
    assert_eq!(generation.reattach(P), None);
    let back = Event::Reattached { worker: D, fence };
    assert!(generation.apply(back).unwrap().is_empty());
    let again = opening(D, fence, Stage::Whole, RESERVED);
    assert!(generation.apply(again.clone()).unwrap().is_empty());
    assert_eq!(
        generation.tokens(D, fence, 3, 2),
        Ok(Taken::New { skip: 0 })
    );
    assert!(generation.apply(again).is_err(), "once is enough");
}

#[test]
fn what_was_left_while_its_worker_was_away_is_cancelled_there() {
    let (mut generation, _) = Generation::start(1, 10, false, Policy::default());
    let fence = whole(&mut generation);
    generation.apply(lost(D, Loss::Broken)).unwrap();
    assert_eq!(generation.reattach(D), None);
    let back = Event::Reattached { worker: D, fence };
    assert_eq!(cancels(&generation.apply(back).unwrap()), [D]);
}

#[test]
fn a_request_of_which_workers_die_runs_alone_and_then_ends() {
    let (mut generation, _) = Generation::start(1, 100, false, Policy::default());
    for alone in [false, false, true] {
        whole(&mut generation);
        assert_eq!(generation.alone(), alone);
        generation.apply(lost(D, Loss::Died)).unwrap();
    }
    whole(&mut generation);
    assert!(generation.alone());
    let actions = generation.apply(lost(D, Loss::Died)).unwrap();
    assert_eq!(outcome(&actions), Some(&Outcome::Poisoned));
}

#[test]
fn deaths_after_enough_tokens_and_silent_workers_count_against_nobody() {
    let policy = Policy {
        failures: 100,
        ..Policy::default()
    };
    let (mut generation, _) = Generation::start(1, 10_000, false, policy);
    for loss in [Loss::Died, Loss::Silent, Loss::Broken].repeat(5) {
        let fence = whole(&mut generation);
        if loss == Loss::Died {
            let first = generation.next_index();
            generation.tokens(D, fence, first, 32).unwrap();
        }
        generation.apply(lost(D, loss)).unwrap();
        assert!(!generation.alone());
    }
    // Nor does one that waited for its KV: no step held it.
    for _ in 0..5 {
        generation.apply(Event::Planned(MESH)).unwrap();
        let fence = generation.fence();
        generation
            .apply(opening(D, fence, Stage::Decode, RESERVED))
            .unwrap();
        generation.apply(lost(D, Loss::Died)).unwrap();
    }
    whole(&mut generation);
    assert!(!generation.alone());
}

#[test]
fn an_output_that_is_half_there_starts_behind_it() {
    let (mut generation, _) = Generation::start_from(1, 4, 6, false, Policy::default());
    let fence = whole(&mut generation);
    assert!(generation.tokens(D, fence, 0, 5).is_err());
    assert_eq!(
        generation.tokens(D, fence, 4, 2),
        Ok(Taken::New { skip: 0 })
    );
    // All of it was there, but not the word that it is.
    let (complete, actions) = Generation::start_from(1, 6, 6, false, Policy::default());
    assert!(complete.ended());
    assert_eq!(outcome(&actions), Some(&LENGTH));
}
