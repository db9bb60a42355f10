//! In what order requests are served: how much may pass one, and fair share.
#![allow(clippy::unwrap_used)]

use kvmesh_scheduler::{Class, ClassTargets, Lane, Queue, QueueSettings, virtual_deadline_ms};
use proptest::prelude::*;

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

const DISPATCH_AHEAD: f64 = 50.0;

/// One worker that takes prompts by their keys, one after the other, and
/// routers that each keep a queue and send within `DISPATCH_AHEAD`. Gives what
/// was admitted.
fn serve(mut jobs: Vec<Job>, routers: usize, max_wait: f64) -> Vec<Job> {
    jobs.sort_by(|a, b| a.arrival.total_cmp(&b.arrival));
    let mut queues: Vec<Queue<usize>> = (0..routers).map(|_| Queue::new(usize::MAX)).collect();
    let mut engine: Vec<usize> = Vec::new();
    let (mut free_at, mut now, mut next) = (0.0f64, 0.0f64, 0);
    let mut admitted = Vec::new();
    loop {
        while next < jobs.len() && jobs[next].arrival <= now {
            let job = jobs[next];
            let lane = Lane {
                class: job.class,
                tenant: 0,
            };
            let queue = &mut queues[job.router];
            let at_worker: f64 = engine.iter().map(|at| jobs[*at].work).sum();
            let wait =
                (free_at - now).max(0.0) + at_worker + queue.admission_ms(job.class, job.key);
            if wait <= max_wait {
                queue.push_for(lane, job.key, job.work, next).unwrap();
                admitted.push(next);
            }
            next += 1;
        }
        for queue in &mut queues {
            while let Some((_, at)) = queue.first() {
                let key = jobs[*at].key;
                let ahead = engine.iter().filter(|other| jobs[**other].key <= key);
                let ahead: f64 = ahead.map(|other| jobs[*other].work).sum();
                if (free_at - now).max(0.0) + ahead > DISPATCH_AHEAD {
                    break;
                }
                engine.push(queue.pop().unwrap());
            }
        }
        if free_at <= now && !engine.is_empty() {
            let first = engine
                .iter()
                .enumerate()
                .min_by(|a, b| jobs[*a.1].key.total_cmp(&jobs[*b.1].key).then(a.1.cmp(b.1)));
            let at = engine.remove(first.unwrap().0);
            jobs[at].began = Some(now);
            free_at = now + jobs[at].work;
            continue;
        }
        let arrival = jobs.get(next).map(|job| job.arrival);
        let idle = engine.is_empty() && queues.iter().all(Queue::is_empty);
        now = match arrival {
            Some(arrival) if idle || arrival < free_at => arrival,
            Some(_) => free_at,
            None if idle => break,
            None => free_at,
        };
    }
    admitted.into_iter().map(|at| jobs[at]).collect()
}

fn any_job(routers: usize) -> impl Strategy<Value = Job> {
    (0.0f64..20_000.0, 0u8..3, 1.0f64..400.0, 0..routers).prop_map(|(arrival, n, work, router)| {
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
    /// later and is served earlier is at most B.
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
                // Nothing that comes after the window passes it.
                prop_assert!(other.arrival - job.arrival <= window + 1e-6);
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

#[test]
fn a_class_is_admitted_by_what_is_as_urgent() {
    let mut queue = Queue::new(10);
    for (class, deadline) in [(Class::Batch, 9.0), (Class::Interactive, 1.0)] {
        queue
            .push_for(Lane { class, tenant: 1 }, deadline, 100.0, ())
            .unwrap();
    }
    assert_eq!(queue.admission_ms(Class::Interactive, 0.0), 100.0);
    assert_eq!(queue.admission_ms(Class::Batch, 0.0), 200.0);
    assert_eq!(queue.admission_ms(Class::Interactive, 10.0), 200.0);
}
