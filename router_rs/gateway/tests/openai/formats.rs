//! Formats of calls that are no JSON, and answers that end within a call.

use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::v1::grammar::Kind;
use serde_json::{Value, json};

use crate::{
    common::Mesh,
    http1::{CHAT, post},
    tools::{answered, call, worker},
};

const MESSAGES: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";

/// A tool whose parameters are of several types, and one without any.
fn tools() -> Value {
    let schema = json!({"type": "object", "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    }});
    json!([
        {"type": "function", "function": {"name": "weather", "parameters": schema}},
        {"type": "function", "function": {"name": "time"}},
    ])
}

/// A model that writes calls of both like this.
async fn both_are_read(configs: Vec<MockConfig>, settings: Value, says: &str) {
    let mesh = Mesh::start(configs, settings).await;
    let weather = "{\"city\": \"Köln \\\"am\\\" Rhein\", \"days\": 2, \"tags\": [\"a\", \"b\"]}";
    let calls = json!([call("weather", weather), call("time", "{}")]);
    let expected = json!({"content": "", "reasoning": "", "tool_calls": calls});
    let told = answered(&mesh, says, &json!({"tools": tools()})).await;
    assert_eq!(told, (expected, "tool_calls".to_owned()));
    // And one that says something else.
    let (message, reason) = answered(&mesh, "It rains.", &json!({"tools": tools()})).await;
    assert_eq!(
        (&message["content"], reason.as_str()),
        (&json!("It rains."), "stop")
    );
}

const QWEN: &str = "<tool_call>\n<function=weather>\n<parameter=city>\nKöln \"am\" Rhein\n</parameter>\n\
    <parameter=days>\n2\n</parameter>\n<parameter=tags>\n[\"a\", \"b\"]\n</parameter>\n</function>\n\
    </tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_of_qwen3_coder_are_read() {
    let template = format!("{MESSAGES}{{# <tool_call>\n<function=f>\n<parameter=p> #}}");
    let marks = ["<tool_call>", "</tool_call>"];
    both_are_read(vec![worker(&template, &marks)], json!({}), QWEN).await;
    // Named by the setting, where the template says nothing.
    let settings = json!({"tool_parser": "mock=qwen3_coder"});
    both_are_read(vec![worker(MESSAGES, &marks)], settings, QWEN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_of_glm_are_read() {
    let template = format!("{MESSAGES}{{# <tool_call> <arg_key> #}}");
    let marks = [
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ];
    let says = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln \"am\" Rhein</arg_value>\n\
        <arg_key>days</arg_key>\n<arg_value>2</arg_value>\n<arg_key>tags</arg_key>\n\
        <arg_value>[\"a\", \"b\"]</arg_value>\n</tool_call>\n<tool_call>time\n</tool_call>";
    both_are_read(vec![worker(&template, &marks)], json!({}), says).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pythonic_calls_are_read() {
    let template = format!("{MESSAGES}{{# [func_name1(params_name1=params_value1), f(p)] #}}");
    let marks = ["<|python_start|>", "<|python_end|>"];
    let list = "[weather(city='Köln \"am\" Rhein', days=2, tags=[\"a\", 'b']), time()]";
    for says in [
        list.to_owned(),
        format!("<|python_start|>{list}<|python_end|>"),
    ] {
        both_are_read(vec![worker(&template, &marks)], json!({}), &says).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_string_among_arguments_ends_no_call() {
    let template = format!("{MESSAGES}{{# <tool_call> #}}");
    let marks = ["<tool_call>", "</tool_call>"];
    let mesh = Mesh::start(vec![worker(&template, &marks)], json!({})).await;
    let says = "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}</tool_call>\
        <tool_call>{\"name\": \"time\", \"arguments\": {\"zone\": \"UTC\"}}</tool_call> STOP it";
    for (stop, parallel, arguments, ends) in [
        ("Paris", true, &["{\"city\": \""][..], "stop"),
        (
            "UTC",
            true,
            &["{\"city\": \"Paris\"}", "{\"zone\": \""],
            "stop",
        ),
        // The one that is told has come to its end.
        ("UTC", false, &["{\"city\": \"Paris\"}"], "tool_calls"),
        (
            "STOP",
            true,
            &["{\"city\": \"Paris\"}", "{\"zone\": \"UTC\"}"],
            "tool_calls",
        ),
        (
            "nowhere",
            true,
            &["{\"city\": \"Paris\"}", "{\"zone\": \"UTC\"}"],
            "tool_calls",
        ),
    ] {
        let more = json!({"tools": tools(), "stop": stop, "parallel_tool_calls": parallel});
        let (message, reason) = answered(&mesh, says, &more).await;
        let calls = message["tool_calls"].as_array().unwrap();
        let told = calls.iter().map(|call| &call["function"]["arguments"]);
        assert_eq!(told.collect::<Vec<_>>(), arguments, "{stop}");
        assert_eq!(reason, ends, "{stop}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn arguments_of_a_tool_that_says_nothing_of_them_are_held_to_an_object() {
    let template = format!("{MESSAGES}{{# <tool_call> #}}");
    let mesh = Mesh::start(vec![worker(&template, &[])], json!({})).await;
    let tool = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    let named = json!({"type": "function", "function": {"name": "f"}});
    for (choice, says, place) in [
        (named, "{\"a\": 1}", ""),
        (
            json!("required"),
            "[{\"name\": \"f\", \"parameters\": {\"a\": 1}}]",
            "/items/anyOf/0/properties/parameters",
        ),
    ] {
        let more = json!({"tools": tool, "tool_choice": choice});
        let (message, _) = answered(&mesh, says, &more).await;
        assert_eq!(message["tool_calls"], json!([call("f", "{\"a\": 1}")]));
        let continuation = mesh.workers[0].last_place().unwrap().continuation.unwrap();
        let Some(Kind::JsonSchema(schema)) = continuation.grammar.and_then(|g| g.kind) else {
            panic!("no schema");
        };
        let schema: Value = serde_json::from_str(&schema).unwrap();
        assert_eq!(schema.pointer(place), Some(&json!({"type": "object"})));
    }
}

/// Templates of DeepSeek append arguments to other text, as OpenAI has them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_turn_after_a_call_is_rendered_also_where_arguments_are_text() {
    let template = "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}\
        {% for call in message.tool_calls or [] %}\
        {{ call.function.name + ': ' + call.function.arguments }}{% endfor %}\
        {{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";
    let mesh = Mesh::start(vec![worker(template, &[])], json!({})).await;
    let arguments = "{\"city\":  \"Paris\"}";
    let mut called = call("weather", arguments);
    called["id"] = json!("call_1");
    let body = json!({"max_tokens": 3, "messages": [
        {"role": "user", "content": "How is it in Paris?"},
        {"role": "assistant", "content": null, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]});
    let ids = post(&mesh, "/tokenize", &body).await.json()["tokens"].clone();
    let told = post(&mesh, "/detokenize", &json!({"tokens": ids})).await;
    let prompt = told.json()["prompt"].as_str().unwrap().to_owned();
    let turn = format!("<|im_start|>assistant\nweather: {arguments}<|im_end|>");
    assert!(prompt.contains(&turn), "{prompt}");
    let answer = post(&mesh, CHAT, &body).await;
    assert_eq!(answer.head.status, 200, "{}", answer.body);
}
