#![allow(clippy::unwrap_used)]

use kvmesh_wire::v1;

use super::*;
use crate::{HASH_SCHEME, parse::Unread};

fn hello(version: (u32, u32), id: &str, incarnation: u64, scheme: u32) -> Hello {
    Hello {
        version,
        record: v1::WorkerRecord {
            worker_id: id.to_owned(),
            incarnation,
            ..v1::WorkerRecord::default()
        },
        unread: (scheme != HASH_SCHEME).then_some(Unread::HashScheme(scheme)),
        last_event: 0,
        resume_event: 1,
        step_model: None,
        reattached: Vec::new(),
    }
}

fn load(last_command: u64, age: f64, predicted: f64) -> LoadReport {
    LoadReport {
        role: v1::Role::Both,
        phase: WorkerPhase::Serving,
        load: v1::Load {
            last_command,
            step_age_ms: age,
            step_predicted_ms: predicted,
            ..v1::Load::default()
        },
    }
}

fn greeting() -> Link {
    let mut link = Link::new(Some("w".to_owned()));
    assert_eq!(link.apply(Event::Dial).unwrap()[0], Action::Dial);
    let actions = link.apply(Event::Opened).unwrap();
    assert!(matches!(actions[..], [Action::SendHello { .. }]));
    link
}

fn live() -> Link {
    let mut link = greeting();
    link.apply(Event::Hello(&hello((1, 0), "w", 7, 1))).unwrap();
    assert_eq!(*link.state(), State::Live);
    link
}

#[test]
fn a_hello_that_fits_makes_the_session_live() {
    assert!(live().placeable());
}

#[test]
fn another_major_and_another_worker_are_refused() {
    for (bad, why) in [
        (hello((2, 0), "w", 7, 1), Mismatch::Version(2, 0)),
        (hello((1, 0), "x", 7, 1), Mismatch::Identity("x".to_owned())),
    ] {
        let mut link = greeting();
        let actions = link.apply(Event::Hello(&bad)).unwrap();
        assert!(actions.contains(&Action::Close));
        assert_eq!(*link.state(), State::Refused(why));
        assert!(!link.open());
    }
}

#[test]
fn a_newer_minor_is_spoken_to_however_large() {
    for minor in [9, u32::MAX] {
        let mut link = greeting();
        link.apply(Event::Hello(&hello((1, minor), "w", 7, 1)))
            .unwrap();
        assert_eq!(*link.state(), State::Live);
    }
}

#[test]
fn another_hash_scheme_serves_without_index() {
    let mut link = greeting();
    let actions = link.apply(Event::Hello(&hello((1, 0), "w", 7, 2))).unwrap();
    assert!(actions.contains(&Action::IndexOff(Unread::HashScheme(2))));
    assert!(link.placeable() && !link.indexed());
}

#[test]
fn only_a_new_incarnation_forgets_the_cache() {
    let mut link = live();
    link.saw_event(41);
    link.apply(Event::Broken).unwrap();
    link.apply(Event::Fired(Timer::Redial)).unwrap();
    let actions = link.apply(Event::Opened).unwrap();
    let known = Action::SendHello {
        known_incarnation: 7,
        known_event: 41,
    };
    assert_eq!(actions[..], [known]);
    let mut other = link.clone();
    let same = link.apply(Event::Hello(&hello((1, 0), "w", 7, 1))).unwrap();
    assert!(!same.contains(&Action::ForgetCache));
    let new = other
        .apply(Event::Hello(&hello((1, 0), "w", 8, 1)))
        .unwrap();
    assert!(new.contains(&Action::ForgetCache));
    assert_eq!(other.event(), 0);
}

#[test]
fn silence_makes_suspect_then_lost_and_a_frame_half_open() {
    let mut link = live();
    link.apply(Event::Fired(Timer::Suspect)).unwrap();
    assert_eq!(*link.state(), State::Suspect(Suspicion::Silent));
    assert!(!link.placeable() && link.open());
    let actions = link.apply(Event::Fired(Timer::Lost)).unwrap();
    assert!(actions.contains(&Action::Lose(Loss::Silent)));
    link.apply(Event::Frame(None)).unwrap();
    assert!(link.placeable());
    link.apply(Event::Placed(1)).unwrap();
    assert!(!link.placeable(), "one probe at a time");
    link.apply(Event::Answered).unwrap();
    assert_eq!(*link.state(), State::Live);
}

#[test]
fn a_request_that_leaves_for_a_worker_just_given_up_is_lost_with_the_others() {
    let mut link = live();
    link.apply(Event::Fired(Timer::Lost)).unwrap();
    let actions = link.apply(Event::Placed(1)).unwrap();
    assert!(lost(&actions, Loss::Silent));
}

#[test]
fn a_probe_that_says_nothing_leaves_the_decision_to_the_next() {
    let mut link = live();
    link.apply(Event::Undecided(1)).unwrap();
    assert_eq!(*link.state(), State::Live);
    link.apply(Event::Fired(Timer::Lost)).unwrap();
    link.apply(Event::Frame(None)).unwrap();
    link.apply(Event::Placed(1)).unwrap();
    let actions = link.apply(Event::Undecided(1)).unwrap();
    assert!(link.placeable() && actions.contains(&Action::StateChanged));
}

#[test]
fn only_the_probe_itself_decides_against_a_worker_on_probation() {
    let mut link = live();
    link.apply(Event::Fired(Timer::Lost)).unwrap();
    link.apply(Event::Frame(None)).unwrap();
    // Ends of requests that were given up, and of one placed beside the probe.
    link.apply(Event::Faulted(0)).unwrap();
    assert!(link.placeable());
    link.apply(Event::Placed(7)).unwrap();
    link.apply(Event::Placed(8)).unwrap();
    for other in [0, 3, 7] {
        link.apply(Event::Undecided(other)).unwrap();
        link.apply(Event::Faulted(other)).unwrap();
        assert_eq!(*link.state(), State::HalfOpen { probe: Some(8) });
    }
    link.apply(Event::Faulted(8)).unwrap();
    assert_eq!(*link.state(), State::Ejected);
}

#[test]
fn no_probe_goes_to_a_worker_that_is_silent_again() {
    let mut link = live();
    link.apply(Event::Fired(Timer::Lost)).unwrap();
    let actions = link.apply(Event::Frame(None)).unwrap();
    assert!(actions.contains(&Action::Arm(Timer::Suspect, SUSPECT_MS)));
    let mut probed = link.clone();
    link.apply(Event::Fired(Timer::Suspect)).unwrap();
    assert_eq!(*link.state(), State::Lost(Suspicion::Silent));
    link.apply(Event::Frame(None)).unwrap();
    assert!(link.placeable());
    // A probe that is under way has as long as any other request.
    probed.apply(Event::Placed(1)).unwrap();
    probed.apply(Event::Fired(Timer::Suspect)).unwrap();
    assert_eq!(*probed.state(), State::HalfOpen { probe: Some(1) });
    let actions = probed.apply(Event::Fired(Timer::Lost)).unwrap();
    assert!(lost(&actions, Loss::Silent));
}

#[test]
fn a_frame_in_time_ends_the_suspicion() {
    let mut link = live();
    link.apply(Event::Fired(Timer::Suspect)).unwrap();
    let actions = link.apply(Event::Frame(None)).unwrap();
    assert_eq!(*link.state(), State::Live);
    assert!(actions.contains(&Action::Arm(Timer::Suspect, SUSPECT_MS)));
}

#[test]
fn a_stuck_step_is_found_under_beating_loads_and_a_long_one_is_not() {
    let mut link = live();
    link.apply(Event::Frame(Some(&load(0, 2_900.0, 3_000.0))))
        .unwrap();
    assert_eq!(*link.state(), State::Live, "a legitimate 3 s chunk");
    link.apply(Event::Frame(Some(&load(0, 1_100.0, 10.0))))
        .unwrap();
    assert_eq!(*link.state(), State::Suspect(Suspicion::Stuck));
    link.apply(Event::Frame(None)).unwrap();
    assert_eq!(
        *link.state(),
        State::Suspect(Suspicion::Stuck),
        "says nothing of the step"
    );
    let actions = link
        .apply(Event::Frame(Some(&load(0, 3_100.0, 10.0))))
        .unwrap();
    assert!(actions.contains(&Action::Lose(Loss::Silent)));
    link.apply(Event::Frame(Some(&load(0, 3_400.0, 10.0))))
        .unwrap();
    assert_eq!(*link.state(), State::Lost(Suspicion::Stuck));
    link.apply(Event::Frame(Some(&load(0, 0.0, 0.0)))).unwrap();
    assert_eq!(*link.state(), State::HalfOpen { probe: None });
}

#[test]
fn a_long_predicted_step_and_a_warm_up_may_be_silent_for_longer() {
    let mut link = live();
    let actions = link
        .apply(Event::Frame(Some(&load(0, 0.0, 1_000.0))))
        .unwrap();
    assert!(actions.contains(&Action::Arm(Timer::Lost, 8_000)));
    let warming = LoadReport {
        phase: WorkerPhase::WarmingUp,
        ..load(0, 9_000.0, 1.0)
    };
    let actions = link.apply(Event::Frame(Some(&warming))).unwrap();
    assert!(actions.contains(&Action::Arm(Timer::Lost, LOST_STARTING_MS)));
    assert_eq!(*link.state(), State::Live);
}

#[test]
fn commands_are_numbered_from_one_and_echoes_only_rise() {
    let mut link = live();
    assert_eq!((link.number(), link.number()), (1, 2));
    link.apply(Event::Frame(Some(&load(2, 0.0, 0.0)))).unwrap();
    for got in [1, 3] {
        let echo = link.clone().apply(Event::Frame(Some(&load(got, 0.0, 0.0))));
        assert_eq!(
            echo,
            Err(Violation::Echo {
                got,
                sent: 2,
                before: 2
            })
        );
    }
    link.apply(Event::Broken).unwrap();
    link.apply(Event::Dial).unwrap();
    link.apply(Event::Opened).unwrap();
    assert_eq!(link.number(), 1, "a new session counts anew");
}

#[test]
fn a_broken_transport_loses_streams_once_and_dials_again() {
    let mut link = live();
    let actions = link.apply(Event::Broken).unwrap();
    assert!(actions.contains(&Action::ArmRedial(1)));
    assert!(!lost(&actions, Loss::Broken), "it may be a blip");
    assert!(link.apply(Event::Broken).unwrap().is_empty());
    let actions = link.apply(Event::Fired(Timer::Reattach)).unwrap();
    assert!(lost(&actions, Loss::Broken));
    let again = link.apply(Event::Fired(Timer::Reattach)).unwrap();
    assert!(again.is_empty());
}

fn lost(actions: &Actions, loss: Loss) -> bool {
    actions.contains(&Action::Lose(loss))
}

/// A link whose transport broke and is being dialled again.
fn away() -> Link {
    let mut link = live();
    link.apply(Event::Broken).unwrap();
    link.apply(Event::Dial).unwrap();
    link.apply(Event::Opened).unwrap();
    assert!(link.away());
    link
}

#[test]
fn a_worker_that_is_back_in_time_is_asked_for_what_it_has() {
    let mut link = away();
    let actions = link.apply(Event::Hello(&hello((1, 0), "w", 7, 1))).unwrap();
    assert!(actions.contains(&Action::Reattach));
    assert!(actions.contains(&Action::Disarm(Timer::Reattach)));
    assert!(!link.away() && link.placeable());
}

#[test]
fn a_refused_connection_and_another_incarnation_are_deaths() {
    let mut refused = away();
    let actions = refused.apply(Event::Refused).unwrap();
    assert!(lost(&actions, Loss::Died));
    let mut other = away();
    let actions = other
        .apply(Event::Hello(&hello((1, 0), "w", 8, 1)))
        .unwrap();
    assert!(lost(&actions, Loss::Died) && !actions.contains(&Action::Reattach));
}

#[test]
fn a_worker_that_broke_the_protocol_is_not_waited_for() {
    let mut link = live();
    let actions = link.apply(Event::Violated).unwrap();
    assert!(lost(&actions, Loss::Broken) && !link.away());
}

#[test]
fn without_a_grace_a_broken_transport_is_a_loss() {
    let mut link = live().with_grace(0);
    let actions = link.apply(Event::Broken).unwrap();
    assert!(lost(&actions, Loss::Broken) && !link.away());
}

#[test]
fn a_frame_before_hello_is_a_violation() {
    assert!(greeting().apply(Event::Frame(None)).is_err());
}

#[test]
fn a_greeting_that_takes_too_long_is_closed() {
    let mut link = greeting();
    let actions = link.apply(Event::Fired(Timer::Greeting)).unwrap();
    assert!(actions.contains(&Action::Close));
    assert_eq!(*link.state(), State::Waiting);
}

#[test]
fn answers_that_fail_in_a_row_eject_a_worker_and_one_probe_decides() {
    let mut link = live();
    link.apply(Event::Faulted(1)).unwrap();
    link.apply(Event::Faulted(1)).unwrap();
    link.apply(Event::Answered).unwrap();
    for _ in 0..FAULTS {
        assert_eq!(*link.state(), State::Live);
        link.apply(Event::Faulted(1)).unwrap();
    }
    assert_eq!(*link.state(), State::Ejected);
    assert!(!link.placeable() && link.open());
    let mut waits = Vec::new();
    for _ in 0..7 {
        link.apply(Event::Fired(Timer::Probe)).unwrap();
        assert!(link.placeable(), "one probe");
        link.apply(Event::Placed(1)).unwrap();
        assert!(!link.placeable());
        let actions = link.apply(Event::Faulted(1)).unwrap();
        waits.extend(actions.iter().filter_map(|action| match action {
            Action::Arm(Timer::Probe, ms) => Some(*ms),
            _ => None,
        }));
        assert_eq!(*link.state(), State::Ejected);
    }
    assert_eq!(waits, [2_000, 4_000, 8_000, 16_000, 30_000, 30_000, 30_000]);
    link.apply(Event::Fired(Timer::Probe)).unwrap();
    link.apply(Event::Placed(1)).unwrap();
    link.apply(Event::Answered).unwrap();
    assert_eq!(*link.state(), State::Live);
}

#[test]
fn an_ejected_worker_can_be_lost_and_can_come_back_from_a_blip() {
    let ejected = {
        let mut link = live();
        for _ in 0..FAULTS {
            link.apply(Event::Faulted(1)).unwrap();
        }
        link
    };
    let mut silent = ejected.clone();
    let actions = silent.apply(Event::Fired(Timer::Lost)).unwrap();
    assert!(lost(&actions, Loss::Silent));
    let mut broken = ejected;
    broken.apply(Event::Broken).unwrap();
    assert!(broken.away());
}
