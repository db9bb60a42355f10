//! Clients that go, that do not read, and that wait in silence.

use std::time::Duration;

use kvmesh_testkit::mock::MockConfig;
use serde_json::{Value, json};

use crate::{
    common::Mesh,
    http1::{CHAT, COMPLETIONS, Http1, post, said},
};

const HOUR: Duration = Duration::from_secs(3_600);

fn chat(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100_000, "stream": stream})
}

/// Nothing of any request is left.
async fn all_gone(mesh: &Mesh) {
    for series in [
        "kvmesh_open_streams",
        "kvmesh_open_attempts",
        "kvmesh_undelivered_ids",
        "kvmesh_bookings",
    ] {
        mesh.wait_figure(series, 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_goes_before_the_first_token_is_cancelled_at_once() {
    let mesh = Mesh::start(vec![MockConfig::default()], json!({})).await;
    mesh.workers[0]
        .faults()
        .set(|plan| plan.delay_first_token = HOUR);
    for (number, stream) in [false, true].into_iter().enumerate() {
        let mut connection = Http1::connect(&mesh).await;
        connection.post(CHAT, &[], &chat(stream)).await;
        mesh.wait_figure("kvmesh_open_attempts", 1).await;
        drop(connection);
        all_gone(&mesh).await;
        let cancelled = "kvmesh_calls_total{method=\"chat.completions\",outcome=\"CANCELLED\"}";
        mesh.wait_figure(cancelled, number as u64 + 1).await;
    }
    let counters = mesh.workers[0]
        .wait_for(Duration::from_secs(60), |counters| counters.cancelled == 2)
        .await;
    assert_eq!(counters.cancelled, 2, "{counters:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_goes_in_the_middle_of_an_answer_is_cancelled_at_once() {
    let paced = MockConfig {
        step: Duration::from_millis(1),
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![paced], json!({})).await;
    for body in [chat(true), {
        let mut several = chat(true);
        several["n"] = json!(3);
        several
    }] {
        let mut connection = Http1::connect(&mesh).await;
        connection.post(CHAT, &[], &body).await;
        assert_eq!(connection.head().await.status, 200);
        assert!(connection.chunk().await.unwrap().starts_with("data: "));
        drop(connection);
        all_gone(&mesh).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_reads_loses_the_connection_and_holds_nothing() {
    let slow = json!({"slow_client_timeout": "300ms"});
    let worker = MockConfig {
        max_logprobs: 20,
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![worker], slow).await;
    let mut connection = Http1::connect(&mesh).await;
    // Some 100 MB: text alone comes in few events where the router is late, and then all of
    // it has room in the sockets.
    let mut body = chat(true);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(20);
    connection.post(CHAT, &[], &body).await;
    mesh.wait_figure("kvmesh_slow_clients_total", 1).await;
    all_gone(&mesh).await;
    // This one looks at the figures.
    mesh.wait_figure("kvmesh_connections", 1).await;
    // What was on its way is there to be read. It is cut off; where the socket had
    // room for a word more, that is the error.
    assert_eq!(connection.head().await.status, 200);
    let mut read = String::new();
    while let Some(chunk) = connection.chunk().await {
        if chunk.is_empty() {
            assert!(read.contains("\"code\":\"slow_client\""), "{read}");
            break;
        }
        read.push_str(&chunk);
    }
    assert!(!read.contains("[DONE]"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_has_ended_waits_for_no_client_while_others_run() {
    let paced = MockConfig {
        step: Duration::from_millis(1),
        ..MockConfig::default()
    };
    // Clients are looked at once a second: the second answer takes longer than the timeout and
    // some of those. Who reads it has time for that, on a busy machine too.
    let mesh = Mesh::start(vec![paced], json!({"slow_client_timeout": "2s"})).await;
    let (short, long, tokens) = ([5, 6, 7], [9, 8], 5_000);
    let made = mesh.workers[0].tokens();
    let (stop, answer) = (
        made.expected_text(&short, 3),
        made.expected_text(&long, tokens),
    );
    assert!(!answer.contains(&stop));
    let body = json!({"prompt": [short, long], "max_tokens": tokens, "stream": true,
        "stop": stop});
    let events = post(&mesh, COMPLETIONS, &body).await.events();
    assert_eq!(said(&events, 0), "");
    assert_eq!(said(&events, 1), answer);
    all_gone(&mesh).await;
    mesh.wait_figure("kvmesh_slow_clients_total", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_prefill_gives_signs_of_life() {
    let mesh = Mesh::start(
        vec![MockConfig::default()],
        json!({"sse_keep_alive": "20ms"}),
    )
    .await;
    mesh.workers[0]
        .faults()
        .set(|plan| plan.delay_first_token = HOUR);
    let mut connection = Http1::connect(&mesh).await;
    connection.post(CHAT, &[], &chat(true)).await;
    assert_eq!(connection.head().await.status, 200);
    for _ in 0..3 {
        assert_eq!(connection.chunk().await.unwrap(), ": keep-alive\n\n");
    }
    drop(connection);
    // Signs of life are no events, and what is whole has none.
    let delay = Duration::from_millis(100);
    mesh.workers[0]
        .faults()
        .set(|plan| plan.delay_first_token = delay);
    for stream in [false, true] {
        let body = json!({"prompt": [5], "max_tokens": 1, "stream": stream});
        let answer = post(&mesh, COMPLETIONS, &body).await;
        match stream {
            false => assert_eq!(answer.json()["usage"]["completion_tokens"], 1),
            true => assert_eq!(answer.events().len(), 2),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_is_kept_for_the_next_call() {
    let mesh = Mesh::start(vec![MockConfig::default()], json!({})).await;
    let mut connection = Http1::connect(&mesh).await;
    for stream in [true, false, true] {
        let body = json!({"prompt": [5, 6], "max_tokens": 3, "stream": stream});
        connection.post(COMPLETIONS, &[], &body).await;
        assert_eq!(connection.answer().await.head.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_may_pause_for_longer_than_its_first_call_may_take() {
    let worker = || vec![MockConfig::default()];
    let mesh = Mesh::start(worker(), json!({"handshake_timeout": "100ms"})).await;
    let body = json!({"prompt": [5, 6], "max_tokens": 3});
    let mut kept = Http1::connect(&mesh).await;
    kept.post(COMPLETIONS, &[], &body).await;
    assert_eq!(kept.answer().await.head.status, 200);
    // Once these are closed, that time has passed for the other one, too.
    for half in ["", "POST /v1/completions HTTP/1.1\r\nhost: ro"] {
        let mut silent = Http1::connect(&mesh).await;
        silent.send(half, b"").await;
        silent.closed().await;
    }
    kept.post(COMPLETIONS, &[], &body).await;
    assert_eq!(kept.answer().await.head.status, 200);
    // And a pause has an end of its own.
    let settings = json!({"handshake_timeout": "1h", "http1_idle_timeout": "500ms"});
    let mesh = Mesh::start(worker(), settings).await;
    let mut idle = Http1::connect(&mesh).await;
    idle.post(COMPLETIONS, &[], &body).await;
    assert_eq!(idle.answer().await.head.status, 200);
    idle.closed().await;
}
