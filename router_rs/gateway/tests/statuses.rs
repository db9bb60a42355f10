//! Statuses that depend on what the cluster is doing, over real sockets.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::{collections::HashMap, time::Duration};

use common::{Mesh, read, request};
use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::v1;
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Metadata of a status that is as it must be.
fn told(status: &Status, code: Code, reason: &str) -> HashMap<String, String> {
    let info = status
        .get_details_error_info()
        .expect("every status carries ErrorInfo");
    assert_eq!(
        (status.code(), info.domain.as_str(), info.reason.as_str()),
        (code, "kvmesh", reason),
        "{status}"
    );
    info.metadata
}

/// The delay of a status that says when to come back.
fn overloaded(status: &Status) -> Duration {
    told(status, Code::ResourceExhausted, "OVERLOADED");
    let retry = status.get_details_retry_info().expect("RetryInfo");
    let delay = retry.retry_delay.unwrap();
    assert!(!delay.is_zero());
    delay
}

/// A call with a deadline, as gRPC writes it.
fn within(timeout: &str, asked: v1::GenerateRequest) -> tonic::Request<v1::GenerateRequest> {
    let mut call = tonic::Request::new(asked);
    let timeout = timeout.parse().unwrap();
    call.metadata_mut().insert("grpc-timeout", timeout);
    call
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_refused_until_its_time_is_over_hears_of_overload_and_of_no_loss() {
    let mesh = Mesh::start(
        vec![MockConfig::default()],
        json!({"queue_timeout": "300ms"}),
    )
    .await;
    let faults = mesh.workers[0].faults();
    faults.set(|plan| plan.refuse_next = u32::MAX);
    let mut client = mesh.client().await;
    // Its deadline does not make it wait for longer: it goes on with nothing.
    for call in [tonic::Request::new(request(4)), within("1000S", request(4))] {
        let (ids, end) = read(client.generate(call).await.unwrap().into_inner()).await;
        overloaded(&end.unwrap_err());
        assert!(ids.is_empty());
    }
    let counters = mesh.workers[0].counters();
    assert!(counters.refused > 4, "{counters:?}");
    assert_eq!(counters.placed, 0);
}
