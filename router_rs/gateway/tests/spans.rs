//! Requests as spans at a collector, over real sockets.
#![allow(missing_docs, clippy::unwrap_used)]

mod collector;
mod common;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use collector::{Away, Collector, SAMPLED, below, hex, int, text};
use common::{Mesh, call, h2_connection, read, request, with_key};
use kvmesh_testkit::{certificates::Authority, mock::MockConfig};
use kvmesh_wire::v1::{self, Role, Stage, generate_request::Input};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::Code;

const NOT_SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4737-00f067aa0ba902b8-00";

/// The span of the request itself.
fn root(spans: &[Span]) -> &Span {
    let mut roots = spans.iter().filter(|span| span.kind() == SpanKind::Server);
    let root = roots.next().unwrap();
    assert!(roots.next().is_none(), "one request has one");
    root
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_a_tree_of_spans_below_its_clients() {
    let of = |role| MockConfig {
        role,
        step: Duration::from_millis(2),
        prefill: Duration::from_millis(5),
        ..MockConfig::default()
    };
    let mut collector = Collector::start().await;
    let workers = vec![of(Role::Prefill), of(Role::Decode)];
    let mesh = Mesh::start(workers, json!({"otlp_endpoint": collector.address()})).await;
    mesh.wait_figure("kvmesh_sessions{state=\"live\"}", 2).await;
    let mut client = mesh.client().await;
    let asked = Instant::now();
    let answer = client.generate(below(SAMPLED, request(20))).await.unwrap();
    let (ids, finished) = read(answer.into_inner()).await;
    let (finished, took) = (finished.unwrap(), asked.elapsed());
    assert_eq!(ids.len(), 20);
    assert_eq!(finished.trace, [], "its client did not ask for a trace");

    let spans = collector.request().await;
    let root = root(&spans);
    assert_eq!(root.name, "kvmesh.v1.Inference/Generate");
    assert_eq!(hex(&root.trace_id), &SAMPLED[3..35]);
    assert_eq!(hex(&root.parent_span_id), &SAMPLED[36..52]);
    // Workers were told that trace, and the router's span as their parent.
    let passed = format!("00-{}-{}-01", hex(&root.trace_id), hex(&root.span_id));
    for (worker, stage) in mesh.workers.iter().zip([Stage::Prefill, Stage::Decode]) {
        let place = worker.last_place().unwrap();
        assert_eq!((place.stage(), place.traceparent), (stage, passed.clone()));
        assert!(place.trace, "spans are wanted");
    }
    let lasted = root.end_time_unix_nano - root.start_time_unix_nano;
    assert!(u128::from(lasted) <= took.as_nanos() && lasted > 0);
    let timings = finished.timings.unwrap();
    let usage = finished.usage.unwrap();
    let mut names = Vec::new();
    for span in spans.iter().filter(|span| span.span_id != root.span_id) {
        assert_eq!(span.trace_id, root.trace_id);
        assert_eq!(span.parent_span_id, root.span_id, "{}", span.name);
        assert_eq!(span.kind(), SpanKind::Internal);
        assert!(span.start_time_unix_nano >= root.start_time_unix_nano);
        assert!(span.end_time_unix_nano >= span.start_time_unix_nano);
        assert!(span.end_time_unix_nano <= root.end_time_unix_nano);
        names.push(span.name.as_str());
        match span.name.as_str() {
            "decode" => assert_eq!(int(span, "kvmesh.attempt"), 1),
            "prefill_chunk" => assert_eq!(int(span, "kvmesh.tokens"), 3),
            "longest_gap" => assert_eq!(text(span, "kvmesh.cause"), timings.longest_gap_cause),
            _ => {}
        }
    }
    names.sort_unstable();
    let mut wanted = vec![
        "decide",
        "decode",
        "prefill_chunk",
        "queue",
        "tokenize",
        "transfer",
    ];
    wanted.extend((timings.longest_gap_ms > 0.0).then_some("longest_gap"));
    wanted.sort_unstable();
    assert_eq!(names, wanted);
    assert_eq!(root.events.len(), 1);
    assert_eq!(root.events[0].name, "first_token");
    for (key, value) in [
        ("rpc.system", "grpc"),
        ("rpc.service", "kvmesh.v1.Inference"),
        ("rpc.method", "Generate"),
        ("gen_ai.operation.name", "text_completion"),
        ("gen_ai.request.model", "mock"),
        ("kvmesh.class", "standard"),
        ("kvmesh.decode_worker", mesh.workers[1].worker_id()),
    ] {
        assert_eq!(text(root, key), value, "{key}");
    }
    assert_eq!(text(root, "gen_ai.response.finish_reasons"), "length");
    for (key, value) in [
        ("rpc.grpc.status_code", 0),
        ("gen_ai.usage.input_tokens", usage.prompt_tokens),
        ("gen_ai.usage.output_tokens", usage.output_tokens),
        ("kvmesh.attempts", 1),
    ] {
        assert_eq!(int(root, key), i64::from(value), "{key}");
    }
    assert!(root.status.is_none());
    mesh.wait_figure("kvmesh_otlp_spans_exported_total", spans.len() as u64)
        .await;
    assert_eq!(mesh.figure("kvmesh_otlp_spans_dropped_total").await, 0);
}

/// Asks for a chat by HTTP; gives the answer with its head.
async fn chat(mesh: &Mesh, n: u32) -> String {
    let messages = json!([{"role": "user", "content": "Hello"}]);
    let body = json!({"messages": messages, "max_tokens": 4, "n": n}).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: router\r\nconnection: close\r\n\
         traceparent: {SAMPLED}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut socket = TcpStream::connect(mesh.address()).await.unwrap();
    socket.write_all((head + &body).as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_answer_of_a_call_has_a_span_below_the_calls() {
    let mut collector = Collector::start().await;
    let settings = json!({"otlp_endpoint": collector.address()});
    let mut mesh = Mesh::start(vec![MockConfig::default()], settings).await;
    let answer = chat(&mesh, 3).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    mesh.stop().await;
    let spans = collector.all();
    let root = root(&spans);
    assert_eq!(int(root, "kvmesh.answers"), 3);
    assert_eq!(int(root, "rpc.grpc.status_code"), 0);
    assert_eq!(hex(&root.parent_span_id), &SAMPLED[36..52]);
    let mut ids = BTreeSet::new();
    for answer in spans.iter().filter(|span| span.name == "answer") {
        assert_eq!(answer.parent_span_id, root.span_id);
        assert_eq!(answer.kind(), SpanKind::Internal);
        assert!(answer.end_time_unix_nano <= root.end_time_unix_nano);
        assert_eq!(int(answer, "gen_ai.usage.output_tokens"), 4);
        let below = spans
            .iter()
            .filter(|span| span.parent_span_id == answer.span_id);
        assert_eq!(below.filter(|span| span.name == "decode").count(), 1);
        ids.insert(text(answer, "gen_ai.response.id"));
    }
    assert_eq!(ids.len(), 3, "{spans:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_with_several_answers_fails_with_the_first_that_does() {
    let mut collector = Collector::start().await;
    let settings = json!({"otlp_endpoint": collector.address()});
    let mut mesh = Mesh::start(vec![MockConfig::default()], settings).await;
    mesh.workers[0].faults().set(|plan| {
        plan.fail_at = Some(0);
        plan.fail_next = 1;
        plan.fail_code = Code::Internal as u32;
    });
    let answer = chat(&mesh, 2).await;
    assert!(answer.starts_with("HTTP/1.1 500"), "{answer}");
    mesh.stop().await;
    let spans = collector.all();
    let root = root(&spans);
    assert_eq!(text(root, "error.type"), "WORKER_FAILED");
    assert_eq!(root.status.as_ref().unwrap().code(), StatusCode::Error);
    let answers = spans.iter().filter(|span| span.name == "answer");
    assert_eq!(answers.count(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_words_of_clients_or_workers_are_told() {
    let key = "the-key-of-a-tenant";
    let file = std::env::temp_dir().join(format!("kvmesh-spans-{:x}", rand::random::<u64>()));
    let digest = hex(&Sha256::digest(key));
    let tenant = format!("[tenants.one]\nkeys_sha256 = ['{digest}']\nsalt = 'tenant-salt'\n");
    std::fs::write(&file, tenant).unwrap();
    let mut collector = Collector::start().await;
    let settings = json!({"otlp_endpoint": collector.address(), "api_keys": file});
    let mesh = Mesh::start_for(key, vec![MockConfig::default()], settings).await;
    let mut client = mesh.client().await;
    let mut asked = request(40);
    asked.input = Some(Input::Chat(v1::Chat {
        messages: vec![v1::ChatMessage {
            role: "user".to_owned(),
            content: "a gooseberry in the prompt".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    }));
    asked.hints.get_or_insert_default().cache_salt = "client-salt".to_owned();
    asked.stopping.get_or_insert_default().stop = vec!["a-stop-string".to_owned()];
    let mut told = Vec::new();
    let mut answer = String::new();
    let mut stream = client
        .generate(with_key(key, asked.clone()))
        .await
        .unwrap()
        .into_inner();
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(v1::generate_response::Event::Tokens(tokens)) = message.event {
            answer.push_str(&tokens.text);
        }
    }
    let spans = collector.request().await;
    assert_eq!(text(root(&spans), "gen_ai.operation.name"), "chat");
    told.extend(spans);
    // A worker's own words about a failure, and a wrong field's value.
    mesh.workers[0].faults().set(|plan| {
        plan.fail_at = Some(0);
        plan.fail_next = 1;
        plan.fail_code = Code::Internal as u32;
    });
    let stream = client.generate(with_key(key, asked.clone())).await.unwrap();
    let failed = read(stream.into_inner()).await.1.unwrap_err();
    assert!(failed.message().contains("asked to fail"), "{failed}");
    let spans = collector.request().await;
    let failed = root(&spans);
    assert_eq!(text(failed, "error.type"), "WORKER_FAILED");
    let status = failed.status.as_ref().unwrap();
    assert_eq!(status.code(), StatusCode::Error);
    told.extend(spans);
    asked.model = "a-made-up-model".to_owned();
    let refused = client.generate(with_key(key, asked)).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let spans = collector.request().await;
    let refused = root(&spans);
    assert_eq!(int(refused, "rpc.grpc.status_code"), Code::NotFound as i64);
    assert_eq!(text(refused, "error.type"), "UNKNOWN_MODEL");
    assert_eq!(text(refused, "kvmesh.refused_at"), "validate");
    assert!(refused.status.is_none(), "no fault of the server");
    told.extend(spans);

    let bytes = collector.bytes();
    let holds = |word: &str| {
        let mut windows = bytes.windows(word.len());
        windows.any(|window| window == word.as_bytes())
    };
    assert!(
        holds("kvmesh.v1.Inference/Generate"),
        "what is there is found"
    );
    assert!(answer.len() > 40, "{answer}");
    // Of the answer any ten letters in a row.
    let letters: Vec<_> = answer.char_indices().map(|(at, _)| at).collect();
    for at in letters.windows(11) {
        assert!(!holds(&answer[at[0]..at[10]]), "{}", &answer[at[0]..]);
    }
    for word in [
        "gooseberry",
        "client-salt",
        "tenant-salt",
        "a-stop-string",
        "asked to fail",
        "a-made-up-model",
        key,
        &digest,
    ] {
        assert!(!holds(word), "{word} is told");
    }
    std::fs::remove_file(&file).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_told_of_what_is_not_sampled() {
    let mut collector = Collector::start().await;
    let settings = json!({
        "otlp_endpoint": collector.address(), "otlp_share": 0, "explain_traces": 0
    });
    let mut mesh = Mesh::start(vec![MockConfig::default()], settings).await;
    let mut client = mesh.client().await;
    for (parent, traced) in [(NOT_SAMPLED, false), (SAMPLED, true), (NOT_SAMPLED, false)] {
        let stream = client.generate(below(parent, request(3))).await.unwrap();
        assert_eq!(read(stream.into_inner()).await.0.len(), 3);
        let place = mesh.workers[0].last_place().unwrap();
        assert_eq!(place.trace, traced);
        assert_eq!(place.traceparent == parent, !traced);
    }
    // Without a parent it is a share of none.
    let stream = client.generate(request(3)).await.unwrap();
    read(stream.into_inner()).await.1.unwrap();
    // What was to be told is told before a router's end.
    mesh.stop().await;
    let spans = collector.all();
    assert_eq!(hex(&root(&spans).trace_id), &SAMPLED[3..35]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_told_where_no_collector_is_named() {
    let settings = json!({"explain_traces": 0});
    let mesh = Mesh::start(vec![MockConfig::default()], settings).await;
    let mut client = mesh.client().await;
    let stream = client.generate(below(SAMPLED, request(3))).await.unwrap();
    read(stream.into_inner()).await.1.unwrap();
    let place = mesh.workers[0].last_place().unwrap();
    assert_eq!(place.traceparent, SAMPLED);
    assert!(!place.trace);
    for series in ["kvmesh_otlp_spans_exported", "kvmesh_otlp_spans_dropped"] {
        assert_eq!(mesh.figure(&format!("{series}_total")).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_that_its_client_asked_for_is_told_to_both() {
    let mut collector = Collector::start().await;
    let settings = json!({"otlp_endpoint": collector.address()});
    let mesh = Mesh::start(vec![MockConfig::default()], settings).await;
    let mut asked = request(5);
    asked.output.get_or_insert_default().trace = true;
    let stream = mesh.client().await.generate(asked).await.unwrap();
    let finished = read(stream.into_inner()).await.1.unwrap();
    let spans = collector.request().await;
    let root = root(&spans);
    assert!(root.parent_span_id.is_empty(), "its client named no parent");
    for row in &finished.trace {
        let told = spans.iter().find(|span| span.name == row.name).unwrap();
        let start = told.start_time_unix_nano - root.start_time_unix_nano;
        let off = start as f64 / 1e6 - row.start_ms;
        // Both are the same row; a nanosecond is lost in rounding.
        assert!(off.abs() < 1e-5 && row.start_ms >= 0.0, "{row:?} {off}");
    }
    assert!(finished.trace.iter().any(|row| row.name == "decode"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_away_costs_drops_and_no_stream() {
    let away = Away::start().await;
    let settings = json!({"otlp_endpoint": away.address()});
    let mesh = Mesh::start(vec![MockConfig::default()], settings).await;
    let mut client = mesh.client().await;
    let mut answer = async || {
        let stream = client.generate(request(10)).await.unwrap().into_inner();
        let (ids, end) = read(stream).await;
        assert_eq!((ids.len(), end.unwrap().trace.len()), (10, 0));
    };
    for _ in 0..20 {
        answer().await;
    }
    let dropped = "kvmesh_otlp_spans_dropped_total";
    let until = Instant::now() + Duration::from_secs(60);
    while mesh.figure(dropped).await == 0 {
        assert!(Instant::now() < until, "no span is counted as dropped");
        tokio::task::yield_now().await;
    }
    // Once it is there, it is told.
    let mut collector = away.come().await;
    answer().await;
    assert!(!collector.request().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_does_not_answer_holds_no_stream_up() {
    let mut collector = Collector::start().await;
    let unanswered = collector.hold();
    let settings = json!({"otlp_endpoint": collector.address()});
    let mut mesh = Mesh::start(vec![MockConfig::default()], settings).await;
    let mut client = mesh.client().await;
    let mut answer = async || {
        let stream = client.generate(request(10)).await.unwrap().into_inner();
        assert_eq!(read(stream).await.0.len(), 10);
    };
    answer().await;
    collector.request().await;
    for _ in 0..50 {
        answer().await;
    }
    let told = mesh.figure("kvmesh_otlp_spans_exported_total").await;
    assert_eq!(told, 0, "nothing was answered meanwhile");
    // Nor does it hold up the router's end.
    mesh.stop().await;
    drop(unanswered);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_end_with_the_router_or_their_client_are_told() {
    let slow = MockConfig {
        step: Duration::from_millis(5),
        ..MockConfig::default()
    };
    let mut collector = Collector::start().await;
    let settings = json!({"otlp_endpoint": collector.address(), "grace": "50ms"});
    let mut mesh = Mesh::start(vec![slow], settings).await;
    let mut client = mesh.client().await;
    let left = client.generate(request(100_000)).await.unwrap();
    drop(left);
    let spans = collector.request().await;
    assert_eq!(text(root(&spans), "error.type"), "CANCELLED");
    assert!(root(&spans).status.is_none(), "no fault of the server");
    let stream = client.generate(request(100_000)).await.unwrap();
    let reader = tokio::spawn(read(stream.into_inner()));
    mesh.stop().await;
    assert_eq!(
        reader.await.unwrap().1.unwrap_err().code(),
        Code::Unavailable
    );
    let spans = collector.all();
    let last = root(&spans);
    assert_eq!(text(last, "error.type"), "SHUTTING_DOWN");
    assert_eq!(last.status.as_ref().unwrap().code(), StatusCode::Error);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_whose_deadline_passes_before_its_message_is_there_is_told() {
    let mut collector = Collector::start().await;
    let settings = json!({"otlp_endpoint": collector.address()});
    let mesh = Mesh::start(vec![MockConfig::default()], settings).await;
    let mut head = call();
    let timeout = "50m".parse().unwrap();
    head.headers_mut().insert("grpc-timeout", timeout);
    let mut sender = h2_connection(&mesh).await.ready().await.unwrap();
    // Its message never comes.
    let (answer, _body) = sender.send_request(head, false).unwrap();
    let code = Code::DeadlineExceeded as i32;
    let answer = answer.await.unwrap();
    assert_eq!(answer.headers()["grpc-status"], code.to_string());
    let spans = collector.request().await;
    assert_eq!(spans.len(), 1, "there is no generation");
    let told = root(&spans);
    assert_eq!(int(told, "rpc.grpc.status_code"), i64::from(code));
    assert_eq!(text(told, "error.type"), "DEADLINE_EXCEEDED");
    assert_eq!(told.status.as_ref().unwrap().code(), StatusCode::Error);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_go_over_tls_to_a_collector_that_its_authority_knows() {
    let folder = std::env::temp_dir().join(format!("kvmesh-otlp-{:x}", rand::random::<u64>()));
    std::fs::create_dir(&folder).unwrap();
    let ours = Authority::new("ours").unwrap();
    let mut collector = Collector::start_secured(&ours.issue(&["127.0.0.1"]).unwrap()).await;
    let ca = folder.join("ca.pem");
    std::fs::write(&ca, Authority::new("another").unwrap().pem()).unwrap();
    let settings = json!({
        "otlp_endpoint": format!("https://{}", collector.address()),
        "otlp_ca": ca,
        "otlp_headers": "authorization=Bearer%20of-this-test,x-scope=one",
    });
    let mesh = Mesh::start(vec![MockConfig::default()], settings).await;
    let mut client = mesh.client().await;
    // Of another authority: nothing is told.
    let stream = client.generate(request(3)).await.unwrap();
    read(stream.into_inner()).await.1.unwrap();
    while mesh.figure("kvmesh_otlp_spans_dropped_total").await == 0 {
        tokio::task::yield_now().await;
    }
    assert!(collector.all().is_empty());
    assert_eq!(collector.header("authorization"), None);
    // The file changes, and the next batch but some is told.
    std::fs::write(&ca, ours.pem()).unwrap();
    while mesh.figure("kvmesh_otlp_spans_exported_total").await == 0 {
        let stream = client.generate(request(3)).await.unwrap();
        read(stream.into_inner()).await.1.unwrap();
    }
    assert!(!collector.all().is_empty());
    let shown = collector.header("authorization");
    assert_eq!(shown.as_deref(), Some("Bearer of-this-test"));
    assert_eq!(collector.header("x-scope").as_deref(), Some("one"));
    std::fs::remove_dir_all(&folder).unwrap();
}
