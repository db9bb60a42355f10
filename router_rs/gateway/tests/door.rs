//! The door over real sockets: what passes, and the status of what does not.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{Mesh, call, framed, h2_connection, narrow, read, request, spend_budget};
use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::v1::{self, Role, Stage, generate_request::Input, generate_response::Event};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, Status, codec::CompressionEncoding};
use tonic_types::StatusExt;

fn reason(status: &Status) -> String {
    let info = status
        .get_details_error_info()
        .expect("every status carries ErrorInfo");
    assert_eq!(info.domain, "kvmesh");
    info.reason
}

type Change = fn(&mut v1::GenerateRequest);

fn sampling(request: &mut v1::GenerateRequest) -> &mut v1::Sampling {
    request.sampling.get_or_insert_default()
}

/// (what is wrong, code, reason, field named)
fn rows() -> Vec<(Change, Code, &'static str, &'static str)> {
    let invalid = Code::InvalidArgument;
    let field = "INVALID_FIELD";
    vec![
        (|r| r.input = None, invalid, field, "input"),
        (
            |r| r.input = Some(Input::Prompt(String::new())),
            invalid,
            field,
            "prompt",
        ),
        (
            |r| r.input = Some(Input::TokenIds(v1::TokenIds { ids: vec![] })),
            invalid,
            field,
            "token_ids.ids",
        ),
        (
            |r| {
                r.input = Some(Input::TokenIds(v1::TokenIds {
                    ids: vec![1, u32::MAX],
                }))
            },
            invalid,
            field,
            "token_ids.ids[1]",
        ),
        (
            |r| r.input = Some(Input::Chat(v1::Chat::default())),
            invalid,
            field,
            "chat.messages",
        ),
        (
            |r| sampling(r).temperature = Some(f32::NAN),
            invalid,
            field,
            "sampling.temperature",
        ),
        (
            |r| sampling(r).temperature = Some(-1.0),
            invalid,
            field,
            "sampling.temperature",
        ),
        (
            |r| sampling(r).top_p = Some(0.0),
            invalid,
            field,
            "sampling.top_p",
        ),
        (
            |r| sampling(r).min_p = f32::NEG_INFINITY,
            invalid,
            field,
            "sampling.min_p",
        ),
        (
            |r| sampling(r).repetition_penalty = Some(11.0),
            invalid,
            field,
            "sampling.repetition_penalty",
        ),
        (
            |r| r.stopping.get_or_insert_default().stop = vec!["x".to_owned(); 1_000],
            invalid,
            field,
            "stopping.stop",
        ),
        (
            |r| r.stopping.get_or_insert_default().stop = vec![String::new()],
            invalid,
            field,
            "stopping.stop[0]",
        ),
        (
            |r| r.stopping.get_or_insert_default().max_tokens = u32::MAX,
            invalid,
            field,
            "stopping.max_tokens",
        ),
        (
            |r| r.hints.get_or_insert_default().request_class = 99,
            invalid,
            field,
            "hints.request_class",
        ),
        (
            |r| r.hints.get_or_insert_default().cache_salt = "x".repeat(257),
            invalid,
            field,
            "hints.cache_salt",
        ),
        (
            |r| {
                let most = r.stopping.get_or_insert_default().max_tokens;
                r.hints.get_or_insert_default().expected_output_tokens = most + 1;
            },
            invalid,
            field,
            "hints.expected_output_tokens",
        ),
        (|r| r.adapter = "none".to_owned(), invalid, field, "adapter"),
        (|r| r.n = 2, Code::Unimplemented, "UNSUPPORTED", "n"),
        (
            |r| r.continue_from.get_or_insert_default().token_ids = vec![u32::MAX],
            invalid,
            field,
            "continue_from.token_ids[0]",
        ),
        (
            |r| r.model = "nobody".to_owned(),
            Code::NotFound,
            "UNKNOWN_MODEL",
            "",
        ),
        // 10 MB: read, refused by the bound on tokens.
        (
            |r| r.input = Some(Input::Prompt("a".repeat(10 << 20))),
            invalid,
            field,
            "prompt",
        ),
        // 20 MB: refused by its length prefix.
        (
            |r| r.input = Some(Input::Prompt("a".repeat(20 << 20))),
            Code::ResourceExhausted,
            "MESSAGE_TOO_LARGE",
            "",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refusal_has_the_status_of_the_table() {
    let small = MockConfig {
        context_length: 4_096,
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![small], json!({})).await;
    let mut client = mesh.client().await;
    for (at, (change, code, expected, field)) in rows().into_iter().enumerate() {
        let mut asked = request(4);
        change(&mut asked);
        let status = client
            .generate(asked)
            .await
            .map(|_| ())
            .expect_err(&format!("row {at}"));
        assert_eq!(status.code(), code, "row {at}: {status}");
        assert_eq!(reason(&status), expected, "row {at}");
        if !field.is_empty() {
            let violations = status.get_details_bad_request().unwrap().field_violations;
            assert_eq!(violations[0].field, field, "row {at}");
        }
        assert!(
            status.get_details_retry_info().is_none(),
            "row {at}: trying again would not help"
        );
    }
    let resume = client
        .resume(v1::ResumeRequest::default())
        .await
        .map(|_| ())
        .unwrap_err();
    assert_eq!(
        (resume.code(), reason(&resume).as_str()),
        (Code::NotFound, "UNKNOWN_GENERATION")
    );
    // After all that a good request still passes.
    let (ids, end) = read(client.generate(request(4)).await.unwrap().into_inner()).await;
    assert_eq!(ids.len(), 4);
    assert_eq!(end.unwrap().reason(), v1::FinishReason::Length);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_worker_its_failure_a_takeover_and_the_deadline_have_their_statuses() {
    let mesh = Mesh::start(
        vec![MockConfig {
            step: Duration::from_millis(5),
            ..MockConfig::default()
        }],
        json!({}),
    )
    .await;
    let mut client = mesh.client().await;
    mesh.workers[0].faults().set(|plan| {
        plan.fail_at = Some(3);
        plan.fail_next = 1;
        plan.fail_code = 9;
    });
    let (ids, end) = read(client.generate(request(50)).await.unwrap().into_inner()).await;
    let status = end.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.metadata["next_index"], ids.len().to_string());

    let mut late = tonic::Request::new(request(100_000));
    late.metadata_mut()
        .insert("grpc-timeout", "2S".parse().unwrap());
    let (ids, end) = read(client.generate(late).await.unwrap().into_inner()).await;
    let status = end.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    if let Some(info) = status.get_details_error_info() {
        assert_eq!(info.metadata["next_index"], ids.len().to_string());
    }

    // Given back after tokens, and then another router's.
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
                if plan.hold_at.take().is_some() {
                    plan.refuse_next = 1;
                    plan.refuse_reason = v1::RefusalReason::TakenOver;
                }
            });
        }
    };
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Aborted, "TAKEN_OVER")
    );
    let info = status.get_details_error_info().unwrap();
    assert!(next > 0);
    assert_eq!(info.metadata["next_index"], next.to_string());

    let nobody = Mesh::start(vec![], json!({})).await;
    let status = nobody
        .client()
        .await
        .generate(request(1))
        .await
        .map(|_| ())
        .unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unavailable, "NO_WORKER")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_says_when_to_come_back_in_both_of_grpcs_ways() {
    // Room for one prompt of 32 tokens at a time.
    let small = MockConfig {
        pool_blocks: 8,
        step: Duration::from_millis(1),
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![small], json!({ "queue_length": 1 })).await;
    let mut client = mesh.client().await;
    // Prompts of their own: a shared prefix would need no room of its own.
    let of = |token, max_tokens| v1::GenerateRequest {
        input: Some(Input::TokenIds(v1::TokenIds {
            ids: vec![token; 32],
        })),
        ..request(max_tokens)
    };
    let mut running = client.generate(of(1, 100_000)).await.unwrap().into_inner();
    loop {
        let event = running.message().await.unwrap().unwrap().event;
        if matches!(event, Some(Event::Tokens(_))) {
            break;
        }
    }
    // Admitted is what has its headers: the one that waits is in the queue then.
    let _waiting = client.generate(of(2, 5)).await.unwrap();
    let status = client.generate(of(3, 5)).await.map(|_| ()).unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::ResourceExhausted, "OVERLOADED")
    );
    let wait = status
        .get_details_retry_info()
        .unwrap()
        .retry_delay
        .unwrap();
    assert!(!wait.is_zero());
    let pushback = status.metadata().get("grpc-retry-pushback-ms").unwrap();
    assert_eq!(pushback.to_str().unwrap(), wait.as_millis().to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_over_the_largest_pool_is_refused_with_what_that_holds() {
    let small = MockConfig {
        pool_blocks: 8,
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![small], json!({})).await;
    let long = v1::GenerateRequest {
        input: Some(Input::TokenIds(v1::TokenIds { ids: vec![5; 200] })),
        ..request(1)
    };
    let status = mesh.client().await.generate(long).await.map(|_| ());
    let status = status.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::InvalidArgument, "PROMPT_TOO_LONG")
    );
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.metadata["limit"], "128");
    let violations = status.get_details_bad_request().unwrap().field_violations;
    assert_eq!(violations[0].field, "prompt");
    assert!(status.get_details_retry_info().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spent_budget_for_bytes_says_when_to_come_back() {
    let mesh = Mesh::start(vec![MockConfig::default()], narrow()).await;
    let mut held = spend_budget(&mesh).await;
    let mut client = mesh.client().await;
    let status = client.generate(request(1)).await.map(|_| ()).unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::ResourceExhausted, "OVERLOADED")
    );
    let told = status.get_details_retry_info().unwrap().retry_delay;
    assert!(!told.unwrap().is_zero());
    let step = "kvmesh_rejected_total{step=\"permit\",reason=\"OVERLOADED\"}";
    assert_eq!(mesh.figure(step).await, 1);
    // What was held is free when its client goes.
    held.send_reset(h2::Reason::CANCEL);
    mesh.wait_figure("kvmesh_request_bytes_held", 0).await;
    assert_eq!(
        read(client.generate(request(4)).await.unwrap().into_inner())
            .await
            .0
            .len(),
        4
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_over_the_limit_is_closed_and_counted() {
    const MOST: usize = 3;
    let mesh = Mesh::start(
        vec![MockConfig::default()],
        json!({"max_connections": MOST}),
    )
    .await;
    // Those of the start may still be on their way out.
    let mut held = Vec::new();
    while held.len() < MOST {
        if let Some(connection) = answered(&mesh).await {
            held.push(connection);
        }
    }
    let limit = "kvmesh_rejected_total{step=\"connection\",reason=\"LIMIT\"}";
    let before = metric(&mut held[0], limit).await;
    assert!(answered(&mesh).await.is_none());
    assert_eq!(metric(&mut held[0], limit).await, before + 1);
    // One that goes makes room.
    held.pop();
    while answered(&mesh).await.is_none() {
        tokio::task::yield_now().await;
    }
}

type Connection = h2::client::SendRequest<Bytes>;

/// A connection that has had an answer; `None` where it was closed instead.
async fn answered(mesh: &Mesh) -> Option<Connection> {
    let socket = TcpStream::connect(mesh.address()).await.unwrap();
    let (sender, connection) = h2::client::handshake(socket).await.ok()?;
    tokio::spawn(connection);
    let mut sender = sender.ready().await.ok()?;
    plain(&mut sender, "/health").await?;
    Some(sender)
}

/// What a path answers over HTTP/2.
async fn plain(connection: &mut Connection, path: &str) -> Option<String> {
    let ask = http::Request::get(format!("http://router{path}"))
        .body(())
        .unwrap();
    let (response, _) = connection.send_request(ask, true).ok()?;
    let mut body = response.await.ok()?.into_body();
    let mut text = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.ok()?;
        body.flow_control().release_capacity(data.len()).unwrap();
        text.extend_from_slice(&data);
    }
    String::from_utf8(text).ok()
}

/// A figure of `/metrics`, 0 where it is not there.
async fn metric(connection: &mut Connection, series: &str) -> u64 {
    let text = plain(connection, "/metrics").await.unwrap();
    let line = text.lines().find(|line| line.starts_with(series));
    line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_of_a_call_come_back_and_gzip_is_taken() {
    let mesh = Mesh::start(vec![MockConfig::default()], json!({})).await;
    let mut client = mesh
        .client()
        .await
        .send_compressed(CompressionEncoding::Gzip);
    let mut named = tonic::Request::new(request(2));
    named
        .metadata_mut()
        .insert("x-request-id", "mine".parse().unwrap());
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    named
        .metadata_mut()
        .insert("traceparent", trace.parse().unwrap());
    let answer = client.generate(named).await.unwrap();
    assert_eq!(answer.metadata().get("x-request-id").unwrap(), "mine");
    assert_eq!(answer.metadata().get("traceparent").unwrap(), trace);
    assert_eq!(read(answer.into_inner()).await.0.len(), 2);
    // 20 MB of one letter are a few KiB packed: refused while inflating.
    let mut bomb = request(1);
    bomb.input = Some(Input::Prompt("a".repeat(20 << 20)));
    let status = client.generate(bomb).await.map(|_| ()).unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::ResourceExhausted, "MESSAGE_TOO_LARGE")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_and_context_of_a_call_reach_the_workers_of_both_stages() {
    let of = |role| MockConfig {
        role,
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![of(Role::Prefill), of(Role::Decode)], json!({})).await;
    // Ready is who has either: a stage alone would be computed by the other.
    mesh.wait_figure("kvmesh_sessions{state=\"live\"}", 2).await;
    let names = [
        ("x-request-id", "mine"),
        (
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ),
        ("tracestate", "vendor=1"),
        ("baggage", "user=2"),
    ];
    let mut named = tonic::Request::new(request(2));
    for (name, value) in names {
        named.metadata_mut().insert(name, value.parse().unwrap());
    }
    let mut client = mesh.client().await;
    let answer = client.generate(named).await.unwrap();
    assert_eq!(read(answer.into_inner()).await.0.len(), 2);
    for (worker, stage) in mesh.workers.iter().zip([Stage::Prefill, Stage::Decode]) {
        let place = worker.last_place().unwrap();
        assert_eq!(place.stage(), stage);
        let told = [
            place.request_id,
            place.traceparent,
            place.tracestate,
            place.baggage,
        ];
        assert_eq!(told, names.map(|(_, value)| value));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_router_needs_of_a_resumable_request_is_left_at_both_workers() {
    let of = |role| MockConfig {
        role,
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![of(Role::Prefill), of(Role::Decode)], json!({})).await;
    // Ready is who has either: a stage alone would be computed by the other.
    mesh.wait_figure("kvmesh_sessions{state=\"live\"}", 2).await;
    let mut client = mesh.client().await;
    let mut asked = request(2);
    asked.hints = Some(v1::Hints {
        resumable: true,
        ..Default::default()
    });
    asked.sampling = Some(v1::Sampling {
        seed: Some(11),
        ..Default::default()
    });
    asked.stopping.get_or_insert_default().stop = vec!["never said".to_owned()];
    let mut named = tonic::Request::new(asked);
    let name = "mine".parse().unwrap();
    named.metadata_mut().insert("x-request-id", name);
    let answer = client.generate(named).await.unwrap();
    assert_eq!(read(answer.into_inner()).await.0.len(), 2);
    let mut tenants = Vec::new();
    for worker in &mesh.workers {
        let place = worker.last_place().unwrap();
        let state: v1::ResumeState = prost::Message::decode(place.resume_state).unwrap();
        let from = state.continuation.unwrap();
        assert_eq!(from.prompt_ids, [5, 6, 7]);
        let sampling = from.sampling.unwrap();
        assert_eq!((sampling.seed, sampling.seed_given), (11, true));
        assert_eq!((from.model.as_str(), from.max_tokens), ("mock", 2));
        assert_eq!(state.text.unwrap().stop, ["never said"]);
        assert_eq!(state.request_id, "mine");
        tenants.push(place.tenant);
    }
    // Without keys a tenant is an address: both streams come from one.
    assert!(!tenants[0].is_empty());
    let answer = client.generate(request(2)).await.unwrap();
    assert_eq!(read(answer.into_inner()).await.0.len(), 2);
    for worker in &mesh.workers {
        let place = worker.last_place().unwrap();
        assert!(place.resume_state.is_empty(), "nobody asked for it");
        tenants.push(place.tenant);
    }
    tenants.dedup();
    assert_eq!(tenants.len(), 1, "{tenants:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_message_is_refused_by_its_prefix_alone() {
    let mesh = Mesh::start(vec![MockConfig::default()], json!({})).await;
    let mut sender = h2_connection(&mesh).await.ready().await.unwrap();
    let (response, mut body) = sender.send_request(call(), false).unwrap();
    let mut prefix = vec![0];
    prefix.extend((20u32 << 20).to_be_bytes());
    body.send_data(prefix.into(), false).unwrap();
    // No byte of the body is ever sent.
    let response = response.await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "8");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_that_is_not_utf8_is_malformed() {
    let mesh = Mesh::start(vec![MockConfig::default()], json!({})).await;
    let mut sender = h2_connection(&mesh).await.ready().await.unwrap();
    let (response, mut body) = sender.send_request(call(), false).unwrap();
    // Field 2 (prompt), 2 bytes that are no UTF-8.
    body.send_data(
        Bytes::from_static(&[0, 0, 0, 0, 4, 0x12, 2, 0xff, 0xfe]),
        true,
    )
    .unwrap();
    assert_eq!(response.await.unwrap().headers()["grpc-status"], "3");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_half_requests_harm_nobody() {
    let settings = json!({"request_read_timeout": "200ms", "handshake_timeout": "200ms"});
    let mesh = Mesh::start(vec![MockConfig::default()], settings).await;
    let garbage: [&[u8]; 4] = [
        b"\x00\xff\x13garbage\r\n\r\n",
        b"PRI",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nrubbish rubbish",
        b"GET / HT",
    ];
    for bytes in garbage {
        let mut socket = TcpStream::connect(mesh.address()).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        let mut rest = Vec::new();
        // The router ends it; how is its own affair.
        let _ = socket.read_to_end(&mut rest).await;
    }
    let mut sender = h2_connection(&mesh).await.ready().await.unwrap();
    let (response, mut body) = sender.send_request(call(), false).unwrap();
    body.send_data(framed(&request(1)).slice(..7), false)
        .unwrap();
    assert_eq!(response.await.unwrap().headers()["grpc-status"], "3");
    let mut client = mesh.client().await;
    assert_eq!(
        read(client.generate(request(3)).await.unwrap().into_inner())
            .await
            .0
            .len(),
        3
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rapid_reset_leaves_the_other_streams_alone() {
    let config = MockConfig {
        step: Duration::from_millis(1),
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![config], json!({})).await;
    let mut sender = h2_connection(&mesh).await;
    let mut kept = Vec::new();
    for at in 0..5_100 {
        sender = sender.ready().await.unwrap();
        let (response, mut body) = sender.send_request(call(), false).unwrap();
        body.send_data(framed(&request(20)), true).unwrap();
        if at % 51 == 0 {
            kept.push(tokio::spawn(status(response)));
        } else {
            body.send_reset(h2::Reason::CANCEL);
        }
    }
    assert_eq!(kept.len(), 100);
    for status in kept {
        assert_eq!(status.await.unwrap(), "0");
    }
}

/// Reads an answer as it comes: h2's client gives a connection up that has many
/// small frames unread. Gives the status with its message.
async fn status(response: h2::client::ResponseFuture) -> String {
    let told = |of: &http::HeaderMap| {
        let text = |name| Some(of.get(name)?.to_str().unwrap().to_owned());
        let status = text("grpc-status")?;
        Some(status + &text("grpc-message").unwrap_or_default())
    };
    let answer = response.await.expect("the connection stands");
    // A refusal may be headers alone.
    if let Some(status) = told(answer.headers()) {
        return status;
    }
    let mut body = answer.into_body();
    while let Some(data) = body.data().await {
        let length = data.unwrap().len();
        body.flow_control().release_capacity(length).unwrap();
    }
    told(&body.trailers().await.unwrap().unwrap()).unwrap()
}
