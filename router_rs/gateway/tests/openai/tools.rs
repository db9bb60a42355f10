//! Tool calls, reasoning and answers held to a grammar: from the fields of a call to what a
//! worker is told, and from what it says to what a client reads.

use std::sync::Arc;

use kvmesh_testkit::{mock::MockConfig, vocabulary::Vocabulary};
use kvmesh_wire::v1::grammar::Kind;
use serde_json::{Value, json};

use crate::{
    common::Mesh,
    http1::{CHAT, COMPLETIONS, post},
};

/// ChatML with tools, their calls and what they answered; it speaks of Hermes's marks.
const TEMPLATE: &str = "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}\
    {% endfor %}</tools>{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}\
    {{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>\
    {{ call.function | tojson }}</tool_call>{% endfor %}{% if message.tool_call_id %} for \
    {{ message.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}\
    <|im_start|>assistant\n{% if thinking %}<think>\n{% endif %}{% endif %}{# </think> #}";
const MARKS: [&str; 4] = ["<tool_call>", "</tool_call>", "<think>", "</think>"];

pub(crate) fn worker(template: &str, marks: &[&str]) -> MockConfig {
    MockConfig {
        vocabulary: Arc::new(Vocabulary::built_in_for(template, marks)),
        grammars: true,
        max_logprobs: 20,
        ..MockConfig::default()
    }
}

async fn mesh() -> Mesh {
    Mesh::start(vec![worker(TEMPLATE, &MARKS)], json!({})).await
}

fn tools() -> Value {
    let city = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    json!([
        {"type": "function", "function": {"name": "weather", "parameters": city}},
        {"type": "function", "function": {"name": "time"}},
    ])
}

/// A question, with more fields.
fn question(more: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "How is it in Paris?"}]});
    let fields = body.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    body
}

/// A message put together from a stream, as clients do it, and why it ended.
fn gathered(events: &[Value]) -> (Value, String) {
    let mut calls: Vec<Value> = Vec::new();
    let (mut content, mut reasoning) = (String::new(), String::new());
    let mut reason = String::new();
    for event in events {
        let choice = &event["choices"][0];
        let delta = &choice["delta"];
        content += delta["content"].as_str().unwrap_or_default();
        assert_eq!(delta["reasoning"], delta["reasoning_content"]);
        reasoning += delta["reasoning"].as_str().unwrap_or_default();
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            let arguments = call["function"]["arguments"].as_str().unwrap();
            if index == calls.len() {
                assert_eq!(call["type"], "function");
                let function = json!({"name": call["function"]["name"], "arguments": arguments});
                calls.push(json!({"id": call["id"], "type": "function", "function": function}));
            } else {
                assert_eq!(index + 1, calls.len(), "calls come one after the other");
                assert!(call.get("id").is_none() && call["function"].get("name").is_none());
                let before = calls[index]["function"]["arguments"].as_str().unwrap();
                calls[index]["function"]["arguments"] = json!(format!("{before}{arguments}"));
            }
        }
        reason += choice["finish_reason"].as_str().unwrap_or_default();
    }
    let message = json!({"content": content, "reasoning": reasoning, "tool_calls": calls});
    (message, reason)
}

/// The same of a whole answer.
fn whole(answer: &Value) -> (Value, String) {
    let choice = &answer["choices"][0];
    let message = &choice["message"];
    assert_eq!(message["role"], "assistant");
    let text = |key: &str| message[key].as_str().unwrap_or_default().to_owned();
    assert_eq!(text("reasoning"), text("reasoning_content"));
    let calls = message.get("tool_calls").cloned().unwrap_or(json!([]));
    let message =
        json!({"content": text("content"), "reasoning": text("reasoning"), "tool_calls": calls});
    (
        message,
        choice["finish_reason"].as_str().unwrap().to_owned(),
    )
}

/// Takes the ids of calls out; each has to be another one.
fn without_ids(mut message: Value) -> Value {
    let mut ids = std::collections::BTreeSet::new();
    for call in message["tool_calls"].as_array_mut().unwrap() {
        let id = call.as_object_mut().unwrap().remove("id").unwrap();
        assert!(ids.insert(id.as_str().unwrap().to_owned()));
    }
    message
}

pub(crate) fn call(name: &str, arguments: &str) -> Value {
    json!({"type": "function", "function": {"name": name, "arguments": arguments}})
}

/// What a model that says this answers to this question, streamed and whole.
pub(crate) async fn answered(mesh: &Mesh, says: &str, more: &Value) -> (Value, String) {
    for worker in &mesh.workers {
        worker.say(Some(says));
    }
    let mut body = question(more);
    let (message, reason) = whole(&post(mesh, CHAT, &body).await.json());
    body["stream"] = json!(true);
    let (streamed, streamed_reason) = gathered(&post(mesh, CHAT, &body).await.events());
    let message = without_ids(message);
    assert_eq!(without_ids(streamed), message);
    assert_eq!(streamed_reason, reason);
    (message, reason)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_told_streamed_and_whole() {
    let mesh = mesh().await;
    let weather = "{\"city\": \"Köln\", \"days\": [1, 2]}";
    let says = format!(
        "One moment.\n<tool_call>\n{{\"name\": \"weather\", \"arguments\": {weather}}}\n\
         </tool_call>\n<tool_call>\n{{\"name\": \"time\", \"arguments\": {{bad}}}}\n</tool_call>"
    );
    let both = json!([call("weather", weather), call("time", "{bad}")]);
    let expected = json!({"content": "One moment.", "reasoning": "", "tool_calls": both});
    let offered = json!({"tools": tools(), "tool_choice": "auto"});
    let told = answered(&mesh, &says, &offered).await;
    assert_eq!(told, (expected, "tool_calls".to_owned()));

    let single = json!({"tools": tools(), "parallel_tool_calls": false});
    let (message, _) = answered(&mesh, &says, &single).await;
    assert_eq!(message["tool_calls"], json!([call("weather", weather)]));
    // Cut off within the arguments.
    let short = json!({"tools": tools(), "max_tokens": says.find("[1").unwrap() - 18});
    let (message, reason) = answered(&mesh, &says, &short).await;
    let arguments = &message["tool_calls"][0]["function"]["arguments"];
    assert!(
        weather.starts_with(arguments.as_str().unwrap()),
        "{arguments}"
    );
    assert_eq!(reason, "length");
    // What is no call, and what was not asked for.
    let (message, reason) = answered(&mesh, "<tool_call>no</tool_call>", &offered).await;
    assert_eq!(
        (&message["content"], reason.as_str()),
        (&json!("<tool_call>no</tool_call>"), "stop")
    );
    let none = json!({"tools": tools(), "tool_choice": "none", "skip_special_tokens": false});
    let (message, _) = answered(&mesh, &says, &none).await;
    assert_eq!(message["tool_calls"], json!([]));
    assert!(message["content"].as_str().unwrap().contains("<tool_call>"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_is_told_of_tools_of_calls_of_thoughts_and_of_what_was_answered() {
    let mesh = mesh().await;
    let called = json!({"id": "call_1", "type": "function",
        "function": {"name": "weather", "arguments": "{\"city\": \"Paris\"}"}});
    let body = json!({"tools": tools(), "messages": [
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": null, "reasoning_content": "I ask.", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "assistant", "content": "It rains.", "reasoning": "So it does."},
        {"role": "user", "content": "Why?"}]});
    let ids = post(&mesh, "/tokenize", &body).await.json()["tokens"].clone();
    let prompt = post(&mesh, "/detokenize", &json!({"tokens": ids}))
        .await
        .json()["prompt"]
        .clone();
    let prompt = prompt.as_str().unwrap();
    for part in [
        "<tools>{\"type\": \"function\", \"function\": {\"name\": \"weather\"",
        "<|im_start|>assistant\n<think>I ask.</think><tool_call>{\"name\": \"weather\", \
         \"arguments\": {\"city\": \"Paris\"}}</tool_call>",
        "<|im_start|>assistant\n<think>So it does.</think>It rains.<|im_end|>",
        "<|im_start|>user\nWhy?<|im_end|>",
        "<|im_start|>tool\nrain for call_1<|im_end|>",
    ] {
        assert!(prompt.contains(part), "{part} is not in {prompt}");
    }
    let usage = post(&mesh, CHAT, &body).await.json()["usage"].clone();
    assert_eq!(usage["prompt_tokens"], ids.as_array().unwrap().len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forced_call_is_held_to_a_grammar_where_the_engine_can() {
    let mesh = mesh().await;
    let grammar = || {
        let continuation = mesh.workers[0].last_place().unwrap().continuation.unwrap();
        let Some(Kind::JsonSchema(schema)) = continuation.grammar.and_then(|g| g.kind) else {
            panic!("no schema");
        };
        serde_json::from_str::<Value>(&schema).unwrap()
    };
    let required = json!({"tools": tools(), "tool_choice": "required", "thinking": true});
    let says = "[{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}, \
        {\"name\": \"time\", \"parameters\": {}}]";
    let both = json!([call("weather", "{\"city\": \"Paris\"}"), call("time", "{}")]);
    let expected = json!({"content": "", "reasoning": "", "tool_calls": both});
    let told = answered(&mesh, says, &required).await;
    assert_eq!(told, (expected, "tool_calls".to_owned()));
    let schema = grammar();
    assert_eq!(
        schema["items"]["anyOf"][0]["properties"]["name"]["enum"],
        json!(["weather"])
    );
    assert_eq!(
        (&schema["type"], &schema["minItems"]),
        (&json!("array"), &json!(1))
    );

    let named = json!({"type": "function", "function": {"name": "weather"}});
    let named = json!({"tools": tools(), "tool_choice": named});
    let (message, reason) = answered(&mesh, "{\"city\": \"Paris\"}", &named).await;
    let one = json!([call("weather", "{\"city\": \"Paris\"}")]);
    assert_eq!(
        (&message["tool_calls"], reason.as_str()),
        (&one, "tool_calls")
    );
    assert_eq!(grammar(), tools()[0]["function"]["parameters"]);

    let cannot = MockConfig {
        grammars: false,
        ..worker(TEMPLATE, &MARKS)
    };
    let mesh = Mesh::start(vec![cannot], json!({})).await;
    for body in [question(&required), question(&named)] {
        let refused = post(&mesh, CHAT, &body).await;
        let wanted = (
            400,
            "unsupported_parameter".to_owned(),
            json!("tool_choice"),
        );
        assert_eq!(refused.error(), wanted);
        assert!(
            refused.body.contains("cannot constrain its output"),
            "{}",
            refused.body
        );
    }
    let (message, _) = answered(&mesh, "Hi", &json!({"tools": tools()})).await;
    assert_eq!(message["content"], "Hi");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_format_reaches_the_worker_as_its_grammar() {
    let mesh = mesh().await;
    let schema = json!({"type": "object", "properties": {"z": {"type": "integer"}, "a": {}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    for (format, expected) in [
        (json!({"type": "json_object"}), Some(Kind::JsonObject(true))),
        (format, Some(Kind::JsonSchema(schema.to_string()))),
        (json!({"type": "text"}), None),
    ] {
        let more = json!({"response_format": format, "max_tokens": 30});
        // A prompt that opened reasoning cannot have it with a grammar from the first token on.
        let mut opened = more.clone();
        opened["chat_template_kwargs"] = json!({"thinking": true});
        let place = if expected.is_some() {
            "content"
        } else {
            "reasoning"
        };
        for says in ["12", "true", "{\"z\": 1}"] {
            let (message, _) = answered(&mesh, says, &opened).await;
            assert_eq!(message[place], says);
        }
        let says = "{\"z\": 1}";
        let (message, _) = answered(&mesh, says, &more).await;
        assert_eq!(message["content"], says);
        let told = mesh.workers[0].last_place().unwrap().continuation.unwrap();
        assert_eq!(told.grammar.and_then(|grammar| grammar.kind), expected);
        let completion = json!({"prompt": "p", "response_format": format, "max_tokens": 30});
        assert_eq!(
            post(&mesh, COMPLETIONS, &completion).await.json()["choices"][0]["text"],
            says
        );
        let told = mesh.workers[0].last_place().unwrap().continuation.unwrap();
        assert_eq!(told.grammar.and_then(|grammar| grammar.kind), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reasoning_is_told_apart_whoever_opened_it() {
    let mesh = mesh().await;
    let expected = json!({"content": "Paris.", "reasoning": "So.\nYes", "tool_calls": []});
    for (says, thinking) in [
        ("<think>\nSo.\nYes\n</think>\n\nParis.", false),
        ("So.\nYes\n</think>\n\nParis.", true),
    ] {
        let more = json!({"chat_template_kwargs": {"thinking": thinking}});
        let told = answered(&mesh, says, &more).await;
        assert_eq!(told, (expected.clone(), "stop".to_owned()));
    }
    let (message, _) = answered(&mesh, "Paris.", &json!({})).await;
    assert_eq!(message["content"], "Paris.");
    // With log-probabilities each message of tokens has its own, also where nothing is told.
    mesh.workers[0].say(Some("<think>a</think> b"));
    let body = question(&json!({"logprobs": true, "stream": true,
        "stream_options": {"include_usage": true}}));
    let mut events = post(&mesh, CHAT, &body).await.events();
    let usage = events.pop().unwrap()["usage"].clone();
    let tokens = events.iter().map(|event| {
        let content = event["choices"][0]["logprobs"]["content"].as_array();
        content.map_or(0, Vec::len)
    });
    assert_eq!(tokens.sum::<usize>(), usage["completion_tokens"]);
    let (message, _) = gathered(&events);
    assert_eq!(
        (&message["reasoning"], &message["content"]),
        (&json!("a"), &json!("b"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn marks_that_are_special_tokens_are_read_and_other_special_tokens_are_not_told() {
    let marks = [
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|constrain|>",
        "<|end|>",
        "<|call|>",
    ];
    let template = "<|start|>{{ messages[0].content }}<|channel|><|message|><|end|>\
        <|start|>assistant";
    let mesh = Mesh::start(vec![worker(template, &marks)], json!({})).await;
    let says = "<|channel|>analysis<|message|>It <|im_start|>asks.<|end|><|start|>assistant\
        <|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\": 1}<|call|>";
    let calls = json!([call("weather", "{\"city\": 1}")]);
    let expected = json!({"content": "", "reasoning": "It asks.", "tool_calls": calls});
    let told = answered(&mesh, says, &json!({"tools": tools()})).await;
    assert_eq!(told, (expected, "tool_calls".to_owned()));
    let says = "<|channel|>final<|message|>It rains.";
    let (message, _) = answered(&mesh, says, &json!({})).await;
    assert_eq!(message["content"], "It rains.");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_moves_to_another_worker_is_read_once() {
    let workers = vec![worker(TEMPLATE, &MARKS), worker(TEMPLATE, &MARKS)];
    let mesh = Mesh::start(workers, json!({})).await;
    mesh.wait_figure("kvmesh_sessions{state=\"live\"}", 2).await;
    let arguments = "{\"city\": \"Paris\", \"why\": \"it rains there\"}";
    let says = format!(
        "<think>So.</think>\nLook:\n<tool_call>{{\"name\": \"weather\", \"arguments\": {arguments}}}\
         </tool_call>"
    );
    for worker in &mesh.workers {
        worker.say(Some(&says));
    }
    let expected = json!({"content": "Look:", "reasoning": "So.",
        "tool_calls": [call("weather", arguments)]});
    // Within a mark, the name and the arguments; whichever worker has it gives it back.
    for at in [3, 16, 40, 60] {
        let mut body = question(&json!({"tools": tools()}));
        for stream in [false, true] {
            for worker in &mesh.workers {
                let plan = (Some(at), 1);
                worker
                    .faults()
                    .set(|faults| (faults.return_at, faults.return_next) = plan);
            }
            body["stream"] = json!(stream);
            let answer = post(&mesh, CHAT, &body).await;
            let left = mesh.workers.iter().map(|w| w.faults().get().return_next);
            assert!(left.sum::<u32>() < 2, "nothing was given back at {at}");
            let (message, reason) = match stream {
                true => gathered(&answer.events()),
                false => whole(&answer.json()),
            };
            assert_eq!(
                (without_ids(message), reason.as_str()),
                (expected.clone(), "tool_calls")
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_setting_says_how_a_model_writes_calls() {
    let plain = Vocabulary::built_in();
    let config = || MockConfig {
        vocabulary: Arc::new(plain.clone()),
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![config()], json!({})).await;
    let refused = post(&mesh, CHAT, &question(&json!({"tools": tools()}))).await;
    let wanted = (400, "unsupported_parameter".to_owned(), json!("tools"));
    assert_eq!(refused.error(), wanted);
    assert!(refused.body.contains("tool_parser"), "{}", refused.body);
    let settings = json!({"tool_parser": "none, mock=mistral", "reasoning_parser": "think"});
    let mesh = Mesh::start(vec![config()], settings).await;
    let says = "<think>x</think>[TOOL_CALLS][{\"name\": \"time\", \"arguments\": {}}]";
    let (message, _) = answered(&mesh, says, &json!({"tools": tools()})).await;
    let expected = json!({"content": "", "reasoning": "x", "tool_calls": [call("time", "{}")]});
    assert_eq!(message, expected);
    mesh.workers[0].say(Some("[TOOL_CALLS]time{}"));
    let answer = post(&mesh, CHAT, &question(&json!({"tools": tools()})))
        .await
        .json();
    let id = answer["choices"][0]["message"]["tool_calls"][0]["id"].clone();
    let id = id.as_str().unwrap();
    // Templates of Mistral take no others.
    assert!(
        id.len() == 9 && id.bytes().all(|b| b.is_ascii_alphanumeric()),
        "{id}"
    );
}
