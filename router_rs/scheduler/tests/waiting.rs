//! Booking, the queue and its key, admission.
#![allow(clippy::unwrap_used)]

mod common;

use common::{request, worker};
use kvmesh_kv_index::{Matches, WorkerSlot};
use std::sync::Arc;

use kvmesh_scheduler::{
    AdmissionSettings, Booking, Bookings, Class, ClassTargets, Cluster, LocalPrefill, Prompt,
    Queue, Rejected, Role, Work, admit, virtual_deadline_ms,
};
use proptest::prelude::*;

fn tokens(count: u64) -> Work {
    Work {
        prefills: 1,
        prefill_tokens: count,
        ..Work::default()
    }
}

const W: WorkerSlot = WorkerSlot(3);

#[test]
fn what_is_booked_is_what_no_report_shows() {
    let bookings = Bookings::new();
    let (a, b, c) = (
        bookings.book(W, tokens(1)),
        bookings.book(W, tokens(10)),
        bookings.book(W, tokens(100)),
    );
    a.sent(1);
    b.sent(2);
    assert_eq!(bookings.booked(W).prefill_tokens, 111);
    bookings.echoed(W, 1);
    assert_eq!(bookings.booked(W).prefill_tokens, 110);
    drop(a);
    drop(b);
    assert_eq!(bookings.booked(W), tokens(100));
    // A report that overtakes the sender's own note.
    bookings.echoed(W, 3);
    c.sent(3);
    assert_eq!(bookings.booked(W), Work::default());
}

#[test]
fn a_new_session_counts_its_commands_anew() {
    let bookings = Bookings::new();
    let sent = bookings.book(W, tokens(1));
    sent.sent(5);
    bookings.echoed(W, 4);
    let unsent = bookings.book(W, tokens(10));
    bookings.session_ended(W);
    assert_eq!(bookings.booked(W), tokens(10));
    unsent.sent(1);
    assert_eq!(bookings.all().get(&W), Some(&tokens(10)));
    bookings.echoed(W, 1);
    assert!(bookings.all().is_empty());
}

/// What the views are told of a worker.
fn known(bookings: &Bookings) -> (u64, u64) {
    let mut seen = (0, 0);
    bookings.touch(W);
    bookings.take_changes(|_, booked, _| {
        seen = (booked.unseen.prefill_tokens, booked.computed.prefill_tokens);
    });
    seen
}

#[test]
fn what_a_first_token_says_counts_until_a_report_knows_of_it() {
    let prompt = |amount| Work {
        prefills: 1,
        decodes: 1,
        ..tokens(amount)
    };
    let bookings = Bookings::new();
    let (early, late) = (
        bookings.book_prompt(W, prompt(1), 0.0),
        bookings.book_prompt(W, prompt(10), 0.0),
    );
    early.sent(1);
    late.sent(2);
    bookings.echoed(W, 1);
    assert_eq!(known(&bookings), (10, 0));
    // The report in force counts the one, and what is booked the other.
    assert!(early.started_in(7));
    assert!(late.started_in(8));
    assert_eq!(known(&bookings), (0, 1));
    assert_eq!(bookings.booked(W).decodes, 1, "its stream is still to come");
    assert!(!early.started_in(9), "no prompt begins twice");
    // A report of before that counts both.
    bookings.echoed(W, 2);
    bookings.reported(W, 6);
    assert_eq!(known(&bookings), (0, 11));
    bookings.reported(W, 7);
    assert_eq!(known(&bookings), (0, 10));
    bookings.reported(W, 8);
    assert_eq!(known(&bookings), (0, 0));
    assert!(!late.started_in(9));
    assert_eq!(bookings.booked(W), Work::default());
    bookings.book_prompt(W, prompt(5), 0.0).sent(3);
    bookings.session_ended(W);
    drop((early, late));
    assert!(bookings.all().is_empty());
}

#[test]
fn a_late_report_is_read_with_what_is_computed_and_never_below_what_waits() {
    let mut view = worker(0, Role::Both);
    view.load.own.queued = 2;
    view.load.own.queued_prefill_tokens = 300;
    view.load.own.classes.waiting[Class::Standard.index()] = 2;
    view.load.own.classes.waiting_tokens[Class::Standard.index()] = 300;
    let mut computed = Work {
        prefills: 1,
        prefill_tokens: 200,
        ..Work::default()
    };
    computed.classes.waiting[Class::Standard.index()] = 1;
    computed.classes.waiting_tokens[Class::Standard.index()] = 200;
    view.computed = computed;
    assert_eq!(view.prefill_backlog_tokens(), 100);
    // What others have there is theirs, however much of ours is gone.
    let alone = view.load;
    view.load.own.queued_prefill_tokens = 50;
    view.load.own.classes.waiting_tokens[Class::Standard.index()] = 50;
    view.load.others.queued = 1;
    view.load.others.queued_prefill_tokens = 600;
    view.load.others.classes.waiting[Class::Standard.index()] = 1;
    view.load.others.classes.waiting_tokens[Class::Standard.index()] = 600;
    assert_eq!(view.prefill_backlog_tokens(), 600);
    assert_eq!(view.by_class().waiting_tokens[Class::Standard.index()], 600);
    view.load = alone;
    let there = view.by_class();
    assert_eq!(there.waiting[Class::Standard.index()], 1);
    assert_eq!(there.waiting_tokens[Class::Standard.index()], 100);
    // Half of it was computed when the report was made: the other one waits whole.
    view.prompts.push(Prompt {
        virtual_deadline_ms: 0.0,
        class: Class::Standard,
        tokens: 180,
        context: 0,
    });
    let there = view.by_class();
    assert_eq!(there.waiting_tokens[Class::Standard.index()], 180);
    assert_eq!(view.prefill_backlog_tokens(), 180);
}

proptest! {
    /// Against a list: whatever happens, the sum is exact, and nothing is left
    /// when all guards are gone.
    #[test]
    fn booking_is_exact(actions in prop::collection::vec((0u8..4, any::<prop::sample::Index>(), 1u64..100), 0..60)) {
        let bookings = Bookings::new();
        let mut guards: Vec<(Booking, u64, Option<u64>)> = Vec::new();
        let (mut command, mut echoed) = (0, 0);
        for (kind, which, amount) in actions {
            match kind {
                0 => guards.push((bookings.book(W, tokens(amount)), amount, None)),
                1 if !guards.is_empty() => {
                    let at = which.index(guards.len());
                    if guards[at].2.is_none() {
                        command += 1;
                        guards[at].0.sent(command);
                        guards[at].2 = Some(command);
                    }
                }
                2 if !guards.is_empty() => { guards.swap_remove(which.index(guards.len())); }
                _ => {
                    echoed = (echoed + amount % 3).min(command);
                    bookings.echoed(W, echoed);
                }
            }
            let shown: u64 = guards.iter().filter(|(_, _, sent)| sent.is_none_or(|n| n > echoed)).map(|(_, n, _)| n).sum();
            prop_assert_eq!(bookings.booked(W).prefill_tokens, shown);
        }
        guards.clear();
        prop_assert!(bookings.all().is_empty());
    }

    /// Nothing that arrives later than this passes a request, in any order of
    /// arrival: so nobody starves.
    #[test]
    fn what_may_pass_a_request_is_bounded(
        arrivals in prop::collection::vec((0.0f64..1e6, 0u8..3, 0.0f64..1e4), 1..40),
    ) {
        let targets = ClassTargets::default();
        let class = |n| [Class::Interactive, Class::Standard, Class::Batch][usize::from(n)];
        let mut queue = Queue::new(100);
        for &(arrival, n, work) in &arrivals {
            let key = virtual_deadline_ms(&targets, class(n), arrival, work);
            queue.push(key, work, (arrival, n, work)).unwrap();
        }
        let mut served: Vec<(f64, u8, f64)> = Vec::new();
        while let Some(next) = queue.pop() {
            for before in &served {
                let head_start = targets.of(class(next.1)).allowance_ms - targets.of(class(before.1)).allowance_ms;
                let bound = head_start + targets.work_weight * (next.2 - before.2);
                prop_assert!(before.0 - next.0 <= bound + 1e-6);
            }
            served.push(next);
        }
        prop_assert_eq!(served.len(), arrivals.len());
        prop_assert_eq!(queue.work_ms(), 0.0);
    }
}

#[test]
fn a_queue_is_in_order_bounded_and_gives_up_places() {
    let mut queue = Queue::new(3);
    let late = queue.push(30.0, 1.0, "late").unwrap();
    queue.push(10.0, 2.0, "first").unwrap();
    queue.push(10.0, 4.0, "second").unwrap();
    assert_eq!(queue.push(1.0, 1.0, "full"), Err("full"));
    assert_eq!(queue.remove(late), Some("late"));
    assert_eq!(queue.remove(late), None);
    assert_eq!(
        (queue.pop(), queue.pop(), queue.pop()),
        (Some("first"), Some("second"), None)
    );
}

#[test]
fn admission_is_by_predicted_wait_and_deadline() {
    let none = Matches::default();
    let mut workers = vec![worker(0, Role::Prefill), worker(1, Role::Decode)];
    let settings = AdmissionSettings {
        max_wait_ms: 1_000.0,
    };
    let ask = |workers: &[_], ahead, left| {
        let pairing = LocalPrefill::WithoutPrefillWorkers;
        admit(
            &Cluster::new(1, workers).with_local_prefill(pairing),
            &request(&none, 1),
            ahead,
            left,
            &settings,
        )
    };
    let idle = ask(&workers, 0.0, None).unwrap();
    assert_eq!(idle.wait_ms, 0.0);
    assert!(idle.work_ms > 500.0);
    assert!(matches!(
        ask(&workers, 0.0, Some(idle.work_ms / 2.0)),
        Err(Rejected::DeadlineCannotBeMet { .. })
    ));
    assert!(ask(&workers, 0.0, Some(idle.work_ms * 2.0)).is_ok());
    assert_eq!(
        ask(&workers, 1_500.0, None),
        Err(Rejected::WaitTooLong {
            wait_ms: 1_500.0,
            retry_after_ms: 500.0,
            work_ms: idle.work_ms,
        })
    );
    workers[0].load.others.running_prefill_tokens = 4_000;
    assert!(matches!(
        ask(&workers, 0.0, None),
        Err(Rejected::WaitTooLong { .. })
    ));
    // By cost the decode worker takes it over: it waits for nobody.
    let by_cost = Cluster::new(1, &workers).with_local_prefill(LocalPrefill::ByCost);
    assert!(admit(&by_cost, &request(&none, 1), 0.0, None, &settings).is_ok());
    // A decode worker computes prompts where no other is there.
    assert!(ask(&workers[1..], 0.0, None).is_ok());
    assert!(ask(&[], 0.0, None).is_ok());
    // Nor do idle workers count that cannot run it.
    workers.push(worker(2, Role::Prefill));
    assert!(ask(&workers, 0.0, None).is_ok());
    Arc::make_mut(&mut workers[2].abilities).pool_blocks = 1;
    assert!(matches!(
        ask(&workers, 0.0, None),
        Err(Rejected::WaitTooLong { .. })
    ));
}
