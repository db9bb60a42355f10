//! Calls by their formats, of those that have them in JSON.

use kvmesh_output_parser::{
    Calls, Event, Events, Expected, OutputParser, ReasoningFormat, ToolFormat,
};

use crate::{call, calls, content, events, native, reasoning};

#[test]
fn hermes_calls_are_objects_between_tags() {
    let found = |text: &str| events(&native(ToolFormat::Hermes), "", text);
    let one = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln {\\\"\"}}\n</tool_call>";
    let told = "{\"city\": \"Köln {\\\"\"}";
    assert_eq!(found(one), call("weather", told));
    let two = format!("Let me see.\n\n{one}\n{one}\n");
    let mut expected = vec![content("Let me see.")];
    expected.extend(calls(&[("weather", told), ("weather", told)]));
    assert_eq!(found(&two), expected);
    // Arguments first, and none at all.
    let turned = "<tool_call>{\"arguments\": {\"a\": [1, 2]}, \"name\": \"time\"}</tool_call> done";
    let mut expected = calls(&[("time", "{\"a\": [1, 2]}")]);
    expected.push(content("done"));
    assert_eq!(found(turned), expected);
    assert_eq!(
        found("<tool_call>{\"name\": \"time\"}</tool_call>"),
        call("time", "{}")
    );
}

#[test]
fn what_a_model_got_wrong_is_passed_on_as_it_wrote_it() {
    let found = |text: &str| events(&native(ToolFormat::Hermes), "", text);
    for (arguments, rest) in [
        ("{\"a\": 1,, 'b'}", "}\n</tool_call>"),
        ("{\"a\": nope}", "\n</tool_call>"),
        ("{\"a\": [1}\n", "</tool_call>"),
        ("\"{\\\"a\\\": 1}\"", "}</tool_call>"),
        ("null", "}</tool_call>"),
        ("{\"a\": \"never closed</tool_call>", ""),
    ] {
        let text = format!("<tool_call>{{\"name\": \"f\", \"arguments\": {arguments}{rest}");
        assert_eq!(found(&text), call("f", arguments), "{text}");
    }
}

#[test]
fn what_becomes_no_call_is_content() {
    for (format, texts) in [
        (
            ToolFormat::Hermes,
            &[
                "<tool_call>",
                "a <tool_ca",
                "<tool_call> x </tool_call>",
                " \n ",
                "<tool_call>{\"nom\": \"f\"}</tool_call>",
                "<tool_call>{\"name\": 7}",
                "<tool_call><tool_call>{\"name\"",
                "<tool_call>{\"name\": \"f\", \"argu",
                "<tool_call>[1]",
                "x  <tool_call>\n\n{\"a\" 1}",
            ][..],
        ),
        (
            ToolFormat::Llama3,
            &[
                "{\"name\": \"Bob\", \"age\": 3}",
                "{\"name\": \"Bob\", \"parameters\": {}}",
                "{\"name\": \"weather\"}",
                "{\"a\": {\"name\": \"weather\"}",
                " {",
                "plain; {",
                "<|python_tag|>print(1)",
                "[{\"name\": \"weather\", \"parameters\": {}}]",
            ],
        ),
        (
            ToolFormat::Mistral,
            &[
                "[TOOL_CALLS]",
                "[TOOL_CALLS][]",
                "[TOOL_CALLS] [1]",
                "[TOOL_CALLS]f",
                "[TOOL",
                "[TOOL_CALLS] no call",
                "[TOOL_CALLS][{\"nom\": 1}]",
                "[TOOL_CALLS]f[ARG",
            ],
        ),
        (
            ToolFormat::Qwen3Coder,
            &[
                "<tool_call>",
                " <tool_call>\n no",
                "<tool_call>{\"name\": \"weather\"}</tool_call>",
                "<tool_call><function=weather",
                "<tool_call><function=>",
                "<tool_call>\n<function=a b>",
                "<function=other>\n<parameter=city>Paris</parameter>\n</function>",
                "a <functio",
            ],
        ),
        (
            ToolFormat::Glm45,
            &[
                "<tool_call>",
                "<tool_call>weather",
                "<tool_call>no</tool_call>",
                "<tool_call>\n\n<arg_key>city</arg_key>",
                "<tool_call>two words\n<arg_key>city</arg_key>",
                "<tool_call>weather\nis fine</tool_call>",
            ],
        ),
        (
            ToolFormat::Pythonic,
            &[
                "[",
                "[1, 2]",
                "[other(city=\"Paris\")]",
                "weather(city=\"Paris\")",
                "Well: [weather(city=\"Paris\")]",
                "[weather",
                "[weather, time]",
                "<|python_start|>weather()",
            ],
        ),
        (
            ToolFormat::DeepSeek,
            &[
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁call▁begin｜>f",
                "<｜tool▁calls▁begin｜>no",
                "<｜tool▁call▁begin｜><｜tool▁sep｜>{}",
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f",
            ],
        ),
        (
            ToolFormat::Harmony,
            &["plain", "a <|chan", " to=functions.f"],
        ),
    ] {
        for text in texts {
            assert_eq!(
                events(&native(format), "", text),
                [content(text)],
                "{format}"
            );
        }
    }
}

#[test]
fn llama_calls_are_the_answer_itself() {
    let found = |text: &str| events(&native(ToolFormat::Llama3), "", text);
    let one = "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}";
    let told = "{\"city\": \"Paris\"}";
    assert_eq!(found(one), call("weather", told));
    assert_eq!(
        found(&format!("<|python_tag|>{one}")),
        call("weather", told)
    );
    let with_kind = one.replacen('{', "{\"type\": \"function\", ", 1);
    assert_eq!(found(&with_kind), call("weather", told));
    let both = calls(&[("weather", told), ("time", "{}")]);
    let second = "{\"name\": \"time\", \"parameters\": {}}";
    assert_eq!(found(&format!("{one}; {second}")), both);
    let mut behind = calls(&[("weather", told)]);
    behind.push(content("; and {more}"));
    assert_eq!(found(&format!("{one}; and {{more}}")), behind);
}

#[test]
fn mistral_calls_are_a_list_or_follow_their_names() {
    let found = |text: &str| events(&native(ToolFormat::Mistral), "", text);
    let list = "Now: [TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"a\": \"]\"}}, \
        {\"arguments\": {}, \"name\": \"time\"}]";
    let mut expected = vec![content("Now:")];
    expected.extend(calls(&[("weather", "{\"a\": \"]\"}"), ("time", "{}")]));
    assert_eq!(found(list), expected);
    let named = "[TOOL_CALLS]weather[ARGS]{\"a\": 1}[TOOL_CALLS]time{\"b\": [2]}\
        [TOOL_CALLS]time[CALL_ID]aB3[ARGS]{}";
    let expected = calls(&[
        ("weather", "{\"a\": 1}"),
        ("time", "{\"b\": [2]}"),
        ("time", "{}"),
    ]);
    assert_eq!(found(named), expected);
    // What follows the first one of a list and is no call is content.
    let mut broken = calls(&[("weather", "{}")]);
    broken.push(content(", {\"nom\": 1}]"));
    let text = "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {}}, {\"nom\": 1}]";
    assert_eq!(found(text), broken);
}

#[test]
fn deepseek_calls_have_marks_around_each_part() {
    let found = |text: &str| events(&native(ToolFormat::DeepSeek), "", text);
    let old = "Hm.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n\
        {\"city\": \"Paris\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n\
        ```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    let told = [("weather", "{\"city\": \"Paris\"}"), ("time", "{}")];
    let mut expected = vec![content("Hm.")];
    expected.extend(calls(&told));
    assert_eq!(found(old), expected);
    let new = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Paris\"}\
        <｜tool▁call▁end｜><｜tool▁call▁begin｜>time<｜tool▁sep｜><｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    assert_eq!(found(new), calls(&told));
    let broken = "<｜tool▁call▁begin｜>f<｜tool▁sep｜>city: Paris<｜tool▁call▁end｜>";
    assert_eq!(found(broken), call("f", "city: Paris"));
}

#[test]
fn harmony_messages_are_told_apart_by_channel_and_recipient() {
    let both = Expected {
        reasoning: Some(ReasoningFormat::Harmony),
        ..native(ToolFormat::Harmony)
    };
    let found = |text: &str| events(&both, "<|start|>assistant", text);
    let thought = "<|channel|>analysis<|message|>I need it.<|end|>";
    let text = format!(
        "{thought}<|start|>assistant<|channel|>commentary to=functions.weather \
         <|constrain|>json<|message|>{{\"city\": \"Paris\"}}<|call|>"
    );
    let mut expected = vec![reasoning("I need it.")];
    expected.extend(call("weather", "{\"city\": \"Paris\"}"));
    assert_eq!(found(&text), expected);
    // The recipient before the channel, no end, no arguments.
    let text = format!(
        "{thought}<|start|>assistant to=functions.time<|channel|>commentary json<|message|>"
    );
    let mut expected = vec![reasoning("I need it.")];
    expected.extend(call("time", "{}"));
    assert_eq!(found(&text), expected);
    let text = format!("{thought}<|start|>assistant<|channel|>final<|message|>It rains.<|return|>");
    assert_eq!(
        found(&text),
        [reasoning("I need it."), content("It rains.")]
    );
    assert_eq!(
        found("<|channel|>commentary<|message|>Soon."),
        [content("Soon.")]
    );
    let without = Expected {
        calls: Calls::None,
        ..both
    };
    let text = "<|channel|>commentary to=functions.f<|message|>{}<|call|>";
    assert_eq!(events(&without, "", text), [content("{}")]);
}

#[test]
fn what_is_held_back_has_a_bound() {
    let mut parser = OutputParser::new(&native(ToolFormat::Hermes), "");
    let mut out = Events::default();
    parser.push("<tool_call>{\"other\": \"", &mut out);
    let more = "x".repeat(1_000);
    for _ in 0..20 {
        parser.push(&more, &mut out);
    }
    let told: usize = out
        .drain()
        .map(|event| match event {
            Event::Content(text) => text.len(),
            other => panic!("{other:?}"),
        })
        .sum();
    assert_eq!(told, "<tool_call>{\"other\": \"".len() + 20_000);
}
