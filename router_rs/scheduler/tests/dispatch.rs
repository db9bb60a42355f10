//! Who of those that wait is tried when, and who goes.
#![allow(clippy::unwrap_used)]

mod common;

use common::{request, worker};
use kvmesh_kv_index::{Matches, WorkerSlot};
use kvmesh_scheduler::{
    Bookings, Class, Cluster, Dispatch, DispatchSettings, Entry, KvCost, Lane, Look, NoPlan,
    Others, Outcome, Pass, Policy, QueueSettings, Reported, RequestView, Role, Turn, Verdict,
    WorkerView,
};
use std::sync::Arc;

fn entry(model: &str, tenant: u64, key_ms: f64) -> Entry {
    Entry {
        model: model.into(),
        lane: Lane {
            class: Class::Standard,
            tenant,
        },
        key_ms,
        work_ms: 100.0,
        goes_on: false,
    }
}

fn report(worker: u32, model: &str) -> Reported {
    Reported {
        worker: WorkerSlot(worker),
        model: model.into(),
        computes: true,
        first_sent_ms: None,
        least_ms: 0.0,
        others: Default::default(),
        step_ms: 10.0,
    }
}

/// What a pass tries, where nobody has a place yet.
fn tries(dispatch: &mut Dispatch<u32>, mut pass: Pass, now_ms: f64) -> Vec<u32> {
    let mut tried = Vec::new();
    while let Some(next) = dispatch.next(&mut pass, 0.0) {
        tried.push(next.item);
        let outcome = Outcome::Waits(next.item, None);
        dispatch.came_of(&mut pass, &next.place, outcome, now_ms);
    }
    tried
}

/// So many tokens of another router's interactive prompts wait there: half a
/// millisecond each, and the steps.
fn queue_there(view: &mut WorkerView, tokens: u64) {
    let others = &mut view.load.others;
    (others.queued, others.queued_prefill_tokens) = (1, tokens);
    others.classes.waiting[Class::Interactive.index()] = 1;
    others.classes.waiting_tokens[Class::Interactive.index()] = tokens;
}

#[test]
fn models_do_not_wait_for_each_other() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    for n in 0..64 {
        dispatch
            .waits(&entry("a", 1, f64::from(n)), 0.0, n)
            .unwrap();
    }
    dispatch.waits(&entry("b", 1, 1_000.0), 0.0, 64).unwrap();
    assert_eq!(dispatch.look(&report(0, "b"), 0.0), Look::Now);
    let pass = dispatch.pass(&"b".into(), 0.0);
    assert_eq!(tries(&mut dispatch, pass, 0.0), [64]);
    let pass = dispatch.pass(&"a".into(), 0.0);
    let first: Vec<u32> = (0..32).collect();
    assert_eq!(tries(&mut dispatch, pass, 0.0), first);
    assert_eq!(dispatch.len(), 65);
}

#[test]
fn reports_of_workers_that_nobody_means_to_go_to_lead_to_a_pass_now_and_then() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    assert_eq!(dispatch.look(&report(0, "a"), 0.0), Look::No);
    dispatch.waits(&entry("a", 1, 0.0), 0.0, 1).unwrap();
    assert_eq!(dispatch.look(&report(0, "a"), 0.0), Look::Now);
    let busy = Reported {
        least_ms: 500.0,
        ..report(0, "a")
    };
    assert_eq!(dispatch.look(&busy, 0.0), Look::No);

    // It means to go to worker 1.
    let none = Matches::default();
    let mut view = worker(1, Role::Both);
    queue_there(&mut view, 800);
    let cluster = [view];
    let decision = KvCost::default()
        .choose(&Cluster::new(1, &cluster), &request(&none, 1))
        .unwrap();
    let bookings = Bookings::new();
    let mut pass = dispatch.pass(&"a".into(), 0.0);
    let next = dispatch.next(&mut pass, 0.0).unwrap();
    let Verdict::Waits(hold) =
        dispatch
            .settings()
            .judge(&decision, Turn::by_key(0.0), 10.0, &bookings)
    else {
        panic!("it goes")
    };
    assert_eq!(bookings.booked(WorkerSlot(1)).prefills, 1);
    let outcome = Outcome::Waits(next.item, Some(hold));
    dispatch.came_of(&mut pass, &next.place, outcome, 0.0);
    assert!(dispatch.next(&mut pass, 0.0).is_none());

    assert_eq!(dispatch.look(&report(0, "a"), 4.0), Look::At(5.0));
    assert_eq!(dispatch.look(&report(1, "a"), 4.0), Look::Now);
    assert!(!dispatch.due("a", 4.0) && dispatch.due("a", 5.0));
    // A new one does not pass it: they are tried in their order, or it waits.
    let pass = dispatch.arrives(&entry("a", 1, 7.0), 4.0, 7).unwrap();
    assert_eq!(pass.again_ms(), Some(5.0));
    let place = pass.place().unwrap();
    assert_eq!(tries(&mut dispatch, pass, 4.0), []);
    // It may leave, once, and come again.
    assert_eq!(dispatch.remove(&place), Some(7));
    assert_eq!(dispatch.remove(&place), None);
    let pass = dispatch.arrives(&entry("a", 1, 7.0), 4.0, 7).unwrap();
    assert_eq!(tries(&mut dispatch, pass, 4.0), []);
    // One with an earlier key is tried by itself.
    let pass = dispatch.arrives(&entry("a", 1, -7.0), 4.0, 3).unwrap();
    assert_eq!(tries(&mut dispatch, pass, 4.0), [3]);
    assert_eq!(dispatch.look(&report(0, "a"), 5.0), Look::Now);
    // What is listed at a worker is counted there, and not here.
    let unlisted = dispatch.unlisted_ms("a", Class::Standard, 0.0);
    assert_eq!(unlisted, (100.0, 200.0));
    let pass = dispatch.arrives(&entry("a", 1, 8.0), 5.0, 8).unwrap();
    assert_eq!(tries(&mut dispatch, pass, 5.0), [3, 1, 7, 8]);
    assert_eq!(bookings.booked(WorkerSlot(1)).prefills, 0);
    let mut pass = dispatch.pass(&"a".into(), 5.0);
    while let Some(next) = dispatch.next(&mut pass, 0.0) {
        dispatch.came_of(&mut pass, &next.place, Outcome::Went, 5.0);
    }
    assert!(dispatch.is_empty());
}

#[test]
fn who_would_start_soon_or_before_all_that_were_sent_goes() {
    let none = Matches::default();
    let mut view = worker(0, Role::Both);
    let rules = DispatchSettings::default();
    let bookings = Bookings::new();
    let choose = |view: &_| {
        KvCost::default()
            .choose(
                &Cluster::new(1, std::slice::from_ref(view)),
                &request(&none, 1),
            )
            .unwrap()
    };
    let Verdict::Goes(sent) = rules.judge(&choose(&view), Turn::by_key(20.0), 0.0, &bookings)
    else {
        panic!("an idle worker starts it")
    };
    view.load.step_ends_ms = 400.0;
    let running = choose(&view);
    let verdict = rules.judge(&running, Turn::by_key(30.0), 10.0, &Bookings::new());
    assert!(
        matches!(verdict, Verdict::Goes(_)),
        "nothing waits before it for the end of that step"
    );
    queue_there(&mut view, 110);
    let busy = choose(&view);
    assert!(busy.queued_ms > 50.0 && busy.queued_ms < 70.0);
    let goes = |key_ms, step_ms| {
        matches!(
            rules.judge(&busy, Turn::by_key(key_ms), step_ms, &bookings),
            Verdict::Goes(_)
        )
    };
    assert!(
        !goes(30.0, 10.0),
        "that is longer than 50 ms and than a step"
    );
    assert!(goes(30.0, 70.0), "within a step");
    assert!(goes(10.0, 10.0), "before all that were sent there");
    sent.iter().for_each(|(_, booking)| booking.started());
    assert!(!goes(10.0, 10.0), "what has begun is not passed");
}

#[test]
fn once_it_is_late_nobody_of_its_model_passes_who_lacks_room() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    for n in 0..3 {
        dispatch
            .waits(&entry("a", 1, f64::from(n)), 0.0, n)
            .unwrap();
    }
    let tried = |dispatch: &mut Dispatch<u32>, now_ms| {
        let mut pass = dispatch.pass(&"a".into(), now_ms);
        let mut tried = 0;
        while let Some(next) = dispatch.next(&mut pass, 0.0) {
            tried += 1;
            let outcome = Outcome::NoRoom(next.item);
            dispatch.came_of(&mut pass, &next.place, outcome, now_ms);
        }
        tried
    };
    assert_eq!(tried(&mut dispatch, -1.0), 3);
    assert_eq!(tried(&mut dispatch, 10.0), 1);
    // A decode worker's report matters once somebody lacks room.
    let decodes = Reported {
        computes: false,
        ..report(0, "a")
    };
    assert_eq!(dispatch.look(&decodes, 20.0), Look::Now);
    // Nor does a new one pass it.
    let pass = dispatch.arrives(&entry("a", 1, 9.0), 11.0, 9).unwrap();
    assert_eq!(tries(&mut dispatch, pass, 11.0), []);
    // One with an earlier key than all goes by itself.
    let pass = dispatch.arrives(&entry("a", 1, -5.0), 20.0, 7).unwrap();
    assert_eq!(tries(&mut dispatch, pass, 20.0), [7]);
}

#[test]
fn a_tenant_whose_turn_it_is_goes_as_one_before_those_that_it_passes() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    for n in 0..3 {
        dispatch
            .waits(&entry("a", 1, f64::from(n)), 0.0, n)
            .unwrap();
    }
    dispatch.waits(&entry("a", 2, 50.0), 0.0, 9).unwrap();
    let mut pass = dispatch.pass(&"a".into(), 0.0);
    let mut keys = Vec::new();
    while let Some(next) = dispatch.next(&mut pass, 0.0) {
        keys.push((next.item, next.turn.key_ms));
        let outcome = Outcome::Waits(next.item, None);
        dispatch.came_of(&mut pass, &next.place, outcome, 0.0);
    }
    let order: Vec<u32> = keys.iter().map(|(item, _)| *item).collect();
    assert_eq!(order, [0, 9, 1, 2]);
    assert!(keys.is_sorted_by(|a, b| a.1 < b.1), "{keys:?}");
    assert!(
        keys[1].1 < 1.0,
        "the key that it is predicted by and sent with"
    );
}

#[test]
fn what_goes_on_goes_before_new_work_of_its_class() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    for n in 0..40 {
        dispatch
            .waits(&entry("a", 1, f64::from(n)), 0.0, n)
            .unwrap();
    }
    let urgent = Entry {
        lane: Lane {
            class: Class::Interactive,
            tenant: 1,
        },
        ..entry("a", 1, -1.0)
    };
    dispatch.waits(&urgent, 0.0, 50).unwrap();
    let goes_on = Entry {
        goes_on: true,
        ..entry("a", 1, 100.0)
    };
    let pass = dispatch.arrives(&goes_on, 0.0, 60).unwrap();
    assert_eq!(tries(&mut dispatch, pass, 0.0), [60]);
    let pass = dispatch.pass(&"a".into(), 0.0);
    assert_eq!(tries(&mut dispatch, pass, 0.0)[..3], [50, 60, 0]);
}

#[test]
fn who_can_be_run_by_nobody_any_more_does_not_wait() {
    let none = Matches::default();
    let (a, b) = (WorkerSlot(0), WorkerSlot(1));
    let mut workers = vec![worker(0, Role::Both), worker(1, Role::Both)];
    let refused = RequestView {
        excluded: &[a, b],
        ..request(&none, 1)
    };
    let why = |workers: &[_]| {
        let chosen = KvCost::default().choose(&Cluster::new(1, workers), &refused);
        chosen.unwrap_err()
    };
    let waits = |workers: &[_], lasting: &[WorkerSlot]| {
        why(workers).waits(&Cluster::new(1, workers), &refused, lasting)
    };
    // Both refused for now; one of them, or both, for ever.
    assert!(waits(&workers, &[]));
    assert!(waits(&workers, &[a]));
    assert!(!waits(&workers, &[a, b]));
    // The one that could run it later drains.
    workers[1].draining = true;
    assert!(!waits(&workers, &[a]));
    assert!(NoPlan::NoRoom { tokens: 1 }.passes());
}

#[test]
fn a_class_is_admitted_by_what_is_as_urgent_waiting_or_sent() {
    let none = Matches::default();
    let settings = DispatchSettings {
        max_wait_ms: 1_000.0,
        ..DispatchSettings::default()
    };
    let mut dispatch = Dispatch::new(settings);
    let mut view = worker(0, Role::Both);
    let asked = |class| RequestView {
        class,
        prompt_tokens: 64,
        ..request(&none, 1)
    };
    let admits = |dispatch: &mut Dispatch<u32>, view: &_, class| {
        let cluster = Cluster::new(1, std::slice::from_ref(view));
        dispatch.admit(&cluster, &asked(class), 0.0, None).is_ok()
    };
    let waiting = |class, key_ms| Entry {
        lane: Lane { class, tenant: 1 },
        work_ms: 600.0,
        ..entry("m", 1, key_ms)
    };
    // All behind it by key: no wait, but the class is full.
    for n in 0..2 {
        assert!(admits(&mut dispatch, &view, Class::Standard));
        let key_ms = 1e6 + f64::from(n);
        dispatch
            .waits(&waiting(Class::Standard, key_ms), 0.0, n)
            .unwrap();
    }
    assert!(!admits(&mut dispatch, &view, Class::Standard));
    assert!(!admits(&mut dispatch, &view, Class::Batch));
    assert!(admits(&mut dispatch, &view, Class::Interactive));
    // What was sent and is not computed counts as well.
    view.load.own.queued_prefill_tokens = 4_000;
    view.load.own.classes.waiting_tokens[0] = 4_000;
    view.prompts = vec![kvmesh_scheduler::Prompt {
        virtual_deadline_ms: 1e6,
        class: Class::Interactive,
        tokens: 4_000,
        context: 8_000_000,
    }];
    assert!(!admits(&mut dispatch, &view, Class::Interactive));
    let model: Arc<str> = "m".into();
    assert_eq!(
        dispatch.unlisted_ms(&model, Class::Batch, 2e6),
        (1_200.0, 1_200.0)
    );
}

/// A prompt that means to go to this worker, which would not start it soon.
fn held(dispatch: &mut Dispatch<u32>, bookings: &Bookings, at: u32, key_ms: f64, item: u32) {
    let none = Matches::default();
    let mut view = worker(at, Role::Both);
    queue_there(&mut view, 800);
    let cluster = [view];
    let decision = KvCost::default()
        .choose(&Cluster::new(1, &cluster), &request(&none, 1))
        .unwrap();
    dispatch.waits(&entry("a", 1, key_ms), 0.0, item).unwrap();
    let mut pass = dispatch.pass(&"a".into(), 0.0);
    while let Some(next) = dispatch.next(&mut pass, 0.0) {
        let verdict = dispatch
            .settings()
            .judge(&decision, Turn::by_key(1e9), 10.0, bookings);
        let Verdict::Waits(hold) = verdict else {
            panic!("it goes")
        };
        let outcome = Outcome::Waits(next.item, Some(hold));
        dispatch.came_of(&mut pass, &next.place, outcome, 0.0);
    }
}

#[test]
fn a_report_wakes_whoever_means_to_go_there() {
    let bookings = Bookings::new();
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    held(&mut dispatch, &bookings, 1, 20.0, 1);
    // A decode worker that computes it, though others' prompts do not come to it.
    let decodes = Reported {
        computes: false,
        ..report(1, "a")
    };
    assert_eq!(dispatch.look(&decodes, 1.0), Look::Now);
    let other = Reported {
        computes: false,
        ..report(2, "a")
    };
    assert_eq!(dispatch.look(&other, 1.0), Look::No);
    // Busy for long with what it would be taken before, or with what it would not.
    let busy = |first_sent_ms| Reported {
        least_ms: 9_000.0,
        first_sent_ms,
        ..report(1, "a")
    };
    assert_eq!(dispatch.look(&busy(Some(30.0)), 1.0), Look::Now);
    assert_eq!(dispatch.look(&busy(Some(10.0)), 1.0), Look::No);
    assert_eq!(dispatch.look(&busy(None), 1.0), Look::No);
    // Other routers' prompts are taken to have come just now: before it while they are short.
    let others = |class: Class, each_ms| {
        let mut report = busy(None);
        report.others[class.index()] = Others {
            each_ms,
            work_ms: 8_980.0,
        };
        report
    };
    let look = |class, each_ms| dispatch.look(&others(class, each_ms), 1.0);
    assert_eq!(look(Class::Interactive, 1.0), Look::No);
    assert_eq!(look(Class::Interactive, 100.0), Look::Now);
    assert_eq!(look(Class::Batch, 1.0), Look::Now);
}

#[test]
fn who_is_listed_nowhere_is_looked_at_after_any_report() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    for n in 0..2 {
        let place = entry("a", 1, f64::from(n));
        dispatch.waits(&place, 0.0, n).unwrap();
    }
    let mut pass = dispatch.pass(&"a".into(), 0.0);
    while let Some(next) = dispatch.next(&mut pass, 0.0) {
        let outcome = match next.item {
            0 => Outcome::NoRoom(next.item),
            _ => Outcome::Waits(next.item, None),
        };
        dispatch.came_of(&mut pass, &next.place, outcome, -1.0);
    }
    let busy = Reported {
        computes: false,
        least_ms: 9_000.0,
        ..report(0, "a")
    };
    assert_eq!(dispatch.look(&busy, 1.0), Look::At(5.0));
    assert_eq!(dispatch.look(&busy, 5.0), Look::Now);
}

#[test]
fn who_is_not_ready_for_is_late_and_blocks_nobody() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    for n in 0..3 {
        let place = entry("a", 1, f64::from(n));
        dispatch.waits(&place, 0.0, n).unwrap();
    }
    let pass = dispatch.pass(&"a".into(), 1_000.0);
    assert_eq!(tries(&mut dispatch, pass, 1_000.0), [0, 1, 2]);
}

#[test]
fn one_pass_at_a_time_is_made_for_a_model() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    for n in 0..3 {
        let place = entry("a", 1, f64::from(n));
        dispatch.waits(&place, 0.0, n).unwrap();
    }
    let mut pass = dispatch.pass(&"a".into(), 100.0);
    let large = dispatch.next(&mut pass, 100.0).unwrap();
    assert_eq!(large.item, 0);
    // Meanwhile somebody else looks: nobody passes the one that is tried.
    let mut other = dispatch.pass(&"a".into(), 100.0);
    assert!(dispatch.next(&mut other, 100.0).is_none());
    let late = Outcome::NoRoom(large.item);
    dispatch.came_of(&mut pass, &large.place, late, 100.0);
    // What the other one was to do is done by this one: it begins anew.
    let again = dispatch.next(&mut pass, 100.0).unwrap();
    assert_eq!(again.item, 0);
    let outcome = Outcome::Went;
    dispatch.came_of(&mut pass, &again.place, outcome, 100.0);
    // Who comes meanwhile is tried in it, in turn.
    let first = dispatch.arrives(&entry("a", 1, -9.0), 100.0, 9).unwrap();
    assert_eq!(tries(&mut dispatch, first, 100.0), []);
    assert_eq!(tries(&mut dispatch, pass, 100.0), [1, 2, 9]);
    // A pass that is given up leaves them to the next one.
    let mut pass = dispatch.pass(&"a".into(), 100.0);
    let next = dispatch.next(&mut pass, 100.0).unwrap();
    dispatch.give_up(&mut pass, Some(&next.place));
    assert!(dispatch.due("a", 100.0));
    let pass = dispatch.pass(&"a".into(), 100.0);
    assert_eq!(tries(&mut dispatch, pass, 100.0), [1, 2]);
    assert_eq!(dispatch.len(), 2);
}

#[test]
fn many_that_lack_room_do_not_hide_who_has_it_elsewhere() {
    let mut dispatch = Dispatch::new(DispatchSettings::default());
    for n in 0..100 {
        let place = entry("a", 1, 1e6 + f64::from(n));
        dispatch.waits(&place, 0.0, n).unwrap();
    }
    // All but the last lack room; some passes find out.
    let mut found = None;
    for at in 0..20 {
        let mut pass = dispatch.pass(&"a".into(), f64::from(at));
        let mut tried = 0;
        while let Some(next) = dispatch.next(&mut pass, 0.0) {
            tried += 1;
            let outcome = match next.item {
                99 => Outcome::Went,
                lacks => Outcome::NoRoom(lacks),
            };
            found = found.or((next.item == 99).then_some(at));
            dispatch.came_of(&mut pass, &next.place, outcome, 0.0);
        }
        assert!(tried <= 32, "a bound on what a report costs");
    }
    assert!(found.is_some());
    // Nor do they hold up who comes: they cannot go in its place.
    let pass = dispatch.arrives(&entry("a", 1, 2e6), 0.0, 200).unwrap();
    assert_eq!(tries(&mut dispatch, pass, 0.0), [200]);
}

#[test]
fn who_comes_passes_nobody_in_the_order_of_service() {
    let mut dispatch = Dispatch::new(DispatchSettings {
        queue: QueueSettings {
            batch_strict: true,
            ..QueueSettings::default()
        },
        ..DispatchSettings::default()
    });
    let pass = dispatch.arrives(&entry("a", 1, 500.0), 0.0, 1).unwrap();
    assert_eq!(tries(&mut dispatch, pass, 0.0), [1]);
    let mut batch = entry("a", 1, 0.0);
    batch.lane.class = Class::Batch;
    let pass = dispatch.arrives(&batch, 0.0, 2).unwrap();
    assert_eq!(tries(&mut dispatch, pass, 0.0), [1, 2]);
    batch.key_ms = 1.0;
    let pass = dispatch.arrives(&batch, 1.0, 3).unwrap();
    assert_eq!(
        (tries(&mut dispatch, pass, 1.0), dispatch.len()),
        (vec![], 3)
    );
}
