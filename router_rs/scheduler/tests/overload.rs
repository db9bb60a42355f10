//! What becomes of the classes where interactive requests would be late.
#![allow(clippy::unwrap_used)]

mod common;

use common::{request, worker};
use kvmesh_kv_index::{Matches, WorkerSlot};
use kvmesh_scheduler::{
    Admitted, Bookings, Class, ClassTargets, Cluster, Dispatch, DispatchSettings, Entry, KvCost,
    Lane, Outcome, Policy, Rejected, RequestView, Role, Turn, Verdict, Work,
};

/// Work of those that wait, ms.
const WORK_MS: f64 = 600.0;

fn entry(class: Class, key_ms: f64) -> Entry {
    Entry {
        model: "m".into(),
        lane: Lane { class, tenant: 1 },
        key_ms,
        work_ms: WORK_MS,
        goes_on: false,
    }
}

/// So many of a class wait, with keys from this one on, a millisecond apart.
fn waiting(dispatch: &mut Dispatch<u32>, class: Class, count: u32, key_ms: f64) {
    for n in 0..count {
        let one = entry(class, key_ms + f64::from(n));
        dispatch.waits(&one, 0.0, n).unwrap();
    }
}

/// Whether a short prompt that comes now may wait for one idle worker.
fn ask(dispatch: &mut Dispatch<u32>, class: Class, now_ms: f64) -> Result<Admitted, Rejected> {
    let none = Matches::default();
    let workers = [worker(0, Role::Both)];
    let cluster = Cluster::new(1, &workers).at(now_ms);
    let short = RequestView {
        class,
        prompt_tokens: 64,
        ..request(&none, 1)
    };
    dispatch.admit(&cluster, &short, now_ms, None)
}

/// All that a pass tries, with what it goes as.
fn turns(dispatch: &mut Dispatch<u32>, now_ms: f64) -> Vec<(u32, Turn)> {
    let mut pass = dispatch.pass(&"m".into(), now_ms);
    let mut tried = Vec::new();
    while let Some(next) = dispatch.next(&mut pass, now_ms) {
        tried.push((next.item, next.turn));
        let outcome = Outcome::Waits(next.item, None);
        dispatch.came_of(&mut pass, &next.place, outcome, now_ms);
    }
    tried
}

/// Three standard requests are late, and an interactive one comes.
fn overloaded() -> Dispatch<u32> {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    waiting(&mut dispatch, Class::Standard, 3, 10.0);
    let admitted = ask(&mut dispatch, Class::Interactive, 100.0).unwrap();
    // Those before it by key are not waited for.
    assert_eq!(admitted.wait_ms, 0.0);
    assert!(dispatch.is_overloaded("m", 100.0));
    let came = entry(Class::Interactive, admitted.key_ms);
    dispatch.waits(&came, 100.0, 9).unwrap();
    dispatch
}

#[test]
fn who_would_be_late_behind_less_urgent_ones_goes_before_them() {
    let mut dispatch = overloaded();
    let tried = turns(&mut dispatch, 100.0);
    let items: Vec<u32> = tried.iter().map(|(item, _)| *item).collect();
    assert_eq!(items, [9, 0, 1, 2]);
    let (_, first) = tried[0];
    // Its key says when it came, though it goes before earlier ones.
    assert!(!first.yields && first.key_ms > 100.0);
    for (n, (_, turn)) in tried[1..].iter().enumerate() {
        let key_ms = 10.0 + n as f64;
        assert_eq!(
            *turn,
            Turn {
                key_ms,
                yields: true
            }
        );
        assert_eq!(turn.chosen_by_ms(), f64::INFINITY);
    }
}

#[test]
fn nobody_yields_where_nobody_more_urgent_waits_and_an_overload_lasts_for_a_second() {
    let mut dispatch = overloaded();
    let place = {
        let mut all = dispatch.waiting();
        let (place, ..) = all.find(|(_, _, item)| **item == 9).unwrap();
        place
    };
    assert_eq!(dispatch.remove(&place), Some(9));
    for (now_ms, overloaded) in [(1_099.0, true), (1_100.0, false)] {
        let tried = turns(&mut dispatch, now_ms);
        assert!(tried.iter().all(|(_, turn)| !turn.yields));
        assert_eq!(dispatch.is_overloaded("m", now_ms), overloaded);
    }
    // The next one that would be late begins another.
    ask(&mut dispatch, Class::Interactive, 1_100.0).unwrap();
    assert!(dispatch.is_overloaded("m", 1_100.0));
}

#[test]
fn interactive_requests_that_would_miss_their_target_are_refused_and_less_urgent_ones_with_them() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    waiting(&mut dispatch, Class::Interactive, 3, 10.0);
    let Err(Rejected::WaitTooLong {
        wait_ms,
        retry_after_ms,
        work_ms,
    }) = ask(&mut dispatch, Class::Interactive, 100.0)
    else {
        panic!("it is admitted")
    };
    assert_eq!(wait_ms, 3.0 * WORK_MS);
    // On time is a first token within 1 s.
    assert!((retry_after_ms - (wait_ms + work_ms - 1_000.0)).abs() < 1e-6);
    for class in [Class::Standard, Class::Batch] {
        let refused = ask(&mut dispatch, class, 200.0);
        let Err(Rejected::WaitTooLong { retry_after_ms, .. }) = refused else {
            panic!("{class:?}: {refused:?}")
        };
        assert_eq!(retry_after_ms, 1_000.0);
    }
    // A second later there is room for them behind those that wait.
    assert!(ask(&mut dispatch, Class::Standard, 1_101.0).is_ok());
}

#[test]
fn standard_requests_may_wait_for_long_unless_interactive_ones_are_late() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    // Twelve seconds of work.
    waiting(&mut dispatch, Class::Standard, 20, 10.0);
    let alone = ask(&mut dispatch, Class::Standard, 100.0).unwrap();
    assert_eq!(alone.wait_ms, 20.0 * WORK_MS);

    ask(&mut dispatch, Class::Interactive, 100.0).unwrap();
    // Who would miss its own target is not let in; who waits goes on waiting.
    assert!(matches!(
        ask(&mut dispatch, Class::Standard, 100.0),
        Err(Rejected::WaitTooLong { .. })
    ));
    assert!(
        ask(&mut dispatch, Class::Batch, 200.0).is_err(),
        "a more urgent class is refused"
    );
    let longest = |class| dispatch.longest_wait_ms("m", class, 10.0, 200.0);
    assert_eq!(longest(Class::Interactive), 990.0);
    assert_eq!(longest(Class::Standard), 60_000.0);
}

#[test]
fn who_waits_is_turned_away_once_more_urgent_ones_have_been_refused_for_as_long() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    waiting(&mut dispatch, Class::Interactive, 3, 10.0);
    waiting(&mut dispatch, Class::Standard, 1, 20.0);
    let longest = |dispatch: &Dispatch<u32>, now_ms| {
        dispatch.longest_wait_ms("m", Class::Standard, 10.0, now_ms)
    };
    for n in 0..6 {
        let now_ms = f64::from(n).mul_add(900.0, 100.0);
        assert!(ask(&mut dispatch, Class::Interactive, now_ms).is_err());
        assert_eq!(longest(&dispatch, now_ms), 60_000.0);
    }
    // The target of its class is 5 s.
    assert_eq!(longest(&dispatch, 5_090.0), 4_990.0);
    assert_eq!(longest(&dispatch, 5_600.0), 60_000.0);
    // After a break it begins anew.
    assert!(ask(&mut dispatch, Class::Interactive, 5_700.0).is_err());
    assert_eq!(longest(&dispatch, 5_700.0), 60_000.0);
}

#[test]
fn huge_interactive_prompts_that_none_could_have_in_time_keep_nobody_out() {
    let none = Matches::default();
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    let workers = [worker(0, Role::Both)];
    let huge = RequestView {
        class: Class::Interactive,
        prompt_tokens: 8_000,
        ..request(&none, 1)
    };
    for n in 0..3 {
        let huge = Entry {
            work_ms: 4_000.0,
            ..entry(Class::Interactive, 20_000.0 + f64::from(n))
        };
        dispatch.waits(&huge, 0.0, n).unwrap();
    }
    let cluster = Cluster::new(1, &workers).at(100.0);
    let refused = dispatch.admit(&cluster, &huge, 100.0, None);
    assert!(matches!(refused, Err(Rejected::WaitTooLong { .. })));
    assert!(!dispatch.is_overloaded("m", 100.0));
    assert_eq!(
        ask(&mut dispatch, Class::Standard, 100.0).unwrap().wait_ms,
        0.0
    );
}

#[test]
fn an_overload_lasts_while_somebody_waits_who_was_admitted_to_go_first() {
    let mut dispatch = overloaded();
    let tried = turns(&mut dispatch, 5_000.0);
    assert_eq!(tried[0].0, 9);
    assert!(tried[1..].iter().all(|(_, turn)| turn.yields));
}

#[test]
fn an_interactive_request_that_waited_in_vain_for_whatever_begins_an_overload() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    for class in [Class::Standard, Class::Interactive] {
        let place = dispatch.waits(&entry(class, 10.0), 0.0, 1).unwrap();
        assert_eq!(dispatch.turn_away(&place, 2_000.0), Some(1));
        let urgent = class == Class::Interactive;
        assert_eq!(dispatch.is_overloaded("m", 2_000.0), urgent);
    }
}

#[test]
fn who_only_wants_to_know_changes_nothing() {
    let none = Matches::default();
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    waiting(&mut dispatch, Class::Interactive, 3, 10.0);
    let workers = [worker(0, Role::Both)];
    let cluster = Cluster::new(1, &workers).at(100.0);
    let short = RequestView {
        class: Class::Interactive,
        prompt_tokens: 64,
        ..request(&none, 1)
    };
    assert!(dispatch.would_admit(&cluster, &short, 100.0, None).is_err());
    assert!(!dispatch.is_overloaded("m", 100.0));
    assert!(dispatch.admit(&cluster, &short, 100.0, None).is_err());
    assert!(dispatch.is_overloaded("m", 100.0));
}

#[test]
fn classes_without_head_starts_are_not_told_apart() {
    let settings = DispatchSettings {
        targets: ClassTargets::default().by_arrival(),
        ..DispatchSettings::default()
    };
    let mut dispatch = Dispatch::new(settings);
    waiting(&mut dispatch, Class::Standard, 20, 10.0);
    let admitted = ask(&mut dispatch, Class::Interactive, 100.0).unwrap();
    assert_eq!(admitted.wait_ms, 20.0 * WORK_MS);
    assert!(!dispatch.is_overloaded("m", 100.0));
}

#[test]
fn one_that_yields_does_not_go_for_its_early_key() {
    let none = Matches::default();
    let mut view = worker(0, Role::Both);
    view.load.others.queued_prefill_tokens = 2_000;
    view.load.others.queued = 1;
    view.load.others.classes.waiting = [1, 0, 0];
    view.load.others.classes.waiting_tokens = [2_000, 0, 0];
    let workers = [view];
    let decision = KvCost::default()
        .choose(&Cluster::new(1, &workers), &request(&none, 1))
        .unwrap();
    let bookings = Bookings::new();
    let work = Work {
        prefills: 1,
        prefill_tokens: 100,
        ..Work::default()
    };
    let sent = bookings.book_prompt(WorkerSlot(0), work, 500.0);
    sent.sent(1);
    let rules = DispatchSettings::default();
    let judge = |yields| {
        let turn = Turn {
            key_ms: 10.0,
            yields,
        };
        rules.judge(&decision, turn, 10.0, &bookings)
    };
    assert!(matches!(judge(true), Verdict::Waits(_)));
    assert!(matches!(judge(false), Verdict::Goes(_)));
}

#[test]
fn in_an_overload_who_is_late_and_lacks_room_keeps_back_its_own_class_alone() {
    let mut dispatch = overloaded();
    let mut pass = dispatch.pass(&"m".into(), 100.0);
    let mut tried = Vec::new();
    while let Some(next) = dispatch.next(&mut pass, 100.0) {
        tried.push(next.item);
        let outcome = match next.item {
            9 => Outcome::Waits(9, None),
            item => Outcome::NoRoom(item),
        };
        dispatch.came_of(&mut pass, &next.place, outcome, 100.0);
    }
    // After the first of its class nobody of that is tried.
    assert_eq!(tried, [9, 0]);
    let mut tries = |class, key_ms| {
        let mut pass = dispatch.arrives(&entry(class, key_ms), 101.0, 20).unwrap();
        let next = dispatch.next(&mut pass, 101.0);
        let item = next.as_ref().map(|next| next.item);
        let place = next.map(|next| next.place);
        dispatch.give_up(&mut pass, place.as_ref());
        item
    };
    assert_eq!(tries(Class::Standard, 50.0), None);
    // Nobody interactive waits before it but one that found no room or is tried.
    assert_eq!(tries(Class::Interactive, 50.0), Some(20));
}
