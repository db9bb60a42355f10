//! What `transformers` and `tokenizers` make of the same input
//! (tests/make_vectors.py wrote the files).
#![allow(clippy::unwrap_used)]

use kvmesh_text::{
    Chat, Limits, Message, ModelText, TemplateError, TextFile, TextSettings, UnixSeconds,
};
use serde_json::Value;
use std::sync::atomic::AtomicBool;

static GO_ON: AtomicBool = AtomicBool::new(false);

fn data(name: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/data/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn vectors() -> Value {
    serde_json::from_slice(&data("vectors.json")).unwrap()
}

fn file(name: &str, bytes: Vec<u8>) -> TextFile {
    TextFile {
        name: name.to_owned(),
        bytes,
    }
}

fn model(tokenizer: &str, template: Option<&str>) -> ModelText {
    let mut files = vec![file("tokenizer.json", data(&format!("{tokenizer}.json")))];
    let config = r#"{"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}"#;
    files.push(file("tokenizer_config.json", config.as_bytes().to_vec()));
    if let Some(text) = template {
        files.push(file("chat_template.jinja", text.as_bytes().to_vec()));
    }
    ModelText::from_files(&files, &Limits::default()).unwrap()
}

fn chat(json: &Value) -> Chat {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let messages = json["messages"].as_array().unwrap().iter().map(|given| {
        let mut message = Message::new(
            text(&given["role"]).unwrap(),
            text(&given["content"]).unwrap(),
        );
        message.name = text(&given["name"]);
        message.tool_call_id = text(&given["tool_call_id"]);
        for call in given["tool_calls"].as_array().unwrap_or(&Vec::new()) {
            message.add_tool_call(&call.to_string()).unwrap();
        }
        message
    });
    let mut chat = Chat::new(messages.collect());
    chat.add_generation_prompt = json["add_generation_prompt"].as_bool().unwrap_or(true);
    for tool in json["tools"].as_array().unwrap_or(&Vec::new()) {
        chat.add_tool(&tool.to_string()).unwrap();
    }
    chat.set_arguments(&json["arguments"].to_string()).unwrap();
    chat
}

#[test]
fn chats_render_as_transformers_renders_them() {
    let vectors = vectors();
    let mut compared = 0;
    for vector in vectors["rendered"].as_array().unwrap() {
        let name = vector["template"].as_str().unwrap();
        let model = model("byte_level", vectors["templates"][name].as_str());
        let rendered = model.render_chat(&chat(&vector["chat"]), UnixSeconds(0));
        match vector["text"].as_str() {
            Some(text) => assert_eq!(rendered.as_deref(), Ok(text), "{name}: {}", vector["chat"]),
            None => {
                let message = vector["message"].as_str().unwrap().to_owned();
                assert_eq!(rendered, Err(TemplateError::Raised(message)), "{name}");
            }
        }
        compared += 1;
    }
    assert_eq!(compared, 35);
}

#[test]
fn texts_encode_and_decode_as_the_tokeniser_does() {
    let vectors = vectors();
    for (name, list) in vectors["encoded"].as_object().unwrap() {
        let model = model(name, None);
        for vector in list.as_array().unwrap() {
            let text = vector["text"].as_str().unwrap();
            let ids =
                |key: &str| -> Vec<u32> { serde_json::from_value(vector[key].clone()).unwrap() };
            assert_eq!(
                model.encode(text, &GO_ON).unwrap(),
                ids("ids"),
                "{name}: {text:?}"
            );
            assert_eq!(
                model.encode_rendered(text, &GO_ON).unwrap(),
                ids("plain_ids"),
                "{name}: {text:?}"
            );
            assert!(model.fewest_tokens(text.len()) <= ids("plain_ids").len());
            let mut stream = model.stream(&TextSettings::default()).unwrap();
            let mut out = String::new();
            assert_eq!(stream.push(&ids("ids"), &mut out), None);
            stream.finish(&mut out);
            assert_eq!(out, vector["decoded"].as_str().unwrap(), "{name}");
        }
    }
}

#[test]
fn a_raised_flag_ends_the_tokeniser() {
    let model = model("byte_level", None);
    let gone = AtomicBool::new(true);
    assert_eq!(
        model.encode("text", &gone),
        Err(kvmesh_text::EncodeError::Interrupted)
    );
}

fn render(template: &str) -> Result<String, TemplateError> {
    let chat = Chat::new(vec![Message::new("user", "hi")]);
    model("byte_level", Some(template)).render_chat(&chat, UnixSeconds(1_732_365_907))
}

#[test]
fn thoughts_of_an_assistant_reach_its_template() {
    let mut answer = Message::new("assistant", "Paris.");
    answer.reasoning_content = Some("So.".to_owned());
    let chat = Chat::new(vec![Message::new("user", "hi"), answer]);
    let template = "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content is defined %}\
        ({{ m.reasoning_content }}){% endif %}{{ m.content }} {% endfor %}";
    let rendered = model("byte_level", Some(template)).render_chat(&chat, UnixSeconds(0));
    assert_eq!(rendered.as_deref(), Ok("user:hi assistant:(So.)Paris. "));
}

#[test]
fn a_template_that_raises_says_so_in_at_most_a_kibibyte() {
    assert_eq!(
        render("{{ raise_exception('no such role') }}"),
        Err(TemplateError::Raised("no such role".to_owned()))
    );
    let Err(TemplateError::Raised(text)) = render("{{ raise_exception('é' * 5000) }}") else {
        panic!()
    };
    assert_eq!(text.len(), 1024);
}

#[test]
fn a_template_that_loops_runs_out_of_fuel() {
    let endless =
        "{% for i in range(10000) %}{% for j in range(10000) %}{{ i }}{% endfor %}{% endfor %}";
    assert_eq!(render(endless), Err(TemplateError::OutOfFuel));
    let growing = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}";
    assert_eq!(render(growing), Err(TemplateError::OutOfFuel));
}

#[test]
fn a_template_that_recurses_or_fails_is_an_error_of_its_own() {
    assert!(matches!(
        render("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"),
        Err(TemplateError::Failed(_) | TemplateError::OutOfFuel)
    ));
    assert!(matches!(
        render("{{ messages[0].content.nothing.more }}"),
        Err(TemplateError::Failed(_))
    ));
    assert!(matches!(
        render("{{ nothing() }}"),
        Err(TemplateError::Failed(_))
    ));
    assert_eq!(
        model("byte_level", None).render_chat(&Chat::new(Vec::new()), UnixSeconds(0)),
        Err(TemplateError::None)
    );
}

#[test]
fn a_template_with_a_syntax_error_is_refused_at_load() {
    let files = [
        file("tokenizer.json", data("byte_level.json")),
        file("chat_template.jinja", b"{% if %}".to_vec()),
    ];
    let refused = ModelText::from_files(&files, &Limits::default());
    assert!(
        matches!(refused, Err(kvmesh_text::LoadError::Malformed { .. })),
        "{refused:?}"
    );
}

#[test]
fn time_comes_from_the_caller() {
    assert_eq!(
        render("{{ strftime_now('%d %B %Y') }}").as_deref(),
        Ok("23 November 2024")
    );
}

#[test]
fn files_are_held_to_their_limits() {
    use kvmesh_text::LoadError;
    let limits = Limits {
        tokenizer_bytes: 100,
        ..Limits::default()
    };
    let tokenizer = || file("tokenizer.json", data("byte_level.json"));
    assert!(matches!(
        ModelText::from_files(&[tokenizer()], &limits),
        Err(LoadError::TooLarge { .. })
    ));
    let load = |files: &[TextFile]| ModelText::from_files(files, &Limits::default()).map(|_| ());
    assert_eq!(load(&[]), Err(LoadError::Missing("tokenizer.json")));
    assert_eq!(
        load(&[tokenizer(), file("x.py", Vec::new())]),
        Err(LoadError::Unexpected("x.py".to_owned()))
    );
    assert!(matches!(
        load(&[tokenizer(), tokenizer()]),
        Err(LoadError::Unexpected(_))
    ));
    assert!(matches!(
        load(&[file("tokenizer.json", b"{}".to_vec())]),
        Err(LoadError::Malformed { .. })
    ));
}

#[test]
fn the_digest_is_the_protocols() {
    // printf 'a\0\2\0\0\0\0\0\0\0hi' | sha256sum
    let files = [file("a", b"hi".to_vec())];
    assert_eq!(
        kvmesh_text::digest_of(&files),
        "6f04a0e470f1d305dcbda72cbcb27e61d409a3bec640ec1d960f58b32123671e"
    );
}

/// Files come from workers: none of them may cost more than its size allows.
#[test]
fn tokenisers_that_would_outgrow_their_files_are_refused() {
    use kvmesh_text::LoadError;
    let load = |change: &dyn Fn(&mut Value)| {
        let mut json: Value = serde_json::from_slice(&data("byte_fallback.json")).unwrap();
        change(&mut json);
        let files = [file("tokenizer.json", json.to_string().into_bytes())];
        ModelText::from_files(&files, &Limits::default()).map(|_| ())
    };
    assert_eq!(load(&|_| ()), Ok(()));
    let huge = |json: &mut Value| json["model"]["vocab"]["a"] = Value::from(4_000_000_000u32);
    assert!(matches!(load(&huge), Err(LoadError::Malformed { .. })));
    let long =
        |json: &mut Value| json["decoder"]["decoders"][0]["content"] = Value::from("x".repeat(65));
    assert!(matches!(load(&long), Err(LoadError::Decoder(_))));
    let empty =
        |json: &mut Value| json["decoder"]["decoders"][0]["pattern"]["String"] = Value::from("");
    assert!(matches!(load(&empty), Err(LoadError::Decoder(_))));
    let unknown = |json: &mut Value| json["decoder"] = serde_json::json!({"type": "CTC"});
    assert!(load(&unknown).is_err());
}

#[test]
fn special_tokens_that_are_to_be_kept_stay_in_the_text() {
    let model = model("byte_level", None);
    let ids = model
        .encode_rendered("<|im_start|>hi<|im_end|>", &GO_ON)
        .unwrap();
    let read = |kept: &[&str], special_tokens| {
        let settings = TextSettings {
            special_tokens,
            kept_special_tokens: kept.iter().map(ToString::to_string).collect(),
            ..TextSettings::default()
        };
        let mut stream = model.stream(&settings).unwrap();
        let mut out = String::new();
        assert_eq!(stream.push(&ids, &mut out), None);
        stream.finish(&mut out);
        out
    };
    assert_eq!(read(&[], false), "hi");
    // What no special token is changes nothing, also where it is a token.
    assert_eq!(read(&["<|im_end|>", "hi", "none"], false), "hi<|im_end|>");
    assert_eq!(read(&["<|im_end|>"], true), "<|im_start|>hi<|im_end|>");
}
