//! Slips of models, and outputs that are cut off.

use kvmesh_output_parser::{
    Calls, Event, Events, Expected, OutputParser, ReasoningFormat, ToolFormat,
};

use crate::{call, calls, content, events, native, reasoning, thinking};

#[test]
fn small_models_close_too_many_braces_and_put_several_objects_in_one_tag() {
    let found = |text: &str| events(&native(ToolFormat::Hermes), "", text);
    let one = "{\"name\": \"weather\", \"arguments\": {\"a\": 1}}";
    let two = "{\"name\": \"time\", \"arguments\": {}}";
    for text in [
        format!("<tool_call>\n{one}}}\n</tool_call>"),
        format!("<tool_call>{one}}} }}</tool_call>\n"),
        format!("<tool_call>{one}}}}}"),
    ] {
        assert_eq!(found(&text), call("weather", "{\"a\": 1}"), "{text}");
    }
    let both = calls(&[("weather", "{\"a\": 1}"), ("time", "{}")]);
    for text in [
        format!("<tool_call>\n{one}\n{two}\n</tool_call>"),
        format!("<tool_call>{one}, {two}</tool_call>"),
        format!("<tool_call>[{one}, {two}]</tool_call>"),
        format!("<tool_call>\n[{one},\n{two}\n]\n</tool_call>"),
        format!("<tool_call>{one}}}</tool_call><tool_call>{two}}}</tool_call>"),
    ] {
        assert_eq!(found(&text), both, "{text}");
    }
    // What is behind it and none of these is content as before.
    for (behind, told) in [
        ("}} so", "}} so"),
        (", so", ", so"),
        ("{\"nom\": 1}", "{\"nom\": 1}"),
    ] {
        let mut expected = calls(&[("weather", "{\"a\": 1}")]);
        expected.push(content(told));
        assert_eq!(
            found(&format!("<tool_call>{one}{behind}")),
            expected,
            "{behind}"
        );
    }
}

#[test]
fn a_header_of_harmony_that_is_cut_off_is_nothing_to_tell() {
    let both = Expected {
        reasoning: Some(ReasoningFormat::Harmony),
        ..native(ToolFormat::Harmony)
    };
    for header in [
        "<|start|>",
        "<|start|>assistant",
        "<|channel|>final",
        "<|channel|>analysis<|mess",
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json",
        " to=functions.weather<|channel|>commentary",
    ] {
        assert_eq!(events(&both, "", header), [], "{header}");
        let text = format!("<|channel|>analysis<|message|>So.<|end|>{header}");
        if !header.starts_with(' ') {
            assert_eq!(events(&both, "", &text), [reasoning("So.")], "{header}");
        }
    }
}

#[test]
fn a_recipient_of_harmony_without_its_prefix_is_a_tool_that_there_is() {
    let found = |text: &str| events(&native(ToolFormat::Harmony), "", text);
    for (recipient, name) in [
        ("weather", Some("weather")),
        ("functions.weather", Some("weather")),
        ("functions.other", Some("other")),
        ("browser.search", None),
        ("functions.", None),
    ] {
        let text = format!(
            "<|channel|>commentary to={recipient} <|constrain|>json<|message|>{{}}<|call|>"
        );
        let expected = name.map_or_else(|| vec![content("{}")], |name| call(name, "{}").to_vec());
        assert_eq!(found(&text), expected, "{recipient}");
    }
}

#[test]
fn a_number_or_a_word_that_a_grammar_held_is_no_thought() {
    let held = Expected {
        constrained: true,
        ..thinking(ReasoningFormat::Think)
    };
    for text in [
        "12",
        "-1.5e3 ",
        "true",
        "false\n",
        "null",
        "{\"a\": 1}",
        "[1]",
        "\"so\"",
    ] {
        assert_eq!(events(&held, "<think>\n", text), [content(text)], "{text}");
    }
    for text in ["12 may do", "true, but", "nullify", "So", "1.2.3", "-"] {
        assert_eq!(
            events(&held, "<think>\n", text),
            [reasoning(text)],
            "{text}"
        );
    }
    let forced = Expected {
        calls: Calls::One("f".to_owned()),
        ..held
    };
    assert_eq!(events(&forced, "<think>", "7"), call("f", "7"));
    // Without a grammar they are what the prompt opened.
    let free = thinking(ReasoningFormat::Think);
    assert_eq!(events(&free, "<think>\n", "12"), [reasoning("12")]);
}

#[test]
fn arguments_that_are_not_at_their_end_are_known() {
    let hermes = |arguments: &str| {
        let text = format!("<tool_call>{{\"name\": \"f\", \"arguments\": {arguments}");
        (ToolFormat::Hermes, text)
    };
    let cases = [
        (hermes(""), false),
        (hermes("{"), true),
        (hermes("{\"a\": \"}"), true),
        (hermes("{\"a\": \"}\"}"), false),
        (hermes("{\"a\": 1}}</tool_call>"), false),
        ((ToolFormat::Hermes, "so".to_owned()), false),
        (
            (
                ToolFormat::Qwen3Coder,
                "<function=weather><parameter=city>Pa".to_owned(),
            ),
            true,
        ),
        (
            (
                ToolFormat::Qwen3Coder,
                "<function=weather><parameter=city>Pa</parameter>".to_owned(),
            ),
            true,
        ),
        (
            (
                ToolFormat::Qwen3Coder,
                "<function=weather></function>".to_owned(),
            ),
            false,
        ),
        ((ToolFormat::Pythonic, "[weather(city='".to_owned()), true),
        (
            (ToolFormat::Pythonic, "[weather(city='')".to_owned()),
            false,
        ),
        (
            (
                ToolFormat::Harmony,
                "<|channel|>commentary to=weather<|message|>{\"a\"".to_owned(),
            ),
            true,
        ),
        (
            (
                ToolFormat::Harmony,
                "<|channel|>commentary to=weather<|message|>{\"a\": 1}".to_owned(),
            ),
            false,
        ),
    ];
    for ((format, text), within) in cases {
        for pieces in [vec![text.as_str()], text.split("").collect()] {
            let mut parser = OutputParser::new(&native(format), "");
            let mut out = Events::default();
            for piece in pieces {
                parser.push(piece, &mut out);
                // Taken out as a stream does it.
                out.drain().for_each(drop);
            }
            parser.finish(&mut out);
            assert_eq!(out.within_call(), within, "{format}: {text}");
        }
    }
}

#[test]
fn content_behind_a_call_is_behind_its_arguments() {
    let mut parser = OutputParser::new(&native(ToolFormat::DeepSeek), "");
    let mut out = Events::default();
    let call = "<｜tool▁call▁begin｜>f<｜tool▁sep｜>city: Paris<｜tool▁call▁end｜>";
    parser.push(call, &mut out);
    assert!(out.within_call());
    parser.push(" Done", &mut out);
    parser.finish(&mut out);
    assert!(!out.within_call());
    assert_eq!(
        out.as_slice().last(),
        Some(&Event::Content("Done".to_owned()))
    );
}
