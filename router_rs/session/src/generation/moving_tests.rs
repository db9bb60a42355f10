#![allow(clippy::unwrap_used)]

use super::*;
use crate::generation::{Cause, Event, Outcome, Plan, PlanRequest, Policy};
use crate::parse::{End, FinishReason};

const S: WorkerIndex = WorkerIndex(1);
const T: WorkerIndex = WorkerIndex(2);
const RESERVED: Answer = Answer::Reserved {
    held: 0,
    reserved: 64,
};
const HANDED_OFF: End = End::HandedOff { engine: None };

/// A stream that has three tokens, on `S` alone.
fn stream() -> (Generation, Fence) {
    let (mut generation, _) = Generation::start(1, 10, false, Policy::default());
    generation
        .apply(Event::Planned(Plan::Whole { on: S }))
        .unwrap();
    let fence = generation.fence();
    opened(&mut generation, S, fence, Stage::Whole, RESERVED);
    generation.tokens(S, fence, 0, 3).unwrap();
    (generation, fence)
}

fn opened(
    generation: &mut Generation,
    from: WorkerIndex,
    fence: Fence,
    stage: Stage,
    answer: Answer,
) -> Actions {
    let event = Event::Opening {
        from,
        fence,
        stage,
        answer,
    };
    generation.apply(event).unwrap()
}

fn ended(generation: &mut Generation, from: WorkerIndex, fence: Fence, end: End) -> Actions {
    let stage = if from == S {
        Stage::Whole
    } else {
        Stage::Decode
    };
    let event = Event::StageEnd {
        from,
        fence,
        stage,
        end,
    };
    generation.apply(event).unwrap()
}

fn begin(generation: &mut Generation) -> (Fence, Actions) {
    let transfer = TransferId([9; 16]);
    let actions = generation
        .apply(Event::HandOver { to: T, transfer })
        .unwrap();
    (generation.moving().unwrap(), actions)
}

/// The same, and `S` was told.
fn told() -> (Generation, Fence, Fence) {
    let (mut generation, fence) = stream();
    let (next, _) = begin(&mut generation);
    let actions = opened(&mut generation, T, next, Stage::Decode, RESERVED);
    assert!(matches!(
        actions.last(),
        Some(Action::HandOver {
            to: S,
            next_index: 3,
            next_attempt: 2,
            ..
        })
    ));
    (generation, fence, next)
}

fn planned(actions: &Actions) -> Option<&PlanRequest> {
    match actions.last() {
        Some(Action::Plan(request)) => Some(request),
        _ => None,
    }
}

#[test]
fn a_target_reserves_before_the_source_hears_of_it() {
    let (mut generation, fence) = stream();
    assert!(generation.can_move(S) && !generation.can_move(T));
    let (next, actions) = begin(&mut generation);
    assert!(matches!(
        actions[0],
        Action::Place {
            to: T,
            stage: Stage::Decode,
            ..
        }
    ));
    assert!(!actions.iter().any(|a| matches!(a, Action::HandOver { .. })));
    assert_eq!((generation.fence(), next.attempt), (fence, 2));
    assert!(!generation.can_move(S), "one at a time");
}

#[test]
fn the_sources_word_moves_the_stream() {
    let (mut generation, fence, next) = told();
    generation.tokens(S, fence, 3, 2).unwrap();
    let actions = ended(&mut generation, S, fence, HANDED_OFF);
    assert_eq!(actions.as_slice(), [Action::Moved { from: fence }]);
    assert_eq!(generation.fence(), next);
    // The target repeats what it was not given.
    assert_eq!(generation.tokens(T, next, 3, 2), Ok(Taken::Nothing));
    assert_eq!(generation.tokens(T, next, 5, 1), Ok(Taken::New { skip: 0 }));
    assert!(generation.can_move(T), "and on");
}

#[test]
fn the_targets_tokens_move_it_and_make_the_sources_stale() {
    let (mut generation, fence, next) = told();
    assert_eq!(generation.tokens(T, next, 3, 3), Ok(Taken::New { skip: 0 }));
    assert_eq!(generation.fence(), next);
    assert_eq!(generation.tokens(S, fence, 3, 2), Ok(Taken::Stale));
    assert!(ended(&mut generation, S, fence, HANDED_OFF).is_empty());
    // What becomes of the source does not matter any more.
    let lost = Event::SessionLost {
        worker: S,
        loss: Loss::Died,
    };
    assert!(generation.apply(lost).unwrap().is_empty());
    assert_eq!(generation.tokens(T, next, 6, 1), Ok(Taken::New { skip: 0 }));
}

#[test]
fn a_hole_between_border_and_first_frame_is_a_violation() {
    let (mut generation, _, next) = told();
    assert!(matches!(
        generation.tokens(T, next, 4, 1),
        Err(Violation::Hole {
            expected: 3,
            got: 4
        })
    ));
}

#[test]
fn a_failure_before_the_commit_leaves_the_stream_where_it_is() {
    let refused = Answer::Refused(Refusal::NoRoom);
    let (mut generation, fence) = stream();
    let (next, _) = begin(&mut generation);
    let actions = opened(&mut generation, T, next, Stage::Decode, refused);
    assert_eq!(actions.last(), Some(&Action::ReleaseTarget));
    assert_eq!(
        generation.tokens(S, fence, 3, 1),
        Ok(Taken::New { skip: 0 })
    );

    for loss in [Loss::Broken, Loss::Died, Loss::Silent] {
        let (mut generation, fence, _) = told();
        let actions = generation
            .apply(Event::SessionLost { worker: T, loss })
            .unwrap();
        assert_eq!(actions.last(), Some(&Action::ReleaseTarget));
        assert_eq!(
            generation.tokens(S, fence, 3, 1),
            Ok(Taken::New { skip: 0 })
        );
        assert_eq!(generation.next_attempt(), 3, "no number is given twice");
    }

    let (mut generation, fence, next) = told();
    let actions = ended(&mut generation, T, next, End::TransferFailed);
    assert_eq!(actions.as_slice(), [Action::ReleaseTarget]);
    assert_eq!(
        generation.tokens(S, fence, 3, 1),
        Ok(Taken::New { skip: 0 })
    );
    assert!(generation.can_move(S));
    // It had committed: the word crossed the target's.
    let actions = ended(&mut generation, S, fence, HANDED_OFF);
    assert_eq!(planned(&actions).unwrap().cause, Cause::Failed);
}

#[test]
fn a_source_that_is_lost_in_the_middle_leaves_the_word_to_its_target() {
    for loss in [Loss::Broken, Loss::Died] {
        let (mut generation, fence, next) = told();
        let actions = generation
            .apply(Event::SessionLost { worker: S, loss })
            .unwrap();
        let orphaned = Timer::Orphaned { attempt: 2 };
        assert_eq!(
            actions.as_slice(),
            [Action::Moved { from: fence }, Action::Arm(orphaned)]
        );
        let mut other = generation.clone();
        assert_eq!(generation.tokens(T, next, 3, 2), Ok(Taken::New { skip: 0 }));
        assert!(generation.apply(Event::Fired(orphaned)).unwrap().is_empty());
        let actions = ended(&mut other, T, next, End::TransferFailed);
        assert!(planned(&actions).is_some(), "{actions:?}");
    }
    // One that is silent would keep the target waiting.
    let (mut generation, fence, next) = told();
    let silent = Event::SessionLost {
        worker: S,
        loss: Loss::Silent,
    };
    let actions = generation.apply(silent).unwrap();
    for (to, fence) in [(S, fence), (T, next)] {
        assert!(
            actions.contains(&Action::Cancel { to, fence }),
            "{actions:?}"
        );
    }
    assert_eq!(planned(&actions).unwrap().cause, Cause::Lost(Loss::Silent));
}

#[test]
fn an_end_in_the_middle_cancels_the_target_and_releases_both() {
    let (mut generation, fence, next) = told();
    let finished = End::Finished {
        reason: FinishReason::Length,
        stop_token: None,
    };
    let actions = ended(&mut generation, S, fence, finished);
    assert!(actions.contains(&Action::Cancel { to: T, fence: next }));
    for released in [Action::Release, Action::ReleaseTarget] {
        assert_eq!(
            actions.iter().filter(|action| **action == released).count(),
            1
        );
    }
    assert!(matches!(
        actions.last(),
        Some(Action::End(Outcome::Finished { .. }))
    ));
}

#[test]
fn a_hand_off_that_nobody_asked_for_is_a_violation() {
    let (mut generation, fence) = stream();
    let event = Event::StageEnd {
        from: S,
        fence,
        stage: Stage::Whole,
        end: HANDED_OFF,
    };
    assert!(generation.apply(event).is_err());
    let unknown = Fence {
        attempt: 2,
        ..fence
    };
    assert_eq!(
        generation.tokens(T, unknown, 3, 1),
        Err(Violation::UnknownAttempt(unknown))
    );
}

#[test]
fn a_worker_that_is_back_hears_of_the_hand_over_again() {
    let (mut generation, fence, next) = told();
    assert_eq!(generation.reattach(S), Some((fence, 3)));
    assert_eq!(generation.reattach(T), Some((next, 3)));
    let back = Event::Reattached { worker: S, fence };
    let actions = generation.apply(back).unwrap();
    assert!(matches!(
        actions.as_slice(),
        [Action::HandOver { to: S, .. }]
    ));
    let back = Event::Reattached {
        worker: T,
        fence: next,
    };
    assert!(generation.apply(back).unwrap().is_empty());
    // It may say once more that it has reserved.
    assert!(opened(&mut generation, T, next, Stage::Decode, RESERVED).is_empty());
}
