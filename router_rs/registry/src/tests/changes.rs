use futures_util::future::join_all;

use super::*;
use crate::{Announced, Changes, WorkerChange};

fn change(worker: &str, becomes: Option<Role>) -> WorkerChange {
    WorkerChange {
        worker_id: worker.to_owned(),
        incarnation: 1,
        becomes,
    }
}

/// Writes a change where no other worker's is written; else gives what is.
async fn alone(changes: &Changes, ours: &WorkerChange) -> Result<Announced, Vec<WorkerChange>> {
    let agrees = |others: &[WorkerChange]| match others {
        [] => Ok(()),
        _ => Err(others.to_vec()),
    };
    changes.announce(ours, agrees).await.unwrap()
}

#[tokio::test]
async fn of_changes_at_many_routers_at_once_all_but_the_first_see_it() {
    let etcd = Etcd::start();
    let routers: Vec<Changes> = (0..8).map(|_| registry(&etcd).changes()).collect();
    let ours: Vec<_> = (0..8)
        .map(|n| change(&format!("d{n}"), Some(Role::Prefill)))
        .collect();
    let asked = routers.iter().zip(&ours);
    let answers = join_all(asked.map(|(router, ours)| alone(router, ours))).await;
    let first = answers.iter().position(Result::is_ok).unwrap();
    for (at, answer) in answers.into_iter().enumerate() {
        match answer {
            Ok(_) => assert_eq!(at, first),
            Err(seen) => assert_eq!(seen, [ours[first].clone()]),
        }
    }
}

#[tokio::test]
async fn a_change_that_is_withdrawn_counts_no_more() {
    let etcd = Etcd::start();
    let (one, two) = (registry(&etcd).changes(), registry(&etcd).changes());
    let announced = alone(&one, &change("d1", None)).await.unwrap();
    // Of a worker's own there is the last one only.
    let again = alone(&two, &change("d1", Some(Role::Both))).await.unwrap();
    announced.withdraw().await.unwrap();
    let seen = alone(&one, &change("d2", None)).await.unwrap_err();
    assert_eq!(seen, [change("d1", Some(Role::Both))]);
    again.withdraw().await.unwrap();
    assert!(alone(&one, &change("d2", None)).await.is_ok());
}

#[tokio::test]
async fn what_a_later_version_writes_is_passed_over() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let client = crate::client::Client::new(settings(&etcd)).unwrap();
    let put = crate::etcd::etcdserverpb::PutRequest {
        key: format!("kvmesh/v1/{CLUSTER}/changes/d1").into_bytes(),
        value: br#"{"incarnation":1,"becomes":"ROLE_TO_COME"}"#.to_vec(),
        ..Default::default()
    };
    let operation = crate::etcd::etcdserverpb::RequestOp {
        request: Some(crate::etcd::etcdserverpb::request_op::Request::RequestPut(
            put,
        )),
    };
    let request = crate::etcd::etcdserverpb::TxnRequest {
        success: vec![operation],
        ..Default::default()
    };
    assert!(client.transact(request).await.unwrap().succeeded);
    assert!(
        alone(&registry.changes(), &change("d2", None))
            .await
            .is_ok()
    );
}
