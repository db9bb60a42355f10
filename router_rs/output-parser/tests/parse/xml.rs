//! Calls whose parameters have tags: Qwen3-Coder and GLM.

use kvmesh_output_parser::{Event, ToolFormat};

use crate::{call, calls, content, events, native};

const TOLD: &str = "{\"city\": \"Köln \\\"am\\\" Rhein\\n<b>\", \"days\": 2, \"tags\": [\"a\", \"b\"], \
    \"exact\": true, \"near\": null}";

#[test]
fn qwens_parameters_are_typed_by_the_tools_schema() {
    let found = |text: &str| events(&native(ToolFormat::Qwen3Coder), "", text);
    let one = "<tool_call>\n<function=weather>\n<parameter=city>\nKöln \"am\" Rhein\n<b>\n</parameter>\n\
        <parameter=days>\n2\n</parameter>\n<parameter=tags>\n['a', 'b']\n</parameter>\n\
        <parameter=exact>\nTrue\n</parameter>\n<parameter=near>\nnull\n</parameter>\n</function>\n\
        </tool_call>";
    assert_eq!(found(one), call("weather", TOLD));
    let two = format!("I look.\n\n{one}\n<tool_call>\n<function=time>\n</function>\n</tool_call>");
    let mut expected = vec![content("I look.")];
    expected.extend(calls(&[("weather", TOLD), ("time", "{}")]));
    assert_eq!(found(&two), expected);
    // On one line, lines that are the value's own, an unknown tool, and several in one tag.
    for (text, name, arguments) in [
        (
            "<tool_call><function=weather><parameter=city>Paris</parameter></function></tool_call>",
            "weather",
            "{\"city\": \"Paris\"}",
        ),
        (
            "<tool_call><function=weather><parameter=city>\n\na\n\n</parameter></function></tool_call>",
            "weather",
            "{\"city\": \"\\na\\n\"}",
        ),
        (
            "<tool_call><function=weather><parameter=city>\n</parameter></function></tool_call>",
            "weather",
            "{\"city\": \"\"}",
        ),
        (
            "<tool_call><function=f><parameter=n>\n5\n</parameter>\n<parameter=s>five</parameter>\
             </function></tool_call>",
            "f",
            "{\"n\": 5, \"s\": \"five\"}",
        ),
    ] {
        assert_eq!(found(text), call(name, arguments), "{text}");
    }
    let both = "<tool_call><function=weather></function>\n<function=time></function></tool_call>.";
    let mut expected = calls(&[("weather", "{}"), ("time", "{}")]);
    expected.push(content("."));
    assert_eq!(found(both), expected);
}

#[test]
fn glms_parameters_are_typed_by_the_tools_schema() {
    let found = |text: &str| events(&native(ToolFormat::Glm45), "", text);
    let one = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln \"am\" Rhein\n<b></arg_value>\n\
        <arg_key>days</arg_key>\n<arg_value>2</arg_value>\n<arg_key>tags</arg_key>\n\
        <arg_value>[\"a\", \"b\"]</arg_value>\n<arg_key>exact</arg_key>\n<arg_value>true</arg_value>\n\
        <arg_key>near</arg_key>\n<arg_value>null</arg_value>\n</tool_call>";
    assert_eq!(found(one), call("weather", TOLD));
    // As GLM 4.7 has it, without lines; one without arguments; white space of a value.
    let two = "So.\n<tool_call>weather<arg_key>city</arg_key><arg_value> Paris\n</arg_value></tool_call>\
        <tool_call>time\n</tool_call>";
    let mut expected = vec![content("So.")];
    expected.extend(calls(&[
        ("weather", "{\"city\": \" Paris\\n\"}"),
        ("time", "{}"),
    ]));
    assert_eq!(found(two), expected);
    let unknown = "<tool_call>f\n<arg_key>a</arg_key><arg_value>{\"b\": 1}</arg_value></tool_call>";
    assert_eq!(found(unknown), call("f", "{\"a\": {\"b\": 1}}"));
}

#[test]
fn tags_that_a_model_forgets_end_with_the_next_one() {
    let qwen = |text: &str| events(&native(ToolFormat::Qwen3Coder), "", text);
    let told = "{\"city\": \"Paris\", \"days\": 3}";
    for text in [
        "<function=weather>\n<parameter=city>\nParis\n<parameter=days>\n3\n</function>\n</tool_call>",
        "<tool_call><function=weather><parameter=city>Paris</parameter><parameter=days>3</tool_call>",
        "<function=weather>\n{\"city\": \"Paris\", \"days\": 3}\n</function>",
    ] {
        assert_eq!(qwen(text), call("weather", told), "{text}");
    }
    let glm = |text: &str| events(&native(ToolFormat::Glm45), "", text);
    let text = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</tool_call>";
    assert_eq!(glm(text), call("weather", "{\"city\": \"Paris\"}"));
    // What is no parameter ends the call, and is not lost.
    let text = "<function=weather><parameter=city>Paris</parameter>\nor so</function>";
    let mut expected = calls(&[("weather", "{\"city\": \"Paris\"}")]);
    expected.push(content("or so</function>"));
    assert_eq!(qwen(text), expected);
}

#[test]
fn what_is_cut_off_leaves_its_arguments_open() {
    let whole = "<tool_call>\n<function=weather>\n<parameter=city>\nPa\"ris\n</parameter>\n\
        <parameter=days>\n12\n</parameter>\n</function>\n</tool_call>";
    let last = whole.find("</function>").unwrap() + "</function>".len();
    let said = "{\"city\": \"Pa\\\"ris\", \"days\": 12}";
    for at in 0..whole.len() {
        let found = events(&native(ToolFormat::Qwen3Coder), "", &whole[..at]);
        let told: String = found
            .iter()
            .filter_map(|event| match event {
                Event::Arguments(told) => Some(told.as_str()),
                _ => None,
            })
            .collect();
        let is_call = matches!(found.first(), Some(Event::Call { .. }));
        assert!(said.starts_with(&told), "{told} of {}", &whole[..at]);
        assert_eq!(told == said, at >= last, "{}", &whole[..at]);
        let content = found.iter().any(|event| matches!(event, Event::Content(_)));
        assert!(!(is_call && content && at < last), "{}", &whole[..at]);
    }
}

/// A long text is told as it comes.
#[test]
fn text_is_not_held_back() {
    use kvmesh_output_parser::{Events, OutputParser};
    for (format, begin) in [
        (
            ToolFormat::Qwen3Coder,
            "<tool_call><function=weather><parameter=city>",
        ),
        (
            ToolFormat::Glm45,
            "<tool_call>weather\n<arg_key>city</arg_key><arg_value>",
        ),
    ] {
        let mut parser = OutputParser::new(&native(format), "");
        let mut out = Events::default();
        parser.push(begin, &mut out);
        parser.push("Paris", &mut out);
        assert_eq!(
            out.as_slice(),
            call("weather", "{\"city\": \"Paris"),
            "{format}"
        );
        assert!(out.within_call());
    }
}
