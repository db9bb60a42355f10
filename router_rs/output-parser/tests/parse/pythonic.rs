//! Calls as Python has them: Llama 3.2 and 4.

use kvmesh_output_parser::ToolFormat;

use crate::{call, calls, content, events, native};

fn found(text: &str) -> Vec<kvmesh_output_parser::Event> {
    events(&native(ToolFormat::Pythonic), "", text)
}

#[test]
fn pythonic_calls_are_the_answer_itself() {
    let one = "weather(city='Köln)', days=-2, tags=[\"a\", 'it\\'s'], exact=True, near=None)";
    let told = "{\"city\": \"Köln)\", \"days\": -2, \"tags\": [\"a\", \"it's\"], \"exact\": true, \
        \"near\": null}";
    assert_eq!(found(&format!("[{one}]")), call("weather", told));
    let both = calls(&[("weather", told), ("time", "{}")]);
    for text in [
        format!("[{one}, time()]"),
        format!(" [ {one} ,\n time ( ) ]\n"),
        format!("<|python_start|>[{one}, time()]<|python_end|>"),
        format!("<|python_tag|>[{one}, time()]"),
    ] {
        assert_eq!(found(&text), both, "{text}");
    }
    let mut behind = vec![content("Well.")];
    behind.extend(both.clone());
    behind.push(content("Done."));
    let text = format!("Well.\n<|python_start|>[{one}, time()]<|python_end|>\nDone.");
    assert_eq!(found(&text), behind);
}

#[test]
fn brackets_and_quotes_within_strings_end_nothing() {
    for (python, json) in [
        ("city=\")]'\"", "{\"city\": \")]'\"}"),
        (
            "city='''a ) \"b\" 'c' '''",
            "{\"city\": \"a ) \\\"b\\\" 'c' \"}",
        ),
        ("city=\"\", days=1", "{\"city\": \"\", \"days\": 1}"),
        (
            "city='\\\\', days=(1, 2)",
            "{\"city\": \"\\\\\", \"days\": [1, 2]}",
        ),
        (
            "near={'a': {'b': [(1)]}}",
            "{\"near\": {\"a\": {\"b\": [[1]]}}}",
        ),
    ] {
        assert_eq!(
            found(&format!("[weather({python})]")),
            call("weather", json),
            "{python}"
        );
    }
}

#[test]
fn what_is_no_python_is_passed_on_as_it_was_written() {
    for arguments in ["\"Paris\"", "city=", "city=1 2", "**{'a': 1}"] {
        let text = format!("[weather({arguments})]");
        assert_eq!(found(&text), call("weather", arguments), "{text}");
    }
    // Cut off, also within a string.
    assert_eq!(found("[weather(city='Par"), call("weather", "city='Par"));
    // Behind a call what names no tool is content.
    let mut expected = calls(&[("time", "{}")]);
    expected.push(content(", other(a=1)]"));
    assert_eq!(found("[time(), other(a=1)]"), expected);
}
