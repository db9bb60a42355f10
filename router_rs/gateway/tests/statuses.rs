//! Statuses that depend on what the cluster is doing, over real sockets.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use common::{Mesh, read, request};
use kvmesh_rpc::v1::admin_client::AdminClient;
use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::v1::{
    self, RefusalReason, Role, generate_request::Input, generate_response::Event, grammar::Kind,
};
use serde_json::json;
use tonic::{Code, Status, Streaming};
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
    // It gets no further than that before nobody takes it any more.
    mesh.workers[0].faults().set(|plan| {
        plan.hold_at = Some(50);
        plan.return_at = Some(50);
        plan.return_next = 1;
    });
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
                plan.refuse_next = u32::MAX;
                plan.refuse_reason = RefusalReason::Unsupported;
                plan.hold_at = None;
            });
        }
    };
    let metadata = told(&status, Code::Unavailable, "WORKER_LOST");
    assert!(next > 0);
    assert_eq!(metadata["next_index"], next.to_string());
}

/// A worker that follows grammars, and tells whether it goes on within one.
fn within_grammars(over_continuation: bool) -> MockConfig {
    MockConfig {
        step: Duration::from_millis(1),
        grammars: true,
        grammars_over_continuation: over_continuation,
        ..MockConfig::default()
    }
}

fn grammar() -> v1::Grammar {
    v1::Grammar {
        kind: Some(Kind::JsonSchema("{\"type\": \"object\"}".to_owned())),
        ..Default::default()
    }
}

/// Asks under a grammar, and reads until a worker holds the stream after five tokens.
async fn held_under_a_grammar(mesh: &Mesh) -> (Streaming<v1::GenerateResponse>, String) {
    let asked = v1::GenerateRequest {
        grammar: Some(grammar()),
        ..request(2_000)
    };
    let mut client = mesh.client().await;
    let mut stream = client.generate(asked).await.unwrap().into_inner();
    let (mut text, mut next) = (String::new(), 0);
    while next < 5 {
        if let Some(Event::Tokens(tokens)) = stream.message().await.unwrap().unwrap().event {
            assert_eq!(tokens.first_index, next);
            next += u32::try_from(tokens.ids.len()).unwrap();
            text += &tokens.text;
        }
    }
    assert_eq!(next, 5);
    (stream, text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_under_a_grammar_that_no_engine_goes_on_within_ends_by_name() {
    let config = within_grammars(false);
    let mut mesh = Mesh::start(vec![config.clone(), config], json!({})).await;
    mesh.wait_figure("kvmesh_sessions{state=\"live\"}", 2).await;
    for worker in &mesh.workers {
        worker.faults().set(|plan| plan.hold_at = Some(5));
    }
    let (mut stream, _) = held_under_a_grammar(&mesh).await;
    let (had, others): (Vec<_>, Vec<_>) = mesh
        .workers
        .iter_mut()
        .partition(|worker| worker.counters().placed == 1);
    for worker in &others {
        worker.faults().set(|plan| plan.hold_at = None);
    }
    for worker in had {
        worker.kill();
    }
    let status = loop {
        match stream.message().await {
            Ok(message) => assert!(!matches!(message.unwrap().event, Some(Event::Tokens(_)))),
            Err(status) => break status,
        }
    };
    let metadata = told(&status, Code::Unavailable, "WORKER_LOST");
    assert_eq!(metadata["next_index"], "5");
    assert!(status.message().contains("within the grammar"), "{status}");
    assert_eq!(others.len(), 1);
    let counters = others[0].counters();
    assert_eq!((counters.placed, counters.refused), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_under_a_grammar_goes_on_at_an_engine_that_goes_on_within_it() {
    let [able, not] = [true, false].map(within_grammars);
    let mut mesh = Mesh::start(vec![able.clone(), not, able], json!({})).await;
    mesh.wait_figure("kvmesh_sessions{state=\"live\"}", 3).await;
    let says = "{\"city\": \"Paris\", \"why\": \"it rains there\"}";
    for worker in &mesh.workers {
        worker.say(Some(says));
    }
    mesh.workers[0].faults().set(|plan| plan.hold_at = Some(5));
    mesh.workers[1].set_draining(true);
    mesh.workers[2].set_draining(true);
    let (mut stream, mut text) = held_under_a_grammar(&mesh).await;
    assert_eq!(mesh.workers[0].counters().placed, 1);
    // One that could not go on within it is there for as long as nobody else is.
    mesh.workers[1].set_draining(false);
    let mut plain = mesh.client().await;
    loop {
        let answer = plain.generate(request(2)).await.unwrap();
        read(answer.into_inner()).await.1.unwrap();
        if mesh.workers[1].counters().placed > 0 {
            break;
        }
    }
    let placed = mesh.workers[1].counters().placed;
    mesh.workers[0].kill();
    mesh.wait_figure("kvmesh_queued_requests", 1).await;
    mesh.workers[2].set_draining(false);
    let reason = loop {
        match stream.message().await.unwrap().unwrap().event {
            Some(Event::Tokens(tokens)) => text += &tokens.text,
            Some(Event::Finished(end)) => break end.reason(),
            _ => {}
        }
    };
    assert_eq!((text.as_str(), reason), (says, v1::FinishReason::Stop));
    assert_eq!(mesh.workers[1].counters().placed, placed);
    let placed = mesh.workers[2].last_place().unwrap().continuation.unwrap();
    assert_eq!(placed.grammar, Some(grammar()));
}

/// A worker whose prompts compute for longer than any test, and by its step
/// model 40 ms a thousand tokens.
fn stuck_prompts() -> MockConfig {
    MockConfig {
        step: Duration::from_millis(20),
        prefill: Duration::from_secs(3_600),
        ..MockConfig::default()
    }
}

/// A prompt of so many tokens that begins as no other one does.
fn prompt(first: u32, tokens: u32) -> v1::GenerateRequest {
    let ids = (first..first + tokens).map(|id| id % 50).collect();
    v1::GenerateRequest {
        input: Some(Input::TokenIds(v1::TokenIds { ids })),
        ..request(3)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_that_cannot_be_met_is_told_what_it_lacks() {
    let mesh = Mesh::start(vec![stuck_prompts()], json!({})).await;
    let mut client = mesh.client().await;
    // 4 s of work, and 2 s of time.
    let refused = client.generate(within("2S", prompt(1, 102_400))).await;
    let delay = overloaded(&refused.map(|_| ()).unwrap_err());
    let lacking = Duration::from_secs(2)..Duration::from_secs(4);
    assert!(lacking.contains(&delay), "{delay:?}");
    assert_eq!(mesh.workers[0].counters().placed, 0);
    let step = "kvmesh_rejected_total{step=\"admission\",reason=\"OVERLOADED\"}";
    assert_eq!(mesh.figure(step).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_that_is_predicted_to_be_too_long_is_told_how_much_too_long() {
    let settings = json!({"queue_timeout": "500ms"});
    let mesh = Mesh::start(vec![stuck_prompts()], settings).await;
    let mut client = mesh.client().await;
    let _first = client.generate(prompt(1, 51_200)).await.unwrap();
    // 2 s of work are before it.
    let refused = client.generate(prompt(2, 51_200)).await;
    let delay = overloaded(&refused.map(|_| ()).unwrap_err());
    let too_long = Duration::from_millis(1_400)..Duration::from_millis(2_000);
    assert!(too_long.contains(&delay), "{delay:?}");
    assert_eq!(mesh.figure("kvmesh_queued_requests").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waited_in_vain_is_not_told_to_come_back_at_once() {
    let settings = json!({"queue_timeout": "2200ms"});
    let mesh = Mesh::start(vec![stuck_prompts()], settings).await;
    let mut client = mesh.client().await;
    let _first = client.generate(prompt(1, 5_120)).await.unwrap();
    let waiting = client.generate(prompt(2, 5_120)).await.unwrap();
    let (ids, end) = read(waiting.into_inner()).await;
    // What is predicted for it are 200 ms, which did not come true.
    assert_eq!(overloaded(&end.unwrap_err()), Duration::from_secs(1));
    assert!(ids.is_empty());
}

type Admin = AdminClient<tonic::transport::Channel>;

/// Looks until the router's table of workers is as wanted.
async fn wait_workers(admin: &mut Admin, wanted: impl Fn(&v1::WorkerStatus) -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let ask = v1::ListWorkersRequest::default();
        let workers = admin.list_workers(ask).await.unwrap().into_inner().workers;
        if workers.iter().all(&wanted) {
            return;
        }
        assert!(Instant::now() < until, "{workers:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_all_workers_drain_there_is_none() {
    let workers = vec![MockConfig::default(), MockConfig::default()];
    let mesh = Mesh::start(workers, json!({})).await;
    let mut client = mesh.client().await;
    let mut admin = AdminClient::new(mesh.channel().await);
    for worker in &mesh.workers {
        worker.set_draining(true);
    }
    wait_workers(&mut admin, |row| row.load.is_some_and(|load| load.draining)).await;
    let refused = client.generate(request(3)).await.map(|_| ()).unwrap_err();
    told(&refused, Code::Unavailable, "NO_WORKER");
    assert!(refused.get_details_retry_info().is_none());
    // One that is back is enough.
    mesh.workers[1].set_draining(false);
    let back = |row: &v1::WorkerStatus| {
        let drains = row.load.is_some_and(|load| load.draining);
        drains == (row.record.as_ref().unwrap().worker_id == mesh.workers[0].worker_id())
    };
    wait_workers(&mut admin, back).await;
    let stream = client.generate(request(3)).await.unwrap().into_inner();
    assert_eq!(read(stream).await.0.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_administrator_asks_in_vain_has_a_reason_each() {
    let mesh = Mesh::start(vec![MockConfig::default()], json!({})).await;
    let mut admin = AdminClient::new(mesh.channel().await);
    let worker_id = mesh.workers[0].worker_id().to_owned();
    let drain = |worker_id: &str, force| v1::DrainWorkerRequest {
        worker_id: worker_id.to_owned(),
        force,
        ..Default::default()
    };
    let turn = |worker_id: &str, role: Role, force| v1::SetWorkerRoleRequest {
        worker_id: worker_id.to_owned(),
        role: role.into(),
        force,
    };
    let generation_id = "0".repeat(32);
    let unknown = admin.explain(v1::ExplainRequest { generation_id }).await;
    told(&unknown.unwrap_err(), Code::NotFound, "UNKNOWN_GENERATION");

    let status = admin.drain_worker(drain("nobody", true)).await.unwrap_err();
    told(&status, Code::NotFound, "UNKNOWN_WORKER");
    let ask = turn("nobody", Role::Decode, true);
    let status = admin.set_worker_role(ask).await.unwrap_err();
    told(&status, Code::NotFound, "UNKNOWN_WORKER");

    let status = admin.drain_worker(drain(&worker_id, false)).await;
    told(
        &status.unwrap_err(),
        Code::FailedPrecondition,
        "EMPTIES_ROLE",
    );
    let ask = turn(&worker_id, Role::Decode, false);
    let status = admin.set_worker_role(ask).await.unwrap_err();
    told(&status, Code::FailedPrecondition, "EMPTIES_ROLE");

    let ask = turn(&worker_id, Role::Unspecified, true);
    let status = admin.set_worker_role(ask).await.unwrap_err();
    told(&status, Code::InvalidArgument, "INVALID_FIELD");

    let faults = mesh.workers[0].faults();
    faults.set(|plan| plan.refuse_calls_next = 2);
    let status = admin
        .drain_worker(drain(&worker_id, true))
        .await
        .unwrap_err();
    told(&status, Code::FailedPrecondition, "WORKER_REFUSED");
    assert!(status.message().contains("asked to refuse"), "{status}");
    let ask = turn(&worker_id, Role::Decode, true);
    let status = admin.set_worker_role(ask).await.unwrap_err();
    told(&status, Code::FailedPrecondition, "WORKER_REFUSED");
    // What is meant is done.
    let ask = turn(&worker_id, Role::Decode, true);
    admin.set_worker_role(ask).await.unwrap();
    admin.drain_worker(drain(&worker_id, true)).await.unwrap();
}
