//! What is answered: the tokens that gRPC would bring, in OpenAI's shapes.

use bytes::Bytes;
use kvmesh_testkit::mock::MockConfig;
use serde_json::{Value, json};

use crate::{
    common::{Mesh, framed, h2_connection, request},
    http1::{Answer, CHAT, COMPLETIONS, Head, Http1, ask, post, said},
};

const PROMPT: [u32; 3] = [5, 6, 7];

async fn mesh() -> Mesh {
    let config = MockConfig {
        max_logprobs: 20,
        ..MockConfig::default()
    };
    Mesh::start(vec![config], json!({})).await
}

fn text(mesh: &Mesh, prompt: &[u32], tokens: u32) -> String {
    mesh.workers[0].tokens().expected_text(prompt, tokens)
}

/// The same over HTTP/2.
async fn post_h2(mesh: &Mesh, path: &str, body: &Value) -> Answer {
    let mut sender = h2_connection(mesh).await.ready().await.unwrap();
    let head = http::Request::post(format!("http://router{path}"))
        .header("content-type", "application/json")
        .body(())
        .unwrap();
    let (response, mut upload) = sender.send_request(head, false).unwrap();
    upload
        .send_data(Bytes::from(body.to_string()), true)
        .unwrap();
    let response = response.await.unwrap();
    let header = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
        (name.to_string(), value.to_str().unwrap().to_owned())
    };
    let head = Head {
        status: response.status().as_u16(),
        headers: response.headers().iter().map(header).collect(),
    };
    let mut body = response.into_body();
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        bytes.extend_from_slice(&data);
    }
    let body = String::from_utf8(bytes).unwrap();
    Answer { head, body }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_is_the_same_whole_and_streamed_over_both_protocols() {
    let mesh = mesh().await;
    let expected = text(&mesh, &PROMPT, 40);
    let mut body = json!({"model": "mock", "prompt": PROMPT, "max_tokens": 40});
    let whole = post(&mesh, COMPLETIONS, &body).await;
    assert_eq!(whole.head.status, 200);
    let whole = whole.json();
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["model"], "mock");
    assert!(whole["id"].as_str().unwrap().starts_with("cmpl-"));
    let choice = json!({"index": 0, "text": expected, "logprobs": null,
        "finish_reason": "length", "stop_reason": null});
    assert_eq!(whole["choices"], json!([choice]));
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 40, "total_tokens": 43,
        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(whole["usage"], usage);
    assert_eq!(
        post_h2(&mesh, COMPLETIONS, &body).await.json()["choices"],
        json!([choice])
    );

    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let http1 = post(&mesh, COMPLETIONS, &body).await.events();
    let http2 = post_h2(&mesh, COMPLETIONS, &body).await.events();
    for mut events in [http1, http2] {
        let last = events.pop().unwrap();
        assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &usage));
        assert!(events.iter().all(|event| event["usage"].is_null()));
        assert!(events.iter().all(|event| event["id"] == last["id"]));
        assert_eq!(said(&events, 0), expected);
        let reasons = |event: &Value| event["choices"][0]["finish_reason"].clone();
        let last = events.pop().unwrap();
        assert_eq!(reasons(&last), "length");
        assert!(events.iter().all(|event| reasons(event).is_null()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_chunk_has_the_usage_of_its_choice_so_far_where_that_is_asked_for() {
    let mesh = mesh().await;
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let mut body = json!({"prompt": [[5, 6, 7], [9, 10]], "n": 2, "max_tokens": 6,
        "stream": true, "stream_options": options});
    let mut events = post(&mesh, COMPLETIONS, &body).await.events();
    let last = events.pop().unwrap();
    assert_eq!(
        (&last["choices"], &last["usage"]["total_tokens"]),
        (&json!([]), &json!(29))
    );
    for index in 0..4 {
        let own = events
            .iter()
            .filter(|event| event["choices"][0]["index"] == index);
        let told: Vec<(u64, u64, u64)> = own
            .map(|event| {
                let count = |key: &str| event["usage"][key].as_u64().unwrap();
                (
                    count("prompt_tokens"),
                    count("completion_tokens"),
                    count("total_tokens"),
                )
            })
            .collect();
        let prompt = if index < 2 { 3 } else { 2 };
        assert!(
            told.iter()
                .all(|(of, came, all)| (*of, *all) == (prompt, prompt + came))
        );
        assert!(told.is_sorted() && told[0].1 > 0, "{told:?}");
        assert_eq!(told.last().unwrap().1, 6);
    }
    // It says nothing of its own where the usage of all is not asked for.
    body["stream_options"] = json!({"continuous_usage_stats": true});
    let events = post(&mesh, COMPLETIONS, &body).await.events();
    assert!(events.iter().all(|event| event.get("usage").is_none()));

    let messages = json!([{"role": "user", "content": "hi"}]);
    let body = json!({"messages": messages, "max_tokens": 3, "stream": true,
        "stream_options": options});
    let mut events = post(&mesh, CHAT, &body).await.events();
    assert_eq!(events[0]["usage"]["completion_tokens"], 0);
    let all = events.pop().unwrap()["usage"].clone();
    let last = &events.last().unwrap()["usage"];
    for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(last[key], all[key]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_is_rendered_by_the_models_template_and_answered_as_its_assistant() {
    let mesh = mesh().await;
    let mut body = json!({"model": "mock", "max_completion_tokens": 12, "messages": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]},
        {"role": "assistant", "content": null}, {"role": "user", "content": "go on"}]});
    let ids = post(&mesh, "/tokenize", &body).await.json();
    let ids: Vec<u32> = serde_json::from_value(ids["tokens"].clone()).unwrap();
    let expected = text(&mesh, &ids, 12);
    let whole = post(&mesh, CHAT, &body).await.json();
    assert_eq!(whole["object"], "chat.completion");
    let message = json!({"role": "assistant", "content": expected, "refusal": null});
    assert_eq!(whole["choices"][0]["message"], message);
    assert_eq!(whole["usage"]["prompt_tokens"], ids.len());

    body["stream"] = json!(true);
    let events = post(&mesh, CHAT, &body).await.events();
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert!(events.iter().all(|event| event.get("usage").is_none()));
    assert_eq!(said(&events, 0), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_answer_to_each_prompt_has_its_index_and_a_prompt_counts_once() {
    let mesh = mesh().await;
    let prompts = [vec![5, 6, 7], vec![9, 10]];
    let expected = |index: usize| text(&mesh, &prompts[index / 3], 6);
    let mut body = json!({"prompt": prompts, "n": 3, "max_tokens": 6});
    let whole = post(&mesh, COMPLETIONS, &body).await.json();
    let choices = whole["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 6);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert_eq!(choice["text"], expected(index));
    }
    let usage = &whole["usage"];
    assert_eq!(
        (&usage["prompt_tokens"], &usage["completion_tokens"]),
        (&json!(5), &json!(36))
    );

    body["stream"] = json!(true);
    let events = post(&mesh, COMPLETIONS, &body).await.events();
    for index in 0..6 {
        assert_eq!(said(&events, index), expected(index));
    }
    mesh.wait_figure(
        "kvmesh_calls_total{method=\"completions\",outcome=\"OK\"}",
        12,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_without_a_length_has_16_tokens_or_as_many_as_fit() {
    let small = MockConfig {
        context_length: 64,
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![small], json!({})).await;
    for (prompt, tokens) in [(8, 16), (48, 16), (49, 15), (63, 1)] {
        let body = json!({"prompt": vec![5; prompt]});
        let answer = post(&mesh, COMPLETIONS, &body).await;
        assert_eq!(answer.head.status, 200, "{}", answer.body);
        let answer = answer.json();
        assert_eq!(answer["usage"]["completion_tokens"], tokens, "{prompt}");
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    }
    // One that is given is not cut.
    let body = json!({"prompt": vec![5; 49], "max_tokens": 16});
    let code = "context_length_exceeded".to_owned();
    let refused = (400, code, json!("max_tokens"));
    assert_eq!(post(&mesh, COMPLETIONS, &body).await.error(), refused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_string_ends_the_text_before_it_and_is_named() {
    let mesh = mesh().await;
    let expected = text(&mesh, &PROMPT, 40);
    let tokens = mesh.workers[0].tokens();
    let stop = tokens
        .vocabulary()
        .text(tokens.expected(&PROMPT, 12)[11])
        .to_owned();
    let body = json!({"prompt": PROMPT, "max_tokens": 40, "stop": [stop]});
    let choice = post(&mesh, COMPLETIONS, &body).await.json()["choices"][0].clone();
    assert_eq!(choice["text"], expected.split(&stop).next().unwrap());
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("stop"), &json!(stop))
    );
    let body = json!({"prompt": PROMPT, "max_tokens": 40, "stop": stop,
        "include_stop_str_in_output": true});
    let choice = post(&mesh, COMPLETIONS, &body).await.json()["choices"][0].clone();
    assert!(choice["text"].as_str().unwrap().ends_with(&stop));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_probabilities_come_in_the_shape_of_each_face() {
    let mesh = mesh().await;
    let names: Vec<String> = {
        let tokens = mesh.workers[0].tokens();
        let ids = tokens.expected(&PROMPT, 4);
        ids.iter()
            .map(|id| tokens.vocabulary().text(*id).to_owned())
            .collect()
    };
    let mut body = json!({"prompt": PROMPT, "max_tokens": 4, "logprobs": 2});
    let told = post(&mesh, COMPLETIONS, &body).await.json()["choices"][0]["logprobs"].clone();
    assert_eq!(told["tokens"], json!(names));
    assert_eq!(told["token_logprobs"], json!([-0.5, -0.5, -0.5, -0.5]));
    let second = names[0].chars().count();
    assert_eq!(
        (&told["text_offset"][0], &told["text_offset"][1]),
        (&json!(0), &json!(second))
    );
    let top = told["top_logprobs"].as_array().unwrap();
    assert!(names.iter().zip(top).all(|(name, top)| top[name] == -0.5));
    body["stream"] = json!(true);
    let events = post(&mesh, COMPLETIONS, &body).await.events();
    let streamed: Vec<&Value> = events
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["tokens"].as_array())
        .flatten()
        .collect();
    assert_eq!(json!(streamed), json!(names));

    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2,
        "logprobs": true, "top_logprobs": 2});
    let told = post(&mesh, CHAT, &body).await.json()["choices"][0]["logprobs"]["content"].clone();
    assert_eq!(told.as_array().unwrap().len(), 2);
    let first = &told[0];
    assert_eq!(first["logprob"], -0.5);
    let bytes: Vec<u8> = serde_json::from_value(first["bytes"].clone()).unwrap();
    assert_eq!(String::from_utf8(bytes).unwrap(), first["token"]);
    assert_eq!(first["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(first["top_logprobs"][1]["logprob"], -1.5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn urgency_and_the_seed_reach_the_worker() {
    let mesh = mesh().await;
    let body = json!({"prompt": PROMPT, "max_tokens": 1, "priority": -5, "seed": 77});
    post(&mesh, COMPLETIONS, &body).await;
    let place = mesh.workers[0].last_place().unwrap();
    let told = place.continuation.unwrap();
    assert_eq!(
        told.request_class(),
        kvmesh_wire::v1::RequestClass::Interactive
    );
    let drawn = async |body: &Value| {
        post(&mesh, COMPLETIONS, body).await;
        let place = mesh.workers[0].last_place().unwrap();
        let sampling = place.continuation.unwrap().sampling.unwrap();
        (sampling.seed, sampling.seed_given)
    };
    assert_eq!(drawn(&body).await, (77, true));
    let negative = json!({"prompt": PROMPT, "max_tokens": 1, "seed": -1});
    assert_eq!(drawn(&negative).await, (u64::MAX, true));
    // Each choice has one of its own, and the last that came is one of these.
    let several = json!({"prompt": PROMPT, "max_tokens": 1, "seed": 5, "n": 3});
    let (seed, given) = drawn(&several).await;
    assert!(given && (5..8).contains(&seed), "{seed}");
    // What nobody asked for is the router's own, and another one each time.
    let none = json!({"prompt": PROMPT, "max_tokens": 1});
    let (first, second) = (drawn(&none).await, drawn(&none).await);
    assert!(!first.1 && !second.1);
    assert_ne!(first.0, second.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_and_their_tokens_are_told() {
    let mesh = mesh().await;
    let list = ask(&mesh, "GET", "/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], "mock");
    assert_eq!(list["data"][0]["max_model_len"], 131_072);
    assert_eq!(
        ask(&mesh, "GET", "/v1/models/m%6Fck").await.json(),
        list["data"][0]
    );

    let body = json!({"model": "mock", "prompt": "hello world", "return_token_strs": true});
    let told = post(&mesh, "/tokenize", &body).await.json();
    let tokens = told["tokens"].as_array().unwrap();
    assert_eq!(told["count"], tokens.len());
    let strings = told["token_strs"].as_array().unwrap();
    let joined: String = strings.iter().map(|text| text.as_str().unwrap()).collect();
    assert_eq!(joined, "hello world");
    let back = post(&mesh, "/detokenize", &json!({"tokens": tokens}))
        .await
        .json();
    assert_eq!(back, json!({"prompt": "hello world"}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_is_found_again_by_the_names_that_it_came_with() {
    let mesh = mesh().await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let names = [("x-request-id", "mine"), ("traceparent", trace)];
    let body = json!({"prompt": PROMPT, "max_tokens": 1});
    let mut connection = Http1::connect(&mesh).await;
    for stream in [false, true] {
        let mut body = body.clone();
        body["stream"] = json!(stream);
        connection.post(COMPLETIONS, &names, &body).await;
        let headers = connection.answer().await.head.headers;
        assert_eq!(
            (
                headers["x-request-id"].as_str(),
                headers["traceparent"].as_str()
            ),
            ("mine", trace)
        );
    }
    let place = mesh.workers[0].last_place().unwrap();
    assert_eq!(place.traceparent, trace);
    // And without any it gets some.
    let headers = post(&mesh, COMPLETIONS, &body).await.head.headers;
    assert_eq!(headers["x-request-id"].len(), 32);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_and_events_share_a_connection() {
    let mesh = mesh().await;
    let mut sender = h2_connection(&mesh).await.ready().await.unwrap();
    let (grpc, mut upload) = sender.send_request(crate::common::call(), false).unwrap();
    upload.send_data(framed(&request(3)), true).unwrap();
    let head = http::Request::post(format!("http://router{COMPLETIONS}"))
        .header("content-type", "application/json")
        .body(())
        .unwrap();
    let mut sender = sender.ready().await.unwrap();
    let (events, mut upload) = sender.send_request(head, false).unwrap();
    let body = json!({"prompt": PROMPT, "max_tokens": 3, "stream": true});
    upload
        .send_data(Bytes::from(body.to_string()), true)
        .unwrap();
    for (response, kind) in [(grpc, "application/grpc"), (events, "text/event-stream")] {
        let response = response.await.unwrap();
        let told = response.headers()["content-type"].to_str().unwrap();
        assert!(told.starts_with(kind), "{told}");
        let mut body = response.into_body();
        while let Some(data) = body.data().await {
            let length = data.unwrap().len();
            body.flow_control().release_capacity(length).unwrap();
        }
    }
}
