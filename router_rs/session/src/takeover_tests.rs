use super::*;
use crate::{
    Generation, GenerationId,
    generation::{Action as Do, Cause, Event as Told, Outcome, Policy},
    parse::{Answer, End, Refusal, Told as Said},
};

const A: WorkerIndex = WorkerIndex(1);
const B: WorkerIndex = WorkerIndex(2);
const C: WorkerIndex = WorkerIndex(3);

fn fence(owner: u32, attempt: u32) -> Fence {
    Fence { owner, attempt }
}

fn held(fence: Fence, next_index: u32, stage: Stage) -> Held {
    Held {
        fence,
        next_index,
        stage,
    }
}

fn says(takeover: &mut Takeover, from: WorkerIndex, what: Holds) -> Actions {
    says_what_is(Fit::Now, takeover, from, what)
}

fn says_what_is(fit: Fit, takeover: &mut Takeover, from: WorkerIndex, what: Holds) -> Actions {
    let found = Found {
        generation: GenerationId([7; 16]),
        what,
    };
    takeover.apply(Event::Found { from, found, fit })
}

fn this(held: Held) -> Holds {
    Holds::This(held, Said::default())
}

fn left(actions: &Actions) -> Vec<(WorkerIndex, Fence)> {
    let leave = |action: &Action| match action {
        Action::Leave { to, fence } => Some((*to, *fence)),
        _ => None,
    };
    actions.iter().filter_map(leave).collect()
}

fn gives(takeover: &mut Takeover, from: WorkerIndex, held: Held) -> Actions {
    let left = Left {
        output_ids: (0..held.next_index).collect(),
        resume_state: b"state".as_slice().into(),
    };
    says(takeover, from, Holds::Claimed(held, Box::new(left)))
}

fn claims(actions: &Actions) -> Vec<(WorkerIndex, u32)> {
    let claim = |action: &Action| match action {
        Action::Claim { to, owner } => Some((*to, *owner)),
        _ => None,
    };
    actions.iter().filter_map(claim).collect()
}

fn cancels(actions: &Actions) -> Vec<(WorkerIndex, Fence)> {
    let cancel = |action: &Action| match action {
        Action::Cancel { to, fence } => Some((*to, *fence)),
        _ => None,
    };
    actions.iter().filter_map(cancel).collect()
}

fn taken(actions: &Actions) -> Option<&Take> {
    actions.iter().find_map(|action| match action {
        Action::Take(take) => Some(&**take),
        _ => None,
    })
}

fn ends(actions: &Actions) -> Option<Refused> {
    actions.iter().find_map(|action| match action {
        Action::End(why) => Some(*why),
        _ => None,
    })
}

/// Of three workers these two have something; the claims are out.
fn claiming(wanted: u32, of_a: Held, of_b: Held) -> Takeover {
    let (mut takeover, actions) = Takeover::start(wanted, [A, B, C]);
    assert_eq!(actions.len(), 4);
    assert!(says(&mut takeover, A, this(of_a)).is_empty());
    assert!(says(&mut takeover, C, Holds::Nothing).is_empty());
    let actions = says(&mut takeover, B, this(of_b));
    let owner = of_a.fence.owner.max(of_b.fence.owner) + 1;
    assert_eq!(claims(&actions), [(A, owner), (B, owner), (C, owner)]);
    takeover
}

#[test]
fn decode_is_gone_on_with_and_prefill_is_cancelled() {
    let prefill = held(fence(1, 1), 0, Stage::Prefill);
    let decode = held(fence(1, 1), 0, Stage::Decode);
    let mut takeover = claiming(0, prefill, decode);
    let prefill = held(fence(2, 1), 0, Stage::Prefill);
    assert!(gives(&mut takeover, A, prefill).is_empty());
    let decode = held(fence(2, 1), 1, Stage::Decode);
    let actions = gives(&mut takeover, B, decode);
    assert_eq!(cancels(&actions), [(A, fence(2, 1))]);
    let take = taken(&actions).expect("it is taken");
    assert_eq!(take.runs, Some((B, Stage::Decode)));
    assert_eq!(take.left.output_ids, [0]);
    assert!(takeover.is_done());
}

#[test]
fn a_higher_attempt_wins_unless_it_lacks_what_the_client_has() {
    for (wanted, winner) in [(3, B), (5, A)] {
        let old = held(fence(1, 1), 6, Stage::Whole);
        let new = held(fence(1, 2), 4, Stage::Decode);
        let mut takeover = claiming(wanted, old, new);
        let old = gives(&mut takeover, A, held(fence(2, 1), 6, Stage::Whole));
        let new = gives(&mut takeover, B, held(fence(2, 2), 4, Stage::Decode));
        let (take, late) = match winner == A {
            true => (old, new),
            false => (new.clone(), new),
        };
        let runs = taken(&take).expect("it is taken").runs;
        assert_eq!(runs.map(|(worker, _)| worker), Some(winner));
        // The other is cancelled, whenever it says what it has.
        assert_eq!(cancels(&late).len(), 1);
    }
}

#[test]
fn a_prompt_alone_is_gone_on_from_by_a_new_attempt() {
    let (mut takeover, _) = Takeover::start(1, [A]);
    let actions = says(&mut takeover, A, this(held(fence(1, 1), 1, Stage::Prefill)));
    assert_eq!(claims(&actions), [(A, 2)]);
    let actions = gives(&mut takeover, A, held(fence(2, 1), 1, Stage::Prefill));
    assert_eq!(cancels(&actions), [(A, fence(2, 1))]);
    assert_eq!(taken(&actions).expect("it is taken").runs, None);
}

#[test]
fn decode_that_has_made_nothing_waits_for_no_prefill() {
    // Prefill's part is cancelled, or was never placed: the KV that is awaited never comes.
    for beside in [true, false] {
        let decode = held(fence(1, 1), 0, Stage::Decode);
        let (mut takeover, _) = Takeover::start(0, [A, B]);
        let of_a = match beside {
            true => this(held(fence(1, 1), 0, Stage::Prefill)),
            false => Holds::Nothing,
        };
        says(&mut takeover, A, of_a);
        let actions = says(&mut takeover, B, this(decode));
        assert_eq!(claims(&actions), [(A, 2), (B, 2)]);
        let mut cancelled = vec![(B, fence(2, 1))];
        if beside {
            gives(&mut takeover, A, held(fence(2, 1), 0, Stage::Prefill));
            cancelled.insert(0, (A, fence(2, 1)));
        }
        let actions = gives(&mut takeover, B, held(fence(2, 1), 0, Stage::Decode));
        assert_eq!(cancels(&actions), cancelled);
        let take = taken(&actions).expect("it is taken");
        assert_eq!((take.runs, take.owner, take.last_attempt), (None, 3, 1));
    }
}

#[test]
fn nobody_is_disturbed_for_what_cannot_be_had() {
    let (mut takeover, _) = Takeover::start(9, [A, B]);
    says(&mut takeover, A, Holds::Nothing);
    let short = this(held(fence(1, 1), 8, Stage::Decode));
    let actions = says(&mut takeover, B, short);
    assert!(claims(&actions).is_empty());
    assert_eq!(ends(&actions), Some(Refused::Unknown));
    let (_, actions) = Takeover::start(0, []);
    assert_eq!(ends(&actions), Some(Refused::Unknown));
}

#[test]
fn who_does_not_answer_is_not_waited_for() {
    let (mut takeover, _) = Takeover::start(0, [A, B, C]);
    says(&mut takeover, A, this(held(fence(1, 1), 2, Stage::Whole)));
    takeover.apply(Event::SessionLost(B));
    let actions = takeover.apply(Event::Fired);
    assert_eq!(claims(&actions), [(A, 2), (C, 2)]);
}

#[test]
fn where_the_winner_is_lost_the_next_one_is_gone_on_from() {
    let old = held(fence(1, 1), 3, Stage::Whole);
    let new = held(fence(1, 2), 5, Stage::Whole);
    let mut takeover = claiming(2, old, new);
    assert!(gives(&mut takeover, A, held(fence(2, 1), 3, Stage::Whole)).is_empty());
    let actions = takeover.apply(Event::SessionLost(B));
    // What it has made since is not known here.
    let take = taken(&actions).expect("it is taken");
    assert_eq!((take.runs, take.left.output_ids.len()), (None, 3));
    assert_eq!(cancels(&actions), [(A, fence(2, 1))]);

    // The same where it has yet to say what it has.
    let mut takeover = claiming(2, old, new);
    takeover.apply(Event::Fired);
    let actions = gives(&mut takeover, A, held(fence(2, 1), 4, Stage::Whole));
    let runs = taken(&actions).expect("it is taken").runs;
    assert_eq!(runs, Some((A, Stage::Whole)));

    // And with nobody left: it was there, and may be again.
    let mut takeover = claiming(4, old, new);
    let actions = takeover.apply(Event::SessionLost(B));
    assert_eq!(ends(&actions), Some(Refused::NotYet));
}

#[test]
fn what_this_router_cannot_go_on_with_is_not_claimed() {
    for (fit, refused) in [
        (Fit::Never, Refused::Unknown),
        (Fit::Later, Refused::NotYet),
    ] {
        let (mut takeover, _) = Takeover::start(2, [A, B]);
        says(&mut takeover, A, Holds::Nothing);
        let there = this(held(fence(1, 1), 8, Stage::Decode));
        let actions = says_what_is(fit, &mut takeover, B, there);
        assert!(claims(&actions).is_empty());
        assert_eq!(ends(&actions), Some(refused));
    }
    // Beside one that it can: the number is above both, and so are new attempts'.
    let (mut takeover, _) = Takeover::start(2, [A, B]);
    let other = this(held(fence(3, 7), 8, Stage::Whole));
    says_what_is(Fit::Never, &mut takeover, A, other);
    let fits = this(held(fence(2, 4), 3, Stage::Whole));
    let actions = says(&mut takeover, B, fits);
    assert_eq!(claims(&actions), [(A, 4), (B, 4)]);
    let actions = gives(&mut takeover, B, held(fence(4, 4), 3, Stage::Whole));
    let take = taken(&actions).expect("it is taken");
    assert_eq!((take.fence, take.last_attempt), (fence(4, 4), 7));
    let actions = gives(&mut takeover, A, held(fence(4, 7), 9, Stage::Whole));
    assert_eq!(cancels(&actions), [(A, fence(4, 7))]);
}

#[test]
fn what_was_claimed_in_vain_is_left_where_it_runs() {
    let old = held(fence(1, 1), 3, Stage::Whole);
    let new = held(fence(1, 2), 5, Stage::Whole);
    // The one that lacks what the client has has given it already.
    let mut takeover = claiming(4, old, new);
    assert!(gives(&mut takeover, A, held(fence(2, 1), 3, Stage::Whole)).is_empty());
    let actions = takeover.apply(Event::SessionLost(B));
    assert_eq!(left(&actions), [(A, fence(2, 1))]);
    assert!(cancels(&actions).is_empty());
    // Another one answers when nobody waits any more.
    let late = gives(&mut takeover, C, held(fence(2, 3), 6, Stage::Whole));
    assert_eq!(left(&late), [(C, fence(2, 3))]);
    // And one that turns out to be nothing for this router.
    let (mut takeover, _) = Takeover::start(2, [A]);
    says(&mut takeover, A, this(old));
    let found = Holds::Claimed(
        held(fence(2, 1), 3, Stage::Whole),
        Box::new(Left {
            output_ids: vec![0, 1, 2],
            resume_state: b"state".as_slice().into(),
        }),
    );
    let actions = says_what_is(Fit::Never, &mut takeover, A, found);
    assert_eq!(left(&actions), [(A, fence(2, 1))]);
    assert_eq!(ends(&actions), Some(Refused::NotYet));
    assert!(takeover.is_done());
}

#[test]
fn a_claim_that_is_refused_is_made_again_under_a_higher_number() {
    let (mut takeover, _) = Takeover::start(0, [A]);
    for owner in [1, 3, 5] {
        let this = this(held(fence(owner, 1), 2, Stage::Whole));
        let actions = says(&mut takeover, A, this);
        assert_eq!(claims(&actions), [(A, owner + 1)]);
        let actions = says(&mut takeover, A, Holds::Refused { owner: owner + 1 });
        match owner {
            5 => assert_eq!(ends(&actions), Some(Refused::Contested)),
            _ => assert!(actions.contains(&Action::Find { to: A })),
        }
    }
}

/// The other of two has given it; the one that is wanted refuses, for another router was
/// there first.
fn refused_after(given: Held) -> (Takeover, Actions) {
    let held = |fence| held(fence, 3, Stage::Whole);
    let mut takeover = claiming(2, held(fence(1, 1)), held(fence(1, 2)));
    assert!(gives(&mut takeover, A, given).is_empty());
    let actions = says(&mut takeover, B, Holds::Refused { owner: 2 });
    assert!(actions.contains(&Action::Find { to: A }));
    assert!(left(&actions).is_empty(), "the next claim may give it");
    (takeover, actions)
}

#[test]
fn what_an_earlier_claim_gave_is_left_where_no_other_gives_it() {
    let given = held(fence(2, 1), 3, Stage::Whole);
    // Nobody has what is wanted any more.
    let (mut takeover, _) = refused_after(given);
    for from in [A, B] {
        says(&mut takeover, from, Holds::Nothing);
    }
    let actions = says(&mut takeover, C, Holds::Nothing);
    assert_eq!(ends(&actions), Some(Refused::Unknown));
    assert_eq!(left(&actions), [(A, fence(2, 1))]);

    // Others claim it again and again.
    let (mut takeover, _) = refused_after(given);
    for owner in [4, 6] {
        says(
            &mut takeover,
            A,
            this(held(fence(owner - 2, 1), 3, Stage::Whole)),
        );
        says(
            &mut takeover,
            B,
            this(held(fence(owner - 2, 2), 3, Stage::Whole)),
        );
        let actions = says(&mut takeover, C, Holds::Nothing);
        assert_eq!(claims(&actions)[0], (A, owner));
        gives(&mut takeover, A, held(fence(owner, 1), 3, Stage::Whole));
        let actions = says(&mut takeover, B, Holds::Refused { owner });
        match owner {
            4 => assert!(left(&actions).is_empty()),
            _ => {
                assert_eq!(ends(&actions), Some(Refused::Contested));
                assert_eq!(left(&actions), [(A, fence(6, 1))]);
            }
        }
    }

    // One that the next claim found to be another router's is not left by this one.
    let (mut takeover, _) = refused_after(given);
    says(&mut takeover, A, this(given));
    says(&mut takeover, B, this(held(fence(2, 2), 3, Stage::Whole)));
    says(&mut takeover, C, Holds::Nothing);
    says(&mut takeover, A, Holds::Refused { owner: 4 });
    let actions = takeover.apply(Event::SessionLost(B));
    assert_eq!(ends(&actions), Some(Refused::NotYet));
    assert!(left(&actions).is_empty());

    // And what is given when the next one is under way is given by that again.
    let (mut takeover, _) = refused_after(given);
    assert!(gives(&mut takeover, C, held(fence(2, 7), 9, Stage::Whole)).is_empty());
    for (from, what) in [(A, given), (C, held(fence(2, 7), 9, Stage::Whole))] {
        says(&mut takeover, from, this(what));
    }
    let actions = says(&mut takeover, B, this(held(fence(2, 2), 3, Stage::Whole)));
    assert_eq!(claims(&actions), [(A, 4), (B, 4), (C, 4)]);
    let actions = gives(&mut takeover, C, held(fence(4, 7), 9, Stage::Whole));
    assert!(taken(&actions).is_some() && left(&actions).is_empty());
    let late = gives(&mut takeover, A, held(fence(4, 1), 3, Stage::Whole));
    assert_eq!(cancels(&late), [(A, fence(4, 1))]);
}

#[test]
fn a_claim_has_a_higher_number_than_all_before_it_though_nobody_says_so() {
    let (mut takeover, _) = refused_after(held(fence(2, 1), 3, Stage::Whole));
    // Who was claimed does not answer, and another has it under the first number.
    says(&mut takeover, C, this(held(fence(1, 1), 3, Stage::Whole)));
    let actions = takeover.apply(Event::Fired);
    assert_eq!(claims(&actions), [(A, 4), (B, 4), (C, 4)]);
}

#[test]
fn a_takeover_that_is_given_up_leaves_what_it_has() {
    let (mut takeover, _) = refused_after(held(fence(2, 1), 3, Stage::Whole));
    let actions = takeover.give_up();
    assert_eq!(left(&actions), [(A, fence(2, 1))]);
    assert!(ends(&actions).is_some() && takeover.is_done());
    assert!(takeover.give_up().is_empty());
}

fn take(runs: bool, ids: u32) -> Take {
    Take {
        fence: fence(2, 3),
        owner: 3,
        last_attempt: 3,
        runs: runs.then_some((A, Stage::Decode)),
        left: Left {
            output_ids: (0..ids).collect(),
            resume_state: bytes::Bytes::new(),
        },
    }
}

#[test]
fn a_claimed_attempt_goes_on_where_it_is() {
    let (mut generation, actions) =
        Generation::claimed(&take(true, 4), 9, false, Policy::default());
    assert!(matches!(actions[..], [Do::Arm(_)]));
    let (from, fence, stage) = (A, fence(2, 3), Stage::Decode);
    let answer = Answer::Reserved {
        held: 0,
        reserved: 64,
    };
    let told = Told::Opening {
        from,
        fence,
        stage,
        answer,
    };
    generation.apply(told).expect("it is the answer");
    assert!(generation.tokens(from, fence, 4, 1).is_ok());
    assert_eq!(generation.next_index(), 5);
    // It waited for KV that does not come: only its new router can tell what then.
    let end = End::TransferFailed;
    let told = Told::StageEnd {
        from,
        fence,
        stage,
        end,
    };
    let actions = generation.apply(told).expect("it may end so");
    let planned = |action: &Do| matches!(action, Do::Plan(plan) if plan.cause == Cause::Failed);
    assert!(actions.iter().any(planned), "{actions:?}");
    assert_eq!(generation.next_attempt(), 4);
}

#[test]
fn what_no_worker_goes_on_with_is_planned_from_its_output() {
    let (generation, actions) = Generation::claimed(&take(false, 4), 9, true, Policy::default());
    let planned = |action: &Do| matches!(action, Do::Plan(plan) if plan.cause == Cause::Claimed);
    assert!(actions.iter().any(planned));
    assert_eq!((generation.next_index(), generation.next_attempt()), (4, 4));
    let (_, actions) = Generation::claimed(&take(false, 9), 9, false, Policy::default());
    assert!(matches!(&actions[..], [Do::End(Outcome::Finished { .. })]));
}

#[test]
fn what_is_placed_after_a_claim_has_a_number_that_no_claim_has() {
    let (mut generation, _) = Generation::claimed(&take(false, 4), 9, false, Policy::default());
    let planned = Told::Planned(crate::generation::Plan::Whole { on: A });
    let actions = generation.apply(planned).expect("a plan was asked for");
    let placed = |action: &Do| matches!(action, Do::Place { fence: of, .. } if *of == fence(3, 4));
    assert!(actions.iter().any(placed), "{actions:?}");
    let numbers = [1, 2, 3, 4].map(number_of_claim);
    assert_eq!(numbers, [2, 4, 4, 6].map(Some));
    assert_eq!(number_of_claim(u32::MAX - 1), None);
}

#[test]
fn the_old_owner_hears_it_from_the_worker_that_ran_it() {
    let (mut generation, _) = Generation::claimed(&take(true, 4), 9, false, Policy::default());
    let (from, fence, stage) = (A, fence(2, 3), Stage::Decode);
    let answer = Answer::Reserved {
        held: 0,
        reserved: 64,
    };
    let opened = Told::Opening {
        from,
        fence,
        stage,
        answer,
    };
    generation.apply(opened).expect("it is the answer");
    let end = End::Returned(Refusal::TakenOver);
    let told = Told::StageEnd {
        from,
        fence,
        stage,
        end,
    };
    let actions = generation.apply(told).expect("it may end so");
    assert!(actions.contains(&Do::End(Outcome::TakenOver)));
}
