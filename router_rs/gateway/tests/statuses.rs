//! Statuses that depend on what the cluster is doing, over real sockets.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::{collections::HashMap, time::Duration};

use common::{Mesh, read, request};
use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::v1::{self, RefusalReason, generate_response::Event};
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

/// The field that a status names, in both of its details.
fn names(status: &Status) -> String {
    let metadata = told(status, Code::Unimplemented, "UNSUPPORTED");
    let violations = status.get_details_bad_request().unwrap().field_violations;
    assert_eq!(violations[0].field, metadata["field"]);
    assert!(status.get_details_retry_info().is_none());
    metadata["field"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_engine_lacks_is_named_by_its_field_also_where_only_its_refusal_says_so() {
    let mesh = Mesh::start(
        vec![MockConfig {
            penalties_over_continuation: false,
            ..MockConfig::default()
        }],
        json!({}),
    )
    .await;
    let mut client = mesh.client().await;
    let mut penalised = request(4);
    penalised.continue_from = Some(v1::ContinueFrom {
        token_ids: vec![1, 2],
        ..Default::default()
    });
    penalised.sampling = Some(v1::Sampling {
        repetition_penalty: Some(1.5),
        ..Default::default()
    });
    let status = client.generate(penalised).await.map(|_| ()).unwrap_err();
    assert_eq!(names(&status), "continue_from");

    for (said, named) in [("sampling.min_p", "sampling.min_p"), ("", "sampling")] {
        mesh.workers[0].faults().set(|plan| {
            plan.refuse_next = u32::MAX;
            plan.refuse_reason = RefusalReason::Unsupported;
            said.clone_into(&mut plan.refuse_field);
        });
        let (ids, end) = read(client.generate(request(4)).await.unwrap().into_inner()).await;
        let status = end.unwrap_err();
        assert_eq!(names(&status), named);
        assert!(status.message().contains("asked to refuse"), "{status}");
        assert!(ids.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_no_other_engine_can_go_on_with_is_lost_with_its_next_index() {
    let mesh = Mesh::start(
        vec![MockConfig {
            step: Duration::from_millis(5),
            ..MockConfig::default()
        }],
        json!({}),
    )
    .await;
    let mut client = mesh.client().await;
    let mut stream = client.generate(request(2_000)).await.unwrap().into_inner();
    let mut next = 0;
    let status = loop {
        let message = match stream.message().await {
            Ok(message) => message.unwrap(),
            Err(status) => break status,
        };
        if let Some(Event::Tokens(tokens)) = message.event {
            next = tokens.first_index + u32::try_from(tokens.ids.len()).unwrap();
            mesh.workers[0].faults().set(|plan| {
                plan.return_at = plan.return_at.or(Some(next + 50));
                plan.return_next = 1;
                plan.refuse_next = u32::MAX;
                plan.refuse_reason = RefusalReason::Unsupported;
            });
        }
    };
    let metadata = told(&status, Code::Unavailable, "WORKER_LOST");
    assert!(next > 0);
    assert_eq!(metadata["next_index"], next.to_string());
}
