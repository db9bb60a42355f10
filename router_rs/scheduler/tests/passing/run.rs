//! Workers, and routers that hold requests back: the code that serves around engines of the test.

use crate::common::{request, worker};
use crate::engine::{Engine, Sent, Stops};
use crate::{Case, Job, Served};
use kvmesh_kv_index::{Matches, WorkerSlot};
use kvmesh_scheduler::{
    Bookings, Dispatch, DispatchSettings, Entry, KvCost, Lane, LocalPrefill, Look, Outcome, Pass,
    Policy, Reported, RequestView, Role, Roster, StepModel, Turn, Verdict,
};
use std::sync::Arc;

/// A router: what serves, and what it knows of the workers.
struct Router {
    dispatch: Dispatch<usize>,
    roster: Roster,
    bookings: Bookings,
    commands: Vec<u64>,
    look_at: f64,
    /// More urgent classes went first at some time.
    overloaded: bool,
}

impl Router {
    fn new(case: &Case) -> Self {
        let settings = DispatchSettings {
            max_wait_ms: case.max_wait,
            ..DispatchSettings::default()
        };
        let mut roster = Roster::new();
        for slot in 0..case.workers as u32 {
            let mut view = worker(slot, Role::Both);
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
            able.layer_preemption = case.stops == Stops::BetweenLayers;
            (able.pool_blocks, able.context_length) = (1 << 30, 1 << 20);
            view.load.kv.free = 1 << 30;
            roster.insert(view);
        }
        Self {
            dispatch: Dispatch::new(settings),
            roster,
            bookings: Bookings::new(),
            commands: vec![0; case.workers],
            look_at: f64::INFINITY,
            overloaded: false,
        }
    }

    /// Turns away who has waited for as long as it may; how many that are.
    fn turn_away(&mut self, jobs: &[Job], now: f64) -> usize {
        self.overloaded |= self.dispatch.is_overloaded("m", now);
        let waiting = self.dispatch.waiting();
        let over = waiting.filter_map(|(place, _, at)| {
            let job = &jobs[*at];
            let of = &self.dispatch;
            let longest = of.longest_wait_ms("m", job.class, job.work, now);
            (now - job.arrival > longest).then_some(place)
        });
        let over: Vec<_> = over.collect();
        let gone = over
            .iter()
            .filter_map(|place| self.dispatch.turn_away(place, now));
        gone.count()
    }
}

/// Workers, and routers that hold requests back.
pub(crate) struct Run {
    case: Case,
    routers: Vec<Router>,
    engines: Vec<Engine>,
    now: f64,
    found: Matches,
}

impl Run {
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
        let job = self.case.jobs[at];
        let router = &mut self.routers[job.router];
        router.roster.refresh(&router.bookings);
        let cluster = router.roster.cluster(1 + job.router as u64).at(self.now);
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
            let outcome = self.try_one(number, next.item, next.turn);
            let router = &mut self.routers[number];
            router
                .dispatch
                .came_of(&mut pass, &next.place, outcome, self.now);
        }
    }

    fn try_one(&mut self, number: usize, at: usize, turn: Turn) -> Outcome<usize> {
        let router = &mut self.routers[number];
        router.roster.refresh(&router.bookings);
        let cluster = router.roster.cluster(1 + number as u64).at(self.now);
        let view = Self::view(&self.case.jobs[at], at, turn.chosen_by_ms(), &self.found);
        let decision = KvCost::default().choose(&cluster, &view).unwrap();
        let slot = decision.plan().prefill();
        let worker = slot.0 as usize;
        let step_ms = self.engines[worker].step_ms();
        let rules = *router.dispatch.settings();
        match rules.judge(&decision, turn, step_ms, &router.bookings) {
            Verdict::Waits(hold) => Outcome::Waits(at, Some(hold)),
            Verdict::Goes(booked) => {
                let command = &mut router.commands[worker];
                *command += 1;
                booked
                    .iter()
                    .for_each(|(_, booking)| booking.sent(*command));
                router.bookings.echoed(slot, *command);
                let work = self.case.jobs[at].work;
                self.engines[worker].sent.push(Sent {
                    key: turn.key_ms,
                    at,
                    begun: false,
                    left: work,
                    told: work,
                    chunk: 0.0,
                    booked,
                });
                self.tell(worker);
                Outcome::Went
            }
        }
    }

    /// A worker says how it is.
    fn tell(&mut self, worker: usize) {
        let engine = &self.engines[worker];
        for (number, router) in self.routers.iter_mut().enumerate() {
            let view = router.roster.get_mut(WorkerSlot(worker as u32)).unwrap();
            (view.load.own, view.load.others) = engine.shares(number, &self.case.jobs);
            view.load.step_ends_ms = engine.running.map_or(0.0, |step| step.ends);
        }
    }

    /// All routers hear a worker, and look who may go.
    fn report(&mut self, worker: usize) {
        self.tell(worker);
        for number in 0..self.routers.len() {
            let step_ms = self.engines[worker].step_ms();
            let router = &mut self.routers[number];
            router.roster.refresh(&router.bookings);
            let view = router.roster.get(WorkerSlot(worker as u32)).unwrap();
            let report = Reported::of(view, step_ms, LocalPrefill::ByCost, &router.bookings);
            match router.dispatch.look(&report, self.now) {
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

    /// When something happens next, ms; infinite: never.
    fn next(&self, to_come: usize) -> f64 {
        let looks = self.routers.iter().map(|router| router.look_at);
        let steps = self.engines.iter().filter_map(|engine| engine.running);
        let arrival = self.case.jobs.get(to_come).map(|job| job.arrival);
        let all = looks.chain(steps.map(|step| step.ends)).chain(arrival);
        all.fold(f64::INFINITY, f64::min)
    }

    /// Serves all of them.
    pub(crate) fn serve(mut case: Case) -> Served {
        case.jobs.sort_by(|a, b| a.arrival.total_cmp(&b.arrival));
        let mut run = Self {
            routers: (0..case.routers).map(|_| Router::new(&case)).collect(),
            engines: (0..case.workers).map(|_| Engine::default()).collect(),
            case,
            now: 0.0,
            found: Matches::default(),
        };
        let (mut to_come, mut admitted) = (0, 0);
        loop {
            while run
                .case
                .jobs
                .get(to_come)
                .is_some_and(|job| job.arrival <= run.now)
            {
                admitted += usize::from(run.arrives(to_come));
                to_come += 1;
            }
            for router in &mut run.routers {
                admitted -= router.turn_away(&run.case.jobs, run.now);
            }
            for number in 0..run.routers.len() {
                if run.routers[number].look_at <= run.now {
                    run.look(number);
                }
            }
            let mut turned = false;
            for worker in 0..run.engines.len() {
                if run.engines[worker].turn(run.now, run.case.stops) {
                    turned = true;
                    run.report(worker);
                }
            }
            if turned {
                continue;
            }
            let next = run.next(to_come);
            if next.is_infinite() {
                break;
            }
            run.now = next.max(run.now);
        }
        let mut waiting = run.routers.iter().map(|router| &router.dispatch);
        assert!(waiting.all(Dispatch::is_empty), "somebody is left");
        let done = run.engines.iter().map(|engine| engine.done.len());
        assert_eq!(done.sum::<usize>(), admitted);
        Served {
            overloaded: run.routers.iter().any(|router| router.overloaded),
            case: run.case,
            engines: run.engines,
        }
    }
}
