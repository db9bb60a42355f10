//! What is refused and what fails: OpenAI's shape, with the status that gRPC's
//! has in HTTP.

use std::time::Duration;

use kvmesh_testkit::mock::MockConfig;
use serde_json::{Value, json};

use crate::{
    common::{
        Mesh,
        keys::{KeyFile, tenant},
        narrow,
    },
    http1::{CHAT, COMPLETIONS, Http1, ask, events, post},
};

fn named(param: &str) -> Value {
    json!(param)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_refusal_has_its_status_its_code_and_its_field() {
    let small = MockConfig {
        context_length: 64,
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![small], json!({})).await;
    let messages = json!([{"role": "user", "content": "hi"}]);
    let tool = json!([{"type": "function", "function": {"name": "f"}}]);
    let invalid = "invalid_field";
    let lacks = "unsupported_parameter";
    let too_long = "context_length_exceeded";
    let long = json!([{"role": "user", "content": "x ".repeat(70)}]);
    for (path, body, code, param) in [
        (
            COMPLETIONS,
            json!({"prompt": "x", "temperature": -1}),
            invalid,
            "temperature",
        ),
        (
            COMPLETIONS,
            json!({"prompt": "x", "temperature": "hot"}),
            invalid,
            "temperature",
        ),
        (COMPLETIONS, json!({"prompt": ""}), invalid, "prompt"),
        (
            COMPLETIONS,
            json!({"prompt": [1, 9_000_000]}),
            invalid,
            "prompt[1]",
        ),
        (
            COMPLETIONS,
            json!({"prompt": vec![5; 64]}),
            too_long,
            "prompt",
        ),
        (
            COMPLETIONS,
            json!({"prompt": "x", "max_tokens": 64}),
            too_long,
            "max_tokens",
        ),
        (
            COMPLETIONS,
            json!({"prompt": "x", "stop": [""]}),
            invalid,
            "stop[0]",
        ),
        (
            COMPLETIONS,
            json!({"prompt": "x", "logprobs": 1}),
            lacks,
            "logprobs",
        ),
        (
            COMPLETIONS,
            json!({"prompt": "x", "echo": true}),
            lacks,
            "echo",
        ),
        (CHAT, json!({"messages": []}), invalid, "messages"),
        (
            CHAT,
            json!({"messages": messages, "tools": tool}),
            lacks,
            "tools",
        ),
        (
            CHAT,
            json!({"messages": messages, "response_format": {"type": "json_object"}}),
            lacks,
            "response_format",
        ),
        (CHAT, json!({"messages": long}), too_long, "messages"),
        (
            COMPLETIONS,
            json!({"prompt": "x ".repeat(70)}),
            too_long,
            "prompt",
        ),
        ("/tokenize", json!({}), invalid, "prompt"),
        ("/detokenize", json!({}), invalid, "tokens"),
    ] {
        let answer = post(&mesh, path, &body).await;
        let wanted = (400, code.to_owned(), named(param));
        assert_eq!(answer.error(), wanted, "{body}: {}", answer.body);
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
    let constrain = json!({"prompt": "x", "response_format": {"type": "json_object"}});
    let said = post(&mesh, COMPLETIONS, &constrain).await.body;
    assert!(said.contains("cannot constrain its output"), "{said}");
    let unknown = post(&mesh, COMPLETIONS, &json!({"prompt": "x", "model": "none"})).await;
    assert_eq!(
        unknown.error(),
        (404, "model_not_found".to_owned(), named("model"))
    );
    let unknown = ask(&mesh, "GET", "/v1/models/none").await;
    assert_eq!(unknown.error().0, 404);
    assert_eq!(mesh.workers[0].counters().placed, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paths_methods_and_bodies_that_are_none_are_told_apart() {
    let mesh = Mesh::start(vec![MockConfig::default()], json!({})).await;
    let answer = ask(&mesh, "GET", "/v1/nothing").await;
    assert_eq!(answer.error(), (404, "not_found".to_owned(), Value::Null));
    for (method, path, allowed) in [
        ("GET", CHAT, "POST"),
        ("DELETE", "/v1/models/mock", "GET"),
        ("OPTIONS", "/tokenize", "POST"),
        ("PUT", "/health", "GET"),
    ] {
        let answer = ask(&mesh, method, path).await;
        assert_eq!(answer.error().0, 405, "{method} {path}");
        assert_eq!(answer.head.headers["allow"], allowed);
    }
    let answer = post(&mesh, "/v1/embeddings", &json!({"input": "x"})).await;
    assert_eq!(answer.error().0, 501);
    assert_eq!(answer.head.headers["x-should-retry"], "false");

    let head = |kind: &str, length: usize| {
        format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nhost: r\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
        )
    };
    for (kind, body) in [
        ("application/json", &b"{"[..]),
        ("application/json", b"\xff\xfe"),
        ("application/json", b""),
        ("text/plain", b"{\"prompt\": \"x\"}"),
    ] {
        let mut connection = Http1::connect(&mesh).await;
        connection.send(&head(kind, body.len()), body).await;
        let answer = connection.answer().await;
        assert_eq!(
            answer.error(),
            (400, "malformed_message".to_owned(), Value::Null)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_is_refused_by_its_length_before_it_is_sent_and_while_it_grows() {
    let mesh = Mesh::start(vec![MockConfig::default()], narrow()).await;
    // Announced, never sent.
    let mut connection = Http1::connect(&mesh).await;
    let head = |length: &str| {
        format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nhost: r\r\ncontent-type: application/json\r\n{length}\r\n\r\n"
        )
    };
    connection
        .send(&head("content-length: 99999999"), b"")
        .await;
    let wanted = (413, "message_too_large".to_owned(), Value::Null);
    assert_eq!(connection.answer().await.error(), wanted);
    // In chunks, so that nobody knows how long it will be.
    let mut connection = Http1::connect(&mesh).await;
    let chunk = format!("400\r\n{}\r\n", " ".repeat(1_024));
    connection
        .send(&head("transfer-encoding: chunked"), chunk.as_bytes())
        .await;
    for _ in 0..2 {
        connection.offer(chunk.as_bytes()).await;
    }
    let (status, code, _) = connection.answer().await.error();
    // The budget of these settings is as large as one message.
    assert!(
        status == 413 || (status, code.as_str()) == (429, "overloaded"),
        "{status} {code}"
    );
    mesh.wait_figure("kvmesh_request_bytes_held", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_would_be_other_tokens_is_not_told_as_these() {
    let mesh = Mesh::start(vec![MockConfig::default()], json!({})).await;
    let messages = json!([{"role": "assistant", "content": "hi"}]);
    for (path, body, field) in [
        (
            "/tokenize",
            json!({"messages": messages, "continue_final_message": true}),
            "continue_final_message",
        ),
        (
            "/tokenize",
            json!({"messages": messages, "chat_template": "x"}),
            "chat_template",
        ),
        (
            "/tokenize",
            json!({"prompt": "x", "chat_template_kwargs": {"a": 1}}),
            "chat_template_kwargs",
        ),
        (
            "/detokenize",
            json!({"tokens": [5], "mm_payload": {"a": 1}}),
            "mm_payload",
        ),
    ] {
        let wanted = (400, "unsupported_parameter".to_owned(), named(field));
        assert_eq!(post(&mesh, path, &body).await.error(), wanted);
    }
}

/// 32 kB of it are megabytes as a tree.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn json_of_many_small_values_counts_by_what_it_becomes() {
    let settings = json!({"max_request_bytes": "64KiB", "request_bytes_budget": "1MiB"});
    let mesh = Mesh::start(vec![MockConfig::default()], settings).await;
    let values = |count: usize| Value::from(vec![json!([0]); count]);
    let asked = |field: &str, value: Value| {
        let mut body = json!({"max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]});
        body[field] = value;
        body
    };
    let call = json!({"id": "c", "type": "function",
        "function": {"name": "f", "arguments": values(8_000).to_string()}});
    let calls = json!([{"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]}]);
    let tool = json!([{"type": "function",
        "function": {"name": "f", "parameters": {"enum": values(8_000)}}}]);
    for (field, value) in [
        ("chat_template_kwargs", json!({"a": values(8_000)})),
        ("messages", calls),
        ("tools", tool),
    ] {
        let refused = post(&mesh, CHAT, &asked(field, value)).await;
        let wanted = (400, "invalid_field".to_owned(), named(field));
        assert_eq!(refused.error(), wanted);
        mesh.wait_figure("kvmesh_request_bytes_held", 0).await;
    }
    let few = asked("chat_template_kwargs", json!({"a": values(100)}));
    assert_eq!(post(&mesh, CHAT, &few).await.head.status, 200);
    // A schema goes to the engine as it was written: nothing is made of it here.
    let schema = json!({"type": "json_schema", "json_schema": {"schema": {"enum": values(8_000)}}});
    let (status, code, _) = post(&mesh, CHAT, &asked("response_format", schema))
        .await
        .error();
    assert_eq!((status, code.as_str()), (400, "unsupported_parameter"));
    mesh.wait_figure("kvmesh_request_bytes_held", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_asked_for_first_and_limits_count_each_answer() {
    let keys = KeyFile::new(&tenant("shop", "concurrency = 2"));
    let slow = MockConfig {
        step: Duration::from_millis(2),
        ..MockConfig::default()
    };
    let mesh = Mesh::start_for("shop", vec![slow], keys.settings()).await;
    for path in [
        CHAT,
        COMPLETIONS,
        "/v1/embeddings",
        "/tokenize",
        "/detokenize",
    ] {
        let answer = post(&mesh, path, &json!("not even an object")).await;
        assert_eq!(
            answer.error(),
            (401, "invalid_api_key".to_owned(), Value::Null)
        );
        assert_eq!(answer.head.headers["www-authenticate"], "Bearer");
    }
    assert_eq!(ask(&mesh, "GET", "/v1/models").await.error().0, 401);
    assert_eq!(ask(&mesh, "GET", "/health").await.head.status, 200);
    let mut connection = Http1::connect(&mesh).await;
    let key = [("authorization", "Bearer shop")];
    let body = |n: u32| json!({"prompt": [5, 6], "n": n, "max_tokens": 2});
    connection.post(COMPLETIONS, &key, &body(2)).await;
    let answer = connection.answer().await;
    assert_eq!(answer.json()["choices"].as_array().unwrap().len(), 2);
    // More than may ever be open: coming back would not help.
    connection.post(COMPLETIONS, &key, &body(3)).await;
    let answer = connection.answer().await;
    assert_eq!(
        answer.error(),
        (400, "invalid_field".to_owned(), json!("n"))
    );
    let said = answer.json()["error"]["message"].to_string();
    assert!(
        said.contains("at most 2") && said.contains("concurrency"),
        "{said}"
    );
    let prompts = json!({"prompt": [[5, 6], [7], [8]], "max_tokens": 2});
    connection.post(COMPLETIONS, &key, &prompts).await;
    let answer = connection.answer().await;
    let param = json!("prompt");
    assert_eq!(answer.error(), (400, "invalid_field".to_owned(), param));
    // As many as may be, while another one is open.
    let mut other = Http1::connect(&mesh).await;
    let long = json!({"prompt": [5, 6], "max_tokens": 100_000, "stream": true});
    other.post(COMPLETIONS, &key, &long).await;
    assert_eq!(other.head().await.status, 200);
    connection.post(COMPLETIONS, &key, &body(2)).await;
    let answer = connection.answer().await;
    assert_eq!(
        answer.error(),
        (429, "rate_limit_exceeded".to_owned(), Value::Null)
    );
    assert_eq!(answer.json()["error"]["type"], "rate_limit_error");
    let ms: u64 = answer.head.headers["retry-after-ms"].parse().unwrap();
    let seconds: u64 = answer.head.headers["retry-after"].parse().unwrap();
    assert!(ms > 0 && seconds == ms.div_ceil(1_000));
    drop(other);
    mesh.wait_figure("kvmesh_open_streams", 0).await;
    // The refused ones gave their places back.
    connection.post(COMPLETIONS, &key, &body(2)).await;
    assert_eq!(connection.answer().await.head.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_before_the_first_event_is_a_status_and_not_an_event() {
    let mesh = Mesh::start(
        vec![MockConfig::default()],
        json!({"queue_timeout": "200ms"}),
    )
    .await;
    mesh.workers[0]
        .faults()
        .set(|plan| plan.refuse_next = u32::MAX);
    for stream in [false, true] {
        let body = json!({"prompt": [5, 6], "stream": stream});
        let answer = post(&mesh, COMPLETIONS, &body).await;
        assert_eq!(answer.error(), (429, "overloaded".to_owned(), Value::Null));
        assert!(answer.head.headers.contains_key("retry-after"));
    }
    let nobody = Mesh::start(vec![], json!({})).await;
    let answer = post(&nobody, CHAT, &json!({"model": "m", "messages": []})).await;
    assert_eq!(answer.error(), (503, "no_worker".to_owned(), Value::Null));
    assert_eq!(ask(&nobody, "GET", "/ready").await.head.status, 503);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_after_it_is_the_last_event_and_the_word_does_not_come() {
    let paced = MockConfig {
        step: Duration::from_millis(1),
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![paced], json!({})).await;
    mesh.workers[0].faults().set(|plan| {
        plan.fail_at = Some(5);
        plan.fail_next = u32::MAX;
    });
    let body = json!({"prompt": [5, 6], "max_tokens": 50, "stream": true});
    let answer = post(&mesh, COMPLETIONS, &body).await;
    assert_eq!(answer.head.status, 200);
    let mut events = events(&answer.body);
    let last = events.pop().unwrap();
    assert_eq!(last["error"]["type"], "server_error", "{last}");
    assert!(!events.is_empty());
    assert!(
        events
            .iter()
            .all(|event| event["choices"][0]["finish_reason"].is_null())
    );
    mesh.wait_figure("kvmesh_open_streams", 0).await;
}
