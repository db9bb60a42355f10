//! In what order requests are served, and fair share. How much may pass one: passing.rs.
#![allow(clippy::unwrap_used)]

use kvmesh_scheduler::{Class, Lane, Queue, QueueSettings};
use proptest::prelude::*;

fn class(n: u8) -> Class {
    Class::ALL[usize::from(n)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

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
