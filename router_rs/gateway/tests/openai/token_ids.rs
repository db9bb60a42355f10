//! Ids of tokens beside their text, as vLLM tells them.

use kvmesh_testkit::mock::MockConfig;
use serde_json::{Value, json};

use crate::{
    common::Mesh,
    http1::{CHAT, COMPLETIONS, post},
    tools::worker,
};

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error}: {value}"))
}

/// The ids of a choice, over all chunks of a stream.
fn streamed(events: &[Value], index: usize) -> Vec<u32> {
    let choices = events.iter().map(|event| &event["choices"][0]);
    let own = choices.filter(|choice| choice["index"] == index);
    own.filter_map(|choice| choice.get("token_ids").map(ids))
        .flatten()
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_has_the_ids_of_each_prompt_and_of_each_answer() {
    let mesh = Mesh::start(vec![MockConfig::default()], json!({})).await;
    let prompts = [vec![5, 6, 7], vec![9, 10]];
    let expected = |index: usize| mesh.workers[0].tokens().expected(&prompts[index / 2], 6);
    let mut body = json!({"prompt": prompts, "n": 2, "max_tokens": 6, "return_token_ids": true});
    let whole = post(&mesh, COMPLETIONS, &body).await.json();
    assert!(whole.get("prompt_token_ids").is_none());
    for index in 0..4 {
        let choice = &whole["choices"][index];
        assert_eq!(ids(&choice["prompt_token_ids"]), prompts[index / 2]);
        assert_eq!(ids(&choice["token_ids"]), expected(index));
    }
    body["stream"] = json!(true);
    let events = post(&mesh, COMPLETIONS, &body).await.events();
    for index in 0..4 {
        assert_eq!(streamed(&events, index), expected(index));
        let choices = events.iter().map(|event| &event["choices"][0]);
        let own: Vec<&Value> = choices.filter(|choice| choice["index"] == index).collect();
        // With the first chunk, and never again.
        assert_eq!(ids(&own[0]["prompt_token_ids"]), prompts[index / 2]);
        assert!(
            own[1..]
                .iter()
                .all(|choice| choice.get("prompt_token_ids").is_none())
        );
        assert!(own.iter().all(|choice| choice["token_ids"].is_array()));
    }
    body["return_token_ids"] = json!(false);
    let events = post(&mesh, COMPLETIONS, &body).await.events();
    let named = |event: &Value| event.to_string().contains("token_ids");
    assert!(!events.iter().any(named));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_probabilities_call_tokens_by_their_ids_where_that_is_asked_for() {
    let config = MockConfig {
        max_logprobs: 20,
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![config], json!({})).await;
    let named =
        |ids: Vec<u32>| -> Vec<String> { ids.iter().map(|id| format!("token_id:{id}")).collect() };
    let mut body = json!({"prompt": [5, 6, 7], "max_tokens": 4, "logprobs": 2,
        "return_tokens_as_token_ids": true});
    let told = post(&mesh, COMPLETIONS, &body).await.json()["choices"][0]["logprobs"].clone();
    let expected = named(mesh.workers[0].tokens().expected(&[5, 6, 7], 4));
    assert_eq!(told["tokens"], json!(expected));
    let length = expected[0].len();
    assert_eq!(told["text_offset"][1], length);
    for (name, top) in expected
        .iter()
        .zip(told["top_logprobs"].as_array().unwrap())
    {
        assert_eq!(top[name], -0.5);
        let names = top.as_object().unwrap().keys();
        assert!(names.clone().all(|name| name.starts_with("token_id:")));
    }
    // Without log-probabilities there is nothing to be called so.
    body["logprobs"] = Value::Null;
    let choice = post(&mesh, COMPLETIONS, &body).await.json()["choices"][0].clone();
    assert!(choice["logprobs"].is_null());

    let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2,
        "logprobs": true, "top_logprobs": 2});
    let texts = post(&mesh, CHAT, &body).await.json();
    body["return_tokens_as_token_ids"] = json!(true);
    body["return_token_ids"] = json!(true);
    let by_ids = post(&mesh, CHAT, &body).await.json();
    let tokens = |answer: &Value, key: &str| -> Vec<Value> {
        let content = answer["choices"][0]["logprobs"]["content"].as_array();
        content
            .unwrap()
            .iter()
            .map(|one| one[key].clone())
            .collect()
    };
    let expected = named(ids(&by_ids["choices"][0]["token_ids"]));
    assert_eq!(json!(tokens(&by_ids, "token")), json!(expected));
    // Their bytes stay what they are.
    assert_eq!(tokens(&by_ids, "bytes"), tokens(&texts, "bytes"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_has_them_also_where_what_is_said_is_held_back_or_taken_apart() {
    let template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>\
        {% endfor %}{# <think> </think> #}";
    let marks = ["<think>", "</think>"];
    let mesh = Mesh::start(vec![worker(template, &marks)], json!({})).await;
    mesh.workers[0].say(Some("<think>a</think> b"));
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}],
        "return_token_ids": true, "stream_options": {"include_usage": true}});
    let prompt = ids(&post(&mesh, "/tokenize", &body).await.json()["tokens"]);
    let whole = post(&mesh, CHAT, &body).await.json();
    assert_eq!(ids(&whole["prompt_token_ids"]), prompt);
    let choice = &whole["choices"][0];
    assert!(choice.get("prompt_token_ids").is_none());
    assert_eq!(choice["message"]["reasoning"], "a");
    let said = ids(&choice["token_ids"]);
    assert_eq!(said.len(), whole["usage"]["completion_tokens"]);

    body["stream"] = json!(true);
    let mut events = post(&mesh, CHAT, &body).await.events();
    let usage = events.pop().unwrap()["usage"].clone();
    assert_eq!(
        usage["completion_tokens"],
        whole["usage"]["completion_tokens"]
    );
    assert_eq!(streamed(&events, 0), said);
    assert_eq!(ids(&events[0]["prompt_token_ids"]), prompt);
    let told = |event: &Value| event.get("prompt_token_ids").is_some();
    assert!(!events[1..].iter().any(told));
}
