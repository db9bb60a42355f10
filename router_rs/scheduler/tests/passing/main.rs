//! How much may pass a request: arrivals of any kind through the code that serves,
//! on engines that stop what they compute for what is more urgent, and on such as do not.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod engine;
mod run;

use engine::{Engine, Stops};
use kvmesh_scheduler::{Class, ClassTargets, virtual_deadline_ms};
use proptest::prelude::*;
use run::Run;

/// Arrivals come within this long, ms: twice the head start of everyone over batch,
/// so that much comes after the window of a batch request.
const ARRIVE_MS: f64 = 60_000.0;

/// One request.
#[derive(Debug, Clone, Copy)]
struct Job {
    arrival: f64,
    class: Class,
    work: f64,
    key: f64,
    router: usize,
}

impl Job {
    fn new(arrival: f64, class: Class, work: f64, router: usize) -> Self {
        let key = virtual_deadline_ms(&ClassTargets::default(), class, arrival, work);
        Self {
            arrival,
            class,
            work,
            key,
            router,
        }
    }

    /// What comes so long after it has a later key (H), ms.
    fn window(&self) -> f64 {
        let targets = ClassTargets::default();
        let head_start = targets.of(Class::Interactive).allowance_ms;
        targets.of(self.class).allowance_ms - head_start + targets.work_weight * self.work
    }
}

/// What is served, by whom and how.
#[derive(Debug, Clone)]
struct Case {
    jobs: Vec<Job>,
    routers: usize,
    workers: usize,
    max_wait: f64,
    stops: Stops,
}

/// What came of a case.
struct Served {
    case: Case,
    engines: Vec<Engine>,
    /// Some router let more urgent classes go first at some time.
    overloaded: bool,
}

/// What passed a request: came later, and was computed earlier.
#[derive(Debug)]
struct Passed {
    job: Job,
    /// When it was computed itself.
    done: f64,
    /// When its worker first took it up.
    begun: f64,
    /// All of it that its worker computed, ms.
    work: f64,
    /// What of it came to the same router after its window.
    late: Vec<Job>,
}

impl Served {
    /// Of each request that was admitted what passed it, to its last token: what is paused
    /// for others is passed by them.
    fn passed(&self) -> impl Iterator<Item = Passed> {
        self.engines.iter().flat_map(move |engine| {
            let done = engine.done.iter();
            done.map(move |(at, done)| self.passed_one(engine, *at, *done))
        })
    }

    fn passed_one(&self, engine: &Engine, at: usize, done: f64) -> Passed {
        let job = self.case.jobs[at];
        let before = || engine.slices.iter().take_while(|slice| slice.to <= done);
        let passing = || {
            let all = before().map(|slice| (self.case.jobs[slice.at], slice));
            all.filter(|(other, _)| other.arrival > job.arrival)
        };
        let late = passing().map(|(other, _)| other).filter(|other| {
            let passes = self.overloaded && other.class < job.class;
            let after = other.arrival - job.arrival > job.window() + 1e-6;
            other.router == job.router && after && !passes
        });
        let own = before().find(|slice| slice.at == at);
        Passed {
            job,
            done,
            begun: own.unwrap().from,
            work: passing().map(|(_, slice)| slice.to - slice.from).sum(),
            late: late.collect(),
        }
    }

    /// docs/scheduling.md, "How much may pass a request" (B), ms.
    fn bound(&self, job: &Job) -> f64 {
        let case = &self.case;
        let works = case.jobs.iter().map(|job| job.work);
        let most = works.fold(0.0, f64::max);
        let waits = case.max_wait * case.workers as f64;
        // In an overload it is passed by more urgent ones for as long as it waits.
        let overload = match self.overloaded && job.class > Class::Interactive {
            true => case.max_wait,
            false => 0.0,
        };
        job.window() + overload + 3.0 * case.routers as f64 * (waits + most) + most
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let stops = prop::sample::select(vec![
        Stops::Nowhere,
        Stops::BetweenChunks,
        Stops::BetweenLayers,
    ]);
    let sizes = (1usize..4, 1usize..4, 500.0f64..5_000.0, stops, 50u32..800);
    sizes.prop_flat_map(|(routers, workers, max_wait, stops, most)| {
        let job = (0.0..ARRIVE_MS, 0usize..3, 1..=most, 0..routers);
        let job = job.prop_map(|(arrival, class, work, router)| {
            Job::new(arrival, Class::ALL[class], f64::from(work), router)
        });
        prop::collection::vec(job, 1..500 * workers).prop_map(move |jobs| Case {
            jobs,
            routers,
            workers,
            max_wait,
            stops,
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// docs/scheduling.md, "How much may pass a request": the work that arrives
    /// later and is served earlier is at most B. By the code that serves.
    #[test]
    fn the_work_that_passes_a_request_is_bounded(case in any_case()) {
        let served = Run::serve(case);
        for passed in served.passed() {
            // Nothing that comes after the window passes it. Of what other
            // routers sent, a router knows the class alone.
            prop_assert!(passed.late.is_empty() || served.case.workers > 1, "{:?}", passed);
            let bound = served.bound(&passed.job);
            prop_assert!(passed.work <= bound, "{:?} for {}", passed, bound);
        }
    }
}

/// Under a load of more urgent requests that never ends, one that has begun is paused for
/// them as long as its window, and by nothing that comes after it.
#[test]
fn who_began_is_passed_for_its_window_and_no_longer() {
    const WORK_MS: f64 = 400.0;
    const OTHERS_MS: f64 = 100.0;
    let targets = ClassTargets::default();
    for stops in [Stops::BetweenChunks, Stops::BetweenLayers] {
        for class in Class::ALL {
            let job = Job::new(0.0, class, WORK_MS, 0);
            let others = (0..(ARRIVE_MS / OTHERS_MS) as u32).map(|n| {
                let arrival = f64::from(n).mul_add(OTHERS_MS, 50.0);
                Job::new(arrival, Class::Interactive, OTHERS_MS, 0)
            });
            let served = Run::serve(Case {
                jobs: std::iter::once(job).chain(others).collect(),
                routers: 1,
                workers: 1,
                max_wait: 5_000.0,
                stops,
            });
            let passed = served.passed().find(|passed| passed.job.arrival == 0.0);
            let passed = passed.unwrap();
            assert_eq!(passed.begun, 0.0);
            assert!(passed.late.is_empty(), "{passed:?}");
            // All that come in it pass, but for the last ones, whose keys are later.
            let later = targets.work_weight * OTHERS_MS;
            let most = job.window() - later;
            assert!(
                passed.work >= most - 2.0 * OTHERS_MS,
                "{stops:?} {passed:?}"
            );
            assert!(passed.work <= most + OTHERS_MS, "{stops:?} {passed:?}");
            assert!(passed.done < ARRIVE_MS, "others came after its window");
        }
    }
}
