#![allow(clippy::unwrap_used)]

use kvmesh_wire::v1::{Continuation, Reserved, StageFinished};

use super::*;

const GENERATION: Generation = [7; 16];
const ROOM: usize = 1_000;
const TTL: Duration = Duration::from_secs(10);

fn id(owner: u32, attempt: u32) -> AttemptId {
    AttemptId {
        generation: GENERATION,
        owner,
        attempt,
    }
}

fn place(tenant: &str, output_ids: &[u32]) -> Place {
    Place {
        tenant: tenant.to_owned(),
        resume_state: b"state".as_slice().into(),
        stage: Stage::Decode.into(),
        continuation: Some(Continuation {
            model: "m".to_owned(),
            output_ids: output_ids.to_vec(),
            ..Continuation::default()
        }),
        ..Place::default()
    }
}

fn rows(id: &AttemptId, first: u32, ids: &[u32]) -> Rows {
    Rows {
        generations: id.generation.to_vec(),
        owners: vec![id.owner],
        attempts: vec![id.attempt],
        first_indices: vec![first],
        counts: vec![ids.len() as u32],
        ids: ids.to_vec(),
        logprobs: Vec::new(),
    }
}

/// One that has three tokens, two of which it began with.
fn kept() -> Kept {
    let mut kept = Kept::default();
    let mut placed = place("t", &[1, 2]);
    kept.placed("a", &id(1, 1), &mut placed, ROOM);
    // Nobody else needs it.
    assert!(placed.resume_state.is_empty());
    kept.opened(&reserved(&id(1, 1)));
    kept.made(&rows(&id(1, 1), 2, &[3]), true, ROOM);
    kept
}

fn opening(id: &AttemptId, answer: Answer) -> Opening {
    Opening {
        generation: id.generation.to_vec().into(),
        owner: id.owner,
        attempt: id.attempt,
        answer: Some(answer),
        ..Opening::default()
    }
}

fn reserved(id: &AttemptId) -> Opening {
    opening(id, Answer::Reserved(Reserved::default()))
}

fn refused(id: &AttemptId) -> Opening {
    opening(id, Answer::Refused(kvmesh_wire::v1::Refused::default()))
}

fn finished(id: &AttemptId) -> StageEnd {
    StageEnd {
        generation: id.generation.to_vec().into(),
        owner: id.owner,
        attempt: id.attempt,
        end: Some(End::Finished(StageFinished::default())),
        ..StageEnd::default()
    }
}

fn taken(claimed: Claimed) -> Taken {
    match claimed {
        Claimed::Taken(taken) => *taken,
        other => panic!("{other:?}"),
    }
}

#[test]
fn its_tenant_finds_it_and_nobody_else() {
    let mut kept = kept();
    let found = kept.find(&GENERATION, "t", 0);
    assert!(found.known && found.output_ids.is_empty() && found.resume_state.is_empty());
    assert_eq!((found.owner, found.attempt, found.next_index), (1, 1, 3));
    // Whether it is what its client has can be seen before it is claimed.
    assert_eq!(found.model, "m");
    let digest = |had| kept.find(&GENERATION, "t", had).output_digest;
    assert_eq!(digest(2), output_digest(&[1, 2]));
    assert_eq!(digest(3), output_digest(&[1, 2, 3]));
    assert_eq!(digest(4), 0);
    let unknown = kept.find(&[8; 16], "t", 0);
    assert_eq!(
        kept.find(&GENERATION, "u", 0),
        Found {
            generation: GENERATION.to_vec().into(),
            ..unknown
        }
    );
    // Nor can another tenant end it.
    let now = Instant::now();
    let claimed = kept.claim((GENERATION, 9), "u", "b", now);
    assert!(matches!(claimed, Claimed::Nothing));
    assert_eq!(kept.owner(&GENERATION), 1);
}

#[test]
fn a_claim_gives_all_ids_and_fences_the_owner_before() {
    let mut kept = kept();
    let now = Instant::now();
    let given = taken(kept.claim((GENERATION, 2), "t", "b", now));
    assert_eq!(given.before, ("a".to_owned(), id(1, 1)));
    assert_eq!(given.id, id(2, 1));
    assert_eq!(given.found.output_ids, [1, 2, 3]);
    assert_eq!(&given.found.resume_state[..], b"state");
    assert_eq!(given.opening.unwrap().owner, 2);
    assert!(given.end.is_none());
    assert_eq!(kept.owner(&GENERATION), 2);
    // The same number again is one too few.
    let claimed = kept.claim((GENERATION, 2), "t", "c", now);
    assert!(matches!(claimed, Claimed::Refused(2)));
    // What the engine goes on to make counts under the new name alone.
    kept.made(&rows(&id(1, 1), 3, &[9]), true, ROOM);
    kept.made(&rows(&id(2, 1), 3, &[4]), true, ROOM);
    let given = taken(kept.claim((GENERATION, 3), "t", "c", now));
    assert_eq!(given.found.output_ids, [1, 2, 3, 4]);
}

#[test]
fn an_owner_that_is_over_is_remembered_for_an_id_that_was_never_here() {
    let mut kept = Kept::default();
    let now = Instant::now();
    let claimed = kept.claim((GENERATION, 2), "t", "b", now);
    assert!(matches!(claimed, Claimed::Nothing));
    assert_eq!(kept.owner(&GENERATION), 2);
    kept.expire(now + TTL, TTL);
    assert_eq!(kept.owner(&GENERATION), 2);
    kept.expire(now + TTL + Duration::from_millis(1), TTL);
    assert_eq!(kept.owner(&GENERATION), 0);
}

#[test]
fn what_has_ended_is_kept_for_a_while_with_its_end() {
    let mut kept = kept();
    let now = Instant::now();
    kept.ended(&finished(&id(1, 1)), now);
    assert!(!kept.runs(&id(1, 1)));
    let later = now + TTL / 2;
    let given = taken(kept.claim((GENERATION, 2), "t", "b", later));
    assert_eq!(given.end.unwrap().owner, 2);
    kept.expire(now + TTL + Duration::from_millis(1), TTL);
    assert!(!kept.find(&GENERATION, "t", 0).known);
    assert_eq!(kept.bytes, 0);
}

#[test]
fn what_was_cancelled_handed_on_or_refused_is_over() {
    let mut kept = kept();
    for end in [
        End::Cancelled(kvmesh_wire::v1::Cancelled {}),
        End::HandedOff(kvmesh_wire::v1::HandedOff::default()),
    ] {
        kept.placed("a", &id(1, 1), &mut place("t", &[]), ROOM);
        let over = StageEnd {
            end: Some(end),
            ..finished(&id(1, 1))
        };
        kept.ended(&over, Instant::now());
        assert!(!kept.find(&GENERATION, "t", 0).known);
    }
    kept.placed("a", &id(1, 2), &mut place("t", &[]), ROOM);
    kept.opened(&refused(&id(1, 2)));
    assert!(!kept.find(&GENERATION, "t", 0).known);
    assert_eq!(kept.bytes, 0);
}

#[test]
fn a_refusal_leaves_what_was_there_before() {
    let mut kept = kept();
    let (bytes, now) = (kept.bytes, Instant::now());
    let place_next = |kept: &mut Kept, attempt| {
        kept.placed("a", &id(1, attempt), &mut place("t", &[1]), ROOM);
        assert_eq!(kept.find(&GENERATION, "t", 0).attempt, attempt);
    };
    // It goes on, and ends, while the next ones wait for their answers.
    place_next(&mut kept, 2);
    kept.made(&rows(&id(1, 1), 3, &[4]), true, ROOM);
    place_next(&mut kept, 3);
    kept.ended(&finished(&id(1, 1)), now);
    kept.opened(&refused(&id(1, 2)));
    kept.opened(&refused(&id(1, 3)));
    let found = kept.find(&GENERATION, "t", 0);
    assert_eq!((found.attempt, found.next_index), (1, 4));
    assert!(!kept.runs(&id(1, 1)));
    assert_eq!(kept.bytes, bytes + 4);
    // Once it is over there is nothing to come back to.
    place_next(&mut kept, 4);
    kept.expire(now + TTL + Duration::from_millis(1), TTL);
    kept.opened(&refused(&id(1, 4)));
    assert!(!kept.find(&GENERATION, "t", 0).known);
    assert_eq!(kept.bytes, 0);
}

#[test]
fn an_answer_or_a_claim_settles_what_is_kept() {
    for claimed in [false, true] {
        let mut kept = kept();
        let bytes = kept.bytes;
        kept.placed("a", &id(1, 2), &mut place("t", &[1, 2, 3]), ROOM);
        assert_eq!(kept.bytes, 2 * bytes);
        if claimed {
            let given = taken(kept.claim((GENERATION, 2), "t", "b", Instant::now()));
            assert_eq!(given.before.1, id(1, 2));
        } else {
            kept.opened(&reserved(&id(1, 2)));
        }
        assert_eq!(kept.bytes, bytes);
        kept.opened(&refused(&id(2, 2)));
        assert_eq!(kept.find(&GENERATION, "t", 0).known, !claimed);
    }
}

#[test]
fn ids_are_counted_once_from_the_border_on() {
    let mut kept = kept();
    // A receiver repeats what was committed.
    kept.made(&rows(&id(1, 1), 1, &[2, 3, 4]), true, ROOM);
    assert_eq!(kept.find(&GENERATION, "t", 0).next_index, 4);
    // A hole: nobody can go on from that.
    kept.made(&rows(&id(1, 1), 9, &[5]), true, ROOM);
    assert!(!kept.find(&GENERATION, "t", 0).known);
}

#[test]
fn a_prefill_whose_token_does_not_count_gives_none() {
    for (emits, next) in [(false, 0), (true, 1)] {
        let mut kept = Kept::default();
        let mut placed = Place {
            stage: Stage::Prefill.into(),
            ..place("t", &[])
        };
        kept.placed("a", &id(1, 1), &mut placed, ROOM);
        kept.made(&rows(&id(1, 1), 0, &[5]), emits, ROOM);
        assert_eq!(kept.find(&GENERATION, "t", 0).next_index, next);
    }
}

#[test]
fn memory_is_bounded_and_what_ended_first_goes_first() {
    let now = Instant::now();
    let mut kept = kept();
    kept.ended(&finished(&id(1, 1)), now);
    let other = AttemptId {
        generation: [8; 16],
        owner: 1,
        attempt: 1,
    };
    let most = kept.bytes + 6 + 4;
    kept.placed("a", &other, &mut place("t", &[]), most);
    assert!(kept.find(&GENERATION, "t", 0).known);
    kept.made(&rows(&other, 0, &[1, 2]), true, most);
    assert!(!kept.find(&GENERATION, "t", 0).known);
    assert!(kept.find(&[8; 16], "t", 0).known);
    kept.made(&rows(&other, 2, &[0; 100]), true, most);
    assert!(!kept.find(&[8; 16], "t", 0).known);
    assert_eq!(kept.bytes, 0);
    // One that is too long from the start.
    kept.placed("a", &other, &mut place("t", &[0; 100]), most);
    assert!(!kept.find(&[8; 16], "t", 0).known);
}
