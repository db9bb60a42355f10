//! In what order requests are served: how much may pass one, and fair share.
#![allow(clippy::unwrap_used)]

mod common;

use common::{request, worker};
use kvmesh_kv_index::{Matches, WorkerSlot};
use kvmesh_scheduler::{
    Booking, Bookings, Class, ClassTargets, Dispatch, DispatchSettings, Entry, KvCost, Lane,
    LocalPrefill, Look, Outcome, Pass, Policy, Queue, QueueSettings, Reported, RequestView, Role,
    Roster, Share, StepModel, Verdict, virtual_deadline_ms,
};
use proptest::prelude::*;
use std::sync::Arc;

fn class(n: u8) -> Class {
    Class::ALL[usize::from(n)]
}

/// One request: arrival, class, work and, in the end, when it began.
#[derive(Debug, Clone, Copy)]
struct Job {
    arrival: f64,
    class: Class,
    work: f64,
    key: f64,
    router: usize,
    began: Option<f64>,
}

/// A router: what serves, and what it knows of the worker.
struct Router {
    dispatch: Dispatch<usize>,
    roster: Roster,
    bookings: Bookings,
    commands: u64,
    look_at: f64,
}

type Booked = Vec<(WorkerSlot, Booking)>;

/// One worker that takes prompts by their keys, one after the other, a token a
/// millisecond, and routers that hold requests back.
struct Run {
    jobs: Vec<Job>,
    routers: Vec<Router>,
    /// What was sent and has not begun: key, request, its bookings.
    engine: Vec<(f64, usize, Booked)>,
    free_at: f64,
    /// Length of the prompt that runs, its only step.
    step: f64,
    now: f64,
    found: Matches,
}

impl Run {
    fn new(jobs: Vec<Job>, routers: usize, max_wait_ms: f64) -> Self {
        let mut view = worker(0, Role::Both);
        view.step = StepModel {
            a_ms: 0.0,
            b_ms: 1.0,
            c_ms: 0.0,
            d_ms: 0.0,
            e_ms: 0.0,
            relative_error: 0.0,
            saturating_chunk: 256,
        };
        let able = Arc::make_mut(&mut view.abilities);
        (able.layer_preemption, able.pool_blocks, able.context_length) = (false, 1 << 30, 1 << 20);
        view.load.kv.free = 1 << 30;
        let settings = DispatchSettings {
            max_wait_ms,
            ..DispatchSettings::default()
        };
        let router = |_| {
            let mut roster = Roster::new();
            roster.insert(view.clone());
            Router {
                dispatch: Dispatch::new(settings),
                roster,
                bookings: Bookings::new(),
                commands: 0,
                look_at: f64::INFINITY,
            }
        };
        Self {
            jobs,
            routers: (0..routers).map(router).collect(),
            engine: Vec::new(),
            free_at: 0.0,
            step: 0.0,
            now: 0.0,
            found: Matches::default(),
        }
    }

    fn view<'a>(job: &Job, at: usize, key_ms: f64, found: &'a Matches) -> RequestView<'a> {
        RequestView {
            prompt_tokens: job.work as u32,
            max_tokens: 1,
            expected_output: 1,
            class: job.class,
            virtual_deadline_ms: key_ms,
            ..request(found, at as u128)
        }
    }

    /// Whether it is let in; then it is tried, or waits.
    fn arrives(&mut self, at: usize) -> bool {
        let job = self.jobs[at];
        let router = &mut self.routers[job.router];
        router.roster.refresh(&router.bookings);
        let cluster = router.roster.cluster(1).at(self.now);
        let view = Self::view(&job, at, f64::INFINITY, &self.found);
        let Ok(admitted) = router.dispatch.admit(&cluster, &view, job.arrival, None) else {
            return false;
        };
        assert!((admitted.key_ms - job.key).abs() < 1e-6);
        let entry = Entry {
            model: "m".into(),
            lane: Lane {
                class: job.class,
                tenant: 0,
            },
            key_ms: job.key,
            work_ms: admitted.work_ms,
            goes_on: false,
        };
        let pass = router.dispatch.arrives(&entry, self.now, at).unwrap();
        router.look_at = pass.again_ms().unwrap_or(router.look_at);
        self.try_all(job.router, pass);
        true
    }

    fn try_all(&mut self, number: usize, mut pass: Pass) {
        while let Some(next) = self.routers[number].dispatch.next(&mut pass, self.now) {
            let outcome = self.try_one(number, next.item, next.key_ms);
            let router = &mut self.routers[number];
            router
                .dispatch
                .came_of(&mut pass, &next.place, outcome, self.now);
        }
    }

    fn try_one(&mut self, number: usize, at: usize, key_ms: f64) -> Outcome<usize> {
        let router = &mut self.routers[number];
        router.roster.refresh(&router.bookings);
        let cluster = router.roster.cluster(1).at(self.now);
        let view = Self::view(&self.jobs[at], at, key_ms, &self.found);
        let decision = KvCost::default().choose(&cluster, &view).unwrap();
        let rules = *router.dispatch.settings();
        match rules.judge(&decision, key_ms, self.step, &router.bookings) {
            Verdict::Waits(hold) => Outcome::Waits(at, Some(hold)),
            Verdict::Goes(booked) => {
                router.commands += 1;
                booked
                    .iter()
                    .for_each(|(_, booking)| booking.sent(router.commands));
                router.bookings.echoed(WorkerSlot(0), router.commands);
                self.engine.push((key_ms, at, booked));
                self.tell();
                Outcome::Went
            }
        }
    }

    /// The worker says how it is.
    fn tell(&mut self) {
        for number in 0..self.routers.len() {
            let (mut own, mut others) = (Share::default(), Share::default());
            for (_, at, _) in &self.engine {
                let job = &self.jobs[*at];
                let share = if job.router == number {
                    &mut own
                } else {
                    &mut others
                };
                share.queued += 1;
                share.queued_prefill_tokens += job.work as u64;
                share.classes.waiting[job.class.index()] += 1;
                share.classes.waiting_tokens[job.class.index()] += job.work as u64;
            }
            let view = self.routers[number].roster.get_mut(WorkerSlot(0)).unwrap();
            (view.load.own, view.load.others) = (own, others);
            view.load.step_ends_ms = self.free_at;
        }
    }

    /// All routers hear the worker, and look who may go.
    fn report(&mut self) {
        self.tell();
        for number in 0..self.routers.len() {
            let router = &mut self.routers[number];
            let view = router.roster.get(WorkerSlot(0)).unwrap();
            match router.dispatch.look(
                &Reported::of(view, self.step, LocalPrefill::ByCost, &router.bookings),
                self.now,
            ) {
                Look::Now => self.look(number),
                Look::At(at) => router.look_at = at,
                Look::No => {}
            }
        }
    }

    fn look(&mut self, number: usize) {
        let router = &mut self.routers[number];
        router.look_at = f64::INFINITY;
        let pass = router.dispatch.pass(&"m".into(), self.now);
        self.try_all(number, pass);
    }

    /// The worker takes the prompt with the earliest key.
    fn begin(&mut self) -> bool {
        let keys = self.engine.iter().enumerate();
        let first = keys.min_by(|a, b| a.1.0.total_cmp(&b.1.0).then(a.0.cmp(&b.0)));
        let Some((place, _)) = first else {
            return false;
        };
        let (_, at, booked) = self.engine.remove(place);
        drop(booked);
        self.jobs[at].began = Some(self.now);
        self.step = self.jobs[at].work;
        self.free_at = self.now + self.step;
        true
    }
}

/// Serves them; gives those that were admitted.
fn serve(mut jobs: Vec<Job>, routers: usize, max_wait: f64) -> Vec<Job> {
    jobs.sort_by(|a, b| a.arrival.total_cmp(&b.arrival));
    let (mut run, mut next, mut admitted) = (Run::new(jobs, routers, max_wait), 0, Vec::new());
    loop {
        while next < run.jobs.len() && run.jobs[next].arrival <= run.now {
            if run.arrives(next) {
                admitted.push(next);
            }
            next += 1;
        }
        for number in 0..routers {
            if run.routers[number].look_at <= run.now {
                run.look(number);
            }
        }
        if run.free_at <= run.now {
            if run.begin() {
                run.report();
                continue;
            }
            run.report();
            if !run.engine.is_empty() {
                continue;
            }
        }
        let looks = run.routers.iter().map(|router| router.look_at);
        let mut events: Vec<f64> = looks.collect();
        events.extend(run.jobs.get(next).map(|job| job.arrival));
        events.extend((run.free_at > run.now).then_some(run.free_at));
        let soonest = events.into_iter().fold(f64::INFINITY, f64::min);
        if soonest.is_infinite() {
            assert!(
                run.routers.iter().all(|router| router.dispatch.is_empty()),
                "somebody is left"
            );
            break;
        }
        run.now = soonest.max(run.now);
    }
    admitted.into_iter().map(|at| run.jobs[at]).collect()
}

fn any_job(routers: usize) -> impl Strategy<Value = Job> {
    (0.0f64..20_000.0, 0u8..3, 1u32..400, 0..routers).prop_map(|(arrival, n, work, router)| {
        let work = f64::from(work);
        Job {
            arrival,
            class: class(n),
            work,
            key: virtual_deadline_ms(&ClassTargets::default(), class(n), arrival, work),
            router,
            began: None,
        }
    })
}

fn any_load() -> impl Strategy<Value = (usize, f64, Vec<Job>)> {
    (1usize..4, 500.0f64..5_000.0).prop_flat_map(|(routers, max_wait)| {
        let jobs = prop::collection::vec(any_job(routers), 1..150);
        (Just(routers), Just(max_wait), jobs)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// docs/scheduling.md, "How much may pass a request": the work that arrives
    /// later and is served earlier is at most B. By the code that serves.
    #[test]
    fn the_work_that_passes_a_request_is_bounded((routers, max_wait, jobs) in any_load()) {
        let targets = ClassTargets::default();
        let most = jobs.iter().map(|job| job.work).fold(0.0, f64::max);
        let served = serve(jobs, routers, max_wait);
        for job in &served {
            let began = job.began.unwrap();
            let window = targets.of(job.class).allowance_ms + targets.work_weight * job.work;
            let passing = served.iter().filter(|other| {
                other.arrival > job.arrival && other.began.unwrap() < began
            });
            let mut work = 0.0;
            for other in passing {
                // Nothing that comes after the window passes it. Of what other
                // routers sent, a router knows the class alone.
                let late = other.arrival - job.arrival > window + 1e-6;
                prop_assert!(!late || other.router != job.router);
                work += other.work;
            }
            let bound = window + 3.0 * routers as f64 * (max_wait + most) + most;
            prop_assert!(work <= bound, "{} for {}", work, bound);
        }
    }

    /// The order that is told is the order in which they go.
    #[test]
    fn the_order_told_is_the_order_served(
        items in prop::collection::vec((0u64..5, 0u8..3, 0.0f64..1e4, 1.0f64..500.0), 0..60),
        batch_strict in any::<bool>(),
    ) {
        let settings = QueueSettings { batch_strict, ..QueueSettings::default() };
        let mut queue = Queue::with_settings(settings);
        for (at, (tenant, n, deadline, work)) in items.iter().enumerate() {
            let lane = Lane { class: class(*n), tenant: *tenant };
            queue.push_for(lane, *deadline, *work, at).unwrap();
        }
        let told: Vec<usize> = {
            let by_ticket: Vec<_> = queue.iter().map(|(ticket, at)| (ticket, *at)).collect();
            let find = |ticket| by_ticket.iter().find(|(other, _)| *other == ticket).unwrap().1;
            queue.order(usize::MAX).into_iter().map(find).collect()
        };
        let mut went = Vec::new();
        while let Some(at) = queue.pop() {
            went.push(at);
        }
        prop_assert_eq!(told, went);
    }

    /// Of tenants that always have requests waiting none gets more than a
    /// quantum and two longest requests ahead of another.
    #[test]
    fn tenants_share_within_a_class(
        works in prop::collection::vec(prop::collection::vec(1.0f64..1_000.0, 40), 2..5),
        quantum_ms in 10.0f64..500.0,
    ) {
        let mut queue = Queue::with_settings(QueueSettings { quantum_ms, ..QueueSettings::default() });
        for (tenant, works) in works.iter().enumerate() {
            for (n, work) in works.iter().enumerate() {
                let lane = Lane { class: Class::Standard, tenant: tenant as u64 };
                // One tenant came long before the others.
                queue.push_for(lane, (tenant * 1_000 + n) as f64, *work, (tenant, *work)).unwrap();
            }
        }
        let mut left: Vec<usize> = works.iter().map(Vec::len).collect();
        let mut got = vec![0.0f64; works.len()];
        let most = works.iter().flatten().copied().fold(0.0, f64::max);
        while let Some((tenant, work)) = queue.pop() {
            got[tenant] += work;
            left[tenant] -= 1;
            if left[tenant] == 0 {
                break;
            }
            let (low, high) = (got.iter().copied().fold(f64::INFINITY, f64::min), got.iter().copied().fold(0.0, f64::max));
            prop_assert!(high - low <= quantum_ms + 2.0 * most, "{:?}", got);
        }
    }
}

#[test]
fn batch_may_be_strict() {
    for batch_strict in [false, true] {
        let settings = QueueSettings {
            batch_strict,
            ..QueueSettings::default()
        };
        let mut queue = Queue::with_settings(settings);
        for (class, deadline) in [(Class::Batch, 1.0), (Class::Interactive, 2.0)] {
            let lane = Lane { class, tenant: 1 };
            queue.push_for(lane, deadline, 10.0, class).unwrap();
        }
        let first = if batch_strict {
            Class::Interactive
        } else {
            Class::Batch
        };
        assert_eq!(queue.pop(), Some(first));
    }
}

#[test]
fn what_is_taken_keeps_its_place() {
    let mut queue = Queue::new(10);
    let first = queue.push(1.0, 5.0, "first").unwrap();
    queue.push(2.0, 5.0, "second").unwrap();
    assert_eq!(queue.take(first), Some("first"));
    assert_eq!(queue.take(first), None);
    assert_eq!((queue.len(), queue.order(9).len()), (2, 1));
    queue.put_back(first, "first");
    assert_eq!(queue.first().map(|(_, item)| *item), Some("first"));
    assert_eq!(queue.take(first), Some("first"));
    assert_eq!(queue.serve(first), None);
    assert_eq!((queue.pop(), queue.work_ms()), (Some("second"), 0.0));
}
