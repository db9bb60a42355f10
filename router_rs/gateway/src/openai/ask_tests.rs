#![allow(clippy::unwrap_used)]
use kvmesh_wire::v1::{RequestClass, grammar::Kind};
use serde_json::{Value, json};

use super::*;

fn asked(face: Face, body: &Value) -> Result<Asked, RequestError> {
    ask(face, Fields::read(body.to_string().as_bytes()).unwrap())
}

fn one(face: Face, body: &Value) -> v1::GenerateRequest {
    let mut asked = asked(face, body).unwrap();
    v1::GenerateRequest {
        input: asked.inputs.pop(),
        ..asked.request
    }
}

#[test]
fn each_field_has_its_place_in_the_request() {
    let body = json!({"model": "m", "prompt": "p", "max_tokens": 9, "min_tokens": 2,
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": -1,
        "repetition_penalty": 1.5, "frequency_penalty": 0.75, "presence_penalty": -0.5,
        "logit_bias": {"5": -100, "6": 2.5}, "stop": ["a", "b"], "stop_token_ids": [3],
        "ignore_eos": true, "include_stop_str_in_output": true, "skip_special_tokens": false,
        "logprobs": 4, "priority": 3, "cache_salt": "s"});
    let request = one(Face::Completion, &body);
    let bias = |token_id, bias| v1::LogitBias { token_id, bias };
    let expected = v1::GenerateRequest {
        model: "m".to_owned(),
        input: Some(Input::Prompt("p".to_owned())),
        sampling: Some(v1::Sampling {
            temperature: Some(0.5),
            top_k: 7,
            top_p: Some(0.25),
            min_p: 0.125,
            repetition_penalty: Some(1.5),
            frequency_penalty: 0.75,
            presence_penalty: -0.5,
            logit_bias: vec![bias(5, -100.0), bias(6, 2.5)],
            seed: Some(u64::MAX),
        }),
        stopping: Some(v1::Stopping {
            max_tokens: 9,
            min_tokens: 2,
            stop: vec!["a".to_owned(), "b".to_owned()],
            stop_token_ids: vec![3],
            ignore_end_of_text: true,
            include_stop: true,
        }),
        output: Some(v1::Output {
            logprobs: Some(4),
            special_tokens: true,
            ..Default::default()
        }),
        hints: Some(v1::Hints {
            request_class: RequestClass::Batch.into(),
            cache_salt: "s".to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(request, expected);
}

#[test]
fn an_absent_length_is_16_in_a_completion_and_the_rest_of_the_context_in_a_chat() {
    let most = |face, body: Value| {
        let asked = asked(face, &body).unwrap();
        (asked.request.stopping.unwrap().max_tokens, asked.most)
    };
    assert_eq!(
        most(Face::Completion, json!({"prompt": "p"})),
        (0, Some(16))
    );
    let given = json!({"prompt": "p", "max_tokens": 20, "min_tokens": 20});
    assert_eq!(most(Face::Completion, given), (20, None));
    let messages = json!([{"role": "user", "content": "hi"}]);
    assert_eq!(most(Face::Chat, json!({"messages": messages})), (0, None));
    let both = json!({"messages": messages, "max_tokens": 5, "max_completion_tokens": 7});
    assert_eq!(most(Face::Chat, both), (7, None));
}

#[test]
fn several_prompts_are_several_requests_with_n_answers_each() {
    let body = json!({"prompt": [[1, 2], [3]], "n": 3});
    let asked = asked(Face::Completion, &body).unwrap();
    let ids = |input| match input {
        Input::TokenIds(ids) => ids.ids,
        other => panic!("{other:?}"),
    };
    let all: Vec<_> = asked.inputs.into_iter().map(ids).collect();
    assert_eq!((all, asked.n), (vec![vec![1, 2], vec![3]], 3));
}

#[test]
fn parts_of_text_are_joined_and_a_template_is_told_of_the_effort() {
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let body = json!({"messages": [{"role": "user", "content": parts}],
        "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": false}});
    let Some(Input::Chat(chat)) = one(Face::Chat, &body).input else {
        panic!("a chat");
    };
    assert_eq!(chat.messages[0].content, "a\nb");
    let arguments: Value = serde_json::from_str(&chat.template_arguments_json).unwrap();
    assert_eq!(
        arguments,
        json!({"enable_thinking": false, "reasoning_effort": "low"})
    );
}

#[test]
fn what_an_assistant_refused_in_words_is_what_it_said() {
    let refusal = json!({"type": "refusal", "refusal": "No."});
    let text = json!({"type": "text", "text": "Well."});
    let said = |message: Value| {
        let body = json!({"messages": [message]});
        asked(Face::Chat, &body).map(|mut asked| match asked.inputs.pop() {
            Some(Input::Chat(mut chat)) => chat.messages.remove(0).content,
            other => panic!("{other:?}"),
        })
    };
    let parts = json!({"role": "assistant", "content": [text, refusal]});
    assert_eq!(said(parts).unwrap(), "Well.\nNo.");
    let answered = json!({"role": "assistant", "content": null, "refusal": "No."});
    assert_eq!(said(answered).unwrap(), "No.");
    let both = json!({"role": "assistant", "content": "Well.", "refusal": null});
    assert_eq!(said(both).unwrap(), "Well.");
    // Nobody else refuses.
    let other = json!({"role": "user", "content": [refusal]});
    let error = said(other).unwrap_err().to_string();
    assert!(error.contains("messages[0].content[0].type"), "{error}");
    let empty = json!({"role": "assistant", "content": [{"type": "refusal"}]});
    let error = said(empty).unwrap_err().to_string();
    assert!(error.contains("messages[0].content[0].refusal"), "{error}");
}

#[test]
fn each_tier_has_its_class() {
    for (tier, class) in [
        ("auto", RequestClass::Unspecified),
        ("default", RequestClass::Unspecified),
        ("scale", RequestClass::Unspecified),
        ("priority", RequestClass::Interactive),
        ("flex", RequestClass::Batch),
    ] {
        let body = json!({"prompt": "p", "service_tier": tier});
        let hints = one(Face::Completion, &body).hints.unwrap();
        assert_eq!(hints.request_class(), class, "{tier}");
    }
}

#[test]
fn a_language_is_asked_for_as_over_grpc() {
    let schema = json!({"type": "object"});
    let format = |format: Value| {
        let body = json!({"prompt": "p", "response_format": format});
        one(Face::Completion, &body)
            .grammar
            .map(|g| g.kind.unwrap())
    };
    assert_eq!(format(json!({"type": "text"})), None);
    let any = format(json!({"type": "json_object"}));
    assert_eq!(any, Some(Kind::JsonObject(true)));
    let one = format(json!({"type": "json_schema", "json_schema": {"schema": schema}}));
    assert_eq!(one, Some(Kind::JsonSchema(schema.to_string())));
}

#[test]
fn what_is_refused_names_its_field() {
    let message = json!([{"role": "user", "content": "hi"}]);
    let image = json!([{"role": "user", "content": [{"type": "image_url"}]}]);
    let tool = json!([{"type": "function", "function": {"name": "f"}}]);
    for (face, body, field) in [
        (Face::Completion, json!({}), "prompt"),
        (Face::Chat, json!({"prompt": "p"}), "messages"),
        (Face::Completion, json!({"prompt": "p", "n": 0}), "n"),
        (Face::Completion, json!({"prompt": "p", "n": 129}), "n"),
        (
            Face::Completion,
            json!({"prompt": "p", "best_of": 2}),
            "best_of",
        ),
        (
            Face::Completion,
            json!({"prompt": "p", "max_tokens": 0}),
            "max_tokens",
        ),
        (
            Face::Completion,
            json!({"prompt": "p", "min_tokens": 17}),
            "min_tokens",
        ),
        (
            Face::Completion,
            json!({"prompt": "p", "echo": true}),
            "echo",
        ),
        (
            Face::Completion,
            json!({"prompt": "p", "top_k": -2}),
            "top_k",
        ),
        (
            Face::Completion,
            json!({"prompt": "p", "logprobs": true}),
            "logprobs",
        ),
        (
            Face::Completion,
            json!({"prompt": "p", "logit_bias": {"x": 1}}),
            "logit_bias[x]",
        ),
        (
            Face::Completion,
            json!({"prompt": "p", "service_tier": "gold"}),
            "service_tier",
        ),
        (
            Face::Chat,
            json!({"messages": message, "top_logprobs": 3}),
            "top_logprobs",
        ),
        (
            Face::Completion,
            json!({"prompt": "p", "tools": tool}),
            "tools",
        ),
        (
            Face::Chat,
            json!({"messages": message, "tool_choice": "required"}),
            "tool_choice",
        ),
        (
            Face::Chat,
            json!({"messages": message, "modalities": ["audio"]}),
            "modalities",
        ),
        (
            Face::Chat,
            json!({"messages": image}),
            "messages[0].content[0].type",
        ),
    ] {
        let error = asked(face, &body).unwrap_err();
        let named = match &error {
            RequestError::Invalid(all) => &all.0[0].field,
            RequestError::Unsupported { field, .. } => field,
            other => panic!("{body}: {other}"),
        };
        assert_eq!(named, field, "{body}");
    }
    // Tools that are offered and not to be used change nothing.
    let none = json!({"messages": message, "tools": tool, "tool_choice": "none"});
    assert!(asked(Face::Chat, &none).unwrap().tools.is_none());
}
