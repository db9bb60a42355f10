//! Calls of earlier turns, in the form that a model's template takes.
#![allow(clippy::unwrap_used)]

use kvmesh_text::{Chat, Limits, Message, ModelText, TextFile, UnixSeconds};
use serde_json::json;

/// As a client wrote them: not as anything here would.
const SENT: &str = "{\"city\":  \"Köln\",\"days\":2}";

fn model(template: &str) -> ModelText {
    let path = format!("{}/tests/data/byte_level.json", env!("CARGO_MANIFEST_DIR"));
    let file = |name: &str, bytes: Vec<u8>| TextFile {
        name: name.to_owned(),
        bytes,
    };
    let files = [
        file("tokenizer.json", std::fs::read(path).unwrap()),
        file("chat_template.jinja", template.as_bytes().to_vec()),
    ];
    ModelText::from_files(&files, &Limits::default()).unwrap()
}

/// The second turn of a conversation in which the model called, with these arguments.
fn rendered(template: &str, arguments: &serde_json::Value) -> String {
    let call = json!({"id": "c", "type": "function",
        "function": {"name": "weather", "arguments": arguments}});
    let mut calling = Message::new("assistant", "");
    calling.add_tool_call(&call.to_string()).unwrap();
    let mut answer = Message::new("tool", "rain");
    answer.tool_call_id = Some("c".to_owned());
    let chat = Chat::new(vec![Message::new("user", "hi"), calling, answer]);
    let text = model(template).render_chat(&chat, UnixSeconds(0));
    text.unwrap()
}

/// One that appends arguments to other text fails with a mapping.
const APPENDS: &str = "{% for m in messages %}{% for c in m.tool_calls or [] %}\
    {{ 'call ' + c.function.name + ' ' + c.function.arguments + ';' }}{% endfor %}\
    {{ m.role + ':' + m.content + ' ' }}{% endfor %}";
/// And one that looks at them fails with text.
const LOOKS: &str = "{% for m in messages %}{% for c in m.tool_calls or [] %}\
    call {{ c.function.name }}{% for key, value in c.function.arguments.items() %} \
    {{ key }}={{ value }}{% endfor %};{% endfor %}{{ m.role }}:{{ m.content }} {% endfor %}";

#[test]
fn a_template_that_appends_arguments_to_text_gets_what_the_client_sent() {
    let expected =
        |arguments: &str| format!("user:hi call weather {arguments};assistant: tool:rain ");
    assert_eq!(rendered(APPENDS, &json!(SENT)), expected(SENT));
    // An object becomes the text that `tojson` makes of it.
    let object = json!({"city": "Köln", "days": 2});
    let written = "{\"city\": \"Köln\", \"days\": 2}";
    assert_eq!(rendered(APPENDS, &object), expected(written));
    assert_eq!(rendered(APPENDS, &json!("{bad")), expected("{bad"));
}

#[test]
fn a_template_that_looks_at_arguments_gets_a_mapping() {
    let expected = "user:hi call weather city=Köln days=2;assistant: tool:rain ";
    let object = json!({"city": "Köln", "days": 2});
    for arguments in [json!(SENT), object.clone()] {
        assert_eq!(rendered(LOOKS, &arguments), expected);
        // Also where it could do with either.
        let written = "{% for m in messages %}{% for c in m.tool_calls or [] %}\
            {{ c.function.arguments | tojson }}{% endfor %}{% endfor %}";
        assert_eq!(
            rendered(written, &arguments),
            "{\"city\": \"Köln\", \"days\": 2}"
        );
    }
}

#[test]
fn a_template_that_looks_for_calls_where_nothing_is_said_finds_them() {
    let silent = "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}\
        {% for c in m.tool_calls %}{{ 'call ' + c.function.arguments }}{% endfor %}\
        {% else %}{{ m.role + ':' + m.content }}{% endif %} {% endfor %}";
    let expected = format!("user:hi call {SENT} tool:rain ");
    assert_eq!(rendered(silent, &json!(SENT)), expected);
}

#[test]
fn one_that_knows_no_calls_is_rendered_as_ever() {
    let plain = "{% for m in messages %}{{ m.role + ':' + m.content + ' ' }}{% endfor %}";
    assert_eq!(
        rendered(plain, &json!(SENT)),
        "user:hi assistant: tool:rain "
    );
    let refuses = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}".to_owned() + LOOKS;
    let expected = "user:hi call weather city=Köln days=2;assistant: tool:rain ";
    assert_eq!(rendered(&refuses, &json!(SENT)), expected);
}
