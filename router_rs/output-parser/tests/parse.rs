//! What is found in outputs, wherever they are cut into pieces.
#![allow(clippy::unwrap_used)]

use kvmesh_output_parser::{
    Calls, Event, Events, Expected, OutputParser, ReasoningFormat, ToolFormat,
};
use proptest::prelude::*;

fn native(format: ToolFormat) -> Expected {
    Expected {
        reasoning: None,
        calls: Calls::Native {
            format,
            names: vec!["weather".to_owned(), "time".to_owned()],
        },
        constrained: false,
    }
}

fn thinking(format: ReasoningFormat) -> Expected {
    Expected {
        reasoning: Some(format),
        calls: Calls::None,
        constrained: false,
    }
}

/// Events of pieces; texts that follow each other joined.
fn parsed<'a>(
    expected: &Expected,
    prompt: &str,
    pieces: impl IntoIterator<Item = &'a str>,
) -> Vec<Event> {
    let mut parser = OutputParser::new(expected, prompt);
    let mut out = Events::default();
    for piece in pieces {
        parser.push(piece, &mut out);
    }
    parser.finish(&mut out);
    out.into_iter().collect()
}

/// The events of a text, which are the same for each way to cut it in two or in
/// characters.
fn events(expected: &Expected, prompt: &str, text: &str) -> Vec<Event> {
    let whole = parsed(expected, prompt, [text]);
    let letters: Vec<&str> = text.split("").collect();
    assert_eq!(parsed(expected, prompt, letters), whole, "{text}");
    for at in (0..text.len()).filter(|at| text.is_char_boundary(*at)) {
        let (first, second) = text.split_at(at);
        assert_eq!(
            parsed(expected, prompt, [first, second]),
            whole,
            "{first}|{second}"
        );
    }
    whole
}

fn content(text: &str) -> Event {
    Event::Content(text.to_owned())
}

fn reasoning(text: &str) -> Event {
    Event::Reasoning(text.to_owned())
}

fn call(name: &str, arguments: &str) -> [Event; 2] {
    let name = name.to_owned();
    [Event::Call { name }, Event::Arguments(arguments.to_owned())]
}

fn calls(all: &[(&str, &str)]) -> Vec<Event> {
    all.iter()
        .flat_map(|(name, arguments)| call(name, arguments))
        .collect()
}

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
            &[
                "plain",
                "<|start|>assistant",
                "<|channel|>final",
                "a <|chan",
                " to=functions.f",
            ],
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
fn reasoning_is_before_the_content() {
    let think = thinking(ReasoningFormat::Think);
    let found = |prompt: &str, text: &str| events(&think, prompt, text);
    let both = [reasoning("Let me < see."), content("Paris. </think>")];
    let text = "Let me < see.\n</think>\n\nParis. </think>";
    assert_eq!(
        found("<|im_start|>assistant\n", &format!("\n<think>\n{text}")),
        both
    );
    // The template opened it, and the model did so again.
    assert_eq!(found("assistant\n<think>\n", text), both);
    assert_eq!(found("assistant\n<think>", &format!("<think>{text}")), both);
    // It never ended, was empty, or was closed in the prompt.
    assert_eq!(found("<think>", "I wonder"), [reasoning("I wonder")]);
    assert_eq!(found("", "<think>\n\n</think>\n\nHi"), [content("Hi")]);
    let plain = " Hi <think> you </think>";
    assert_eq!(found("<think>\n\n</think>\n\n", plain), [content(plain)]);
    let mistral = thinking(ReasoningFormat::Mistral);
    let told = [reasoning("so"), content("Hi")];
    assert_eq!(events(&mistral, "", "[THINK]so[/THINK]Hi"), told);
}

#[test]
fn calls_follow_reasoning() {
    let both = Expected {
        reasoning: Some(ReasoningFormat::Think),
        ..native(ToolFormat::Hermes)
    };
    let text = "<think>a <tool_call> may do</think>\n\n<tool_call>{\"name\": \"f\", \
        \"arguments\": {}}</tool_call>";
    let mut expected = vec![reasoning("a <tool_call> may do")];
    expected.extend(call("f", "{}"));
    assert_eq!(events(&both, "", text), expected);
}

#[test]
fn calls_that_a_grammar_forced_need_no_marks() {
    let forced = |calls| Expected {
        reasoning: Some(ReasoningFormat::Think),
        calls,
        constrained: true,
    };
    let list = forced(Calls::List);
    let text = " [{\"name\": \"f\", \"parameters\": {\"a\": 1}} , {\"name\": \"g\", \"parameters\": {}}]\n";
    let expected = calls(&[("f", "{\"a\": 1}"), ("g", "{}")]);
    // A prompt that opened reasoning cannot have it with a grammar from the first token on.
    assert_eq!(events(&list, "<think>", text), expected);
    let one = forced(Calls::One("f".to_owned()));
    assert_eq!(
        events(&one, "<think>", "{\"a\": [1]}\n"),
        call("f", "{\"a\": [1]}")
    );
    let mut behind = vec![reasoning("so")];
    behind.extend(call("f", "{\"a\": 1}"));
    assert_eq!(events(&one, "<think>", "so</think>{\"a\": 1}"), behind);
    assert_eq!(events(&one, "", ""), []);
    // Cut off by its length.
    assert_eq!(events(&one, "", "{\"a\": \"x"), call("f", "{\"a\": \"x"));
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

#[test]
fn formats_are_known_by_their_templates() {
    for (template, tools, thoughts) in [
        (
            "{{'<tool_call>'}} {{ '</think>' }}",
            Some(ToolFormat::Hermes),
            Some(ReasoningFormat::Think),
        ),
        ("<tool_call>\n<function=name>", None, None),
        (
            "[TOOL_CALLS] [THINK]",
            Some(ToolFormat::Mistral),
            Some(ReasoningFormat::Mistral),
        ),
        (
            "<|start|><|channel|><|message|>",
            Some(ToolFormat::Harmony),
            Some(ReasoningFormat::Harmony),
        ),
        (
            "<｜tool▁call▁begin｜> </think>",
            Some(ToolFormat::DeepSeek),
            Some(ReasoningFormat::Think),
        ),
        (
            "<|start_header_id|> <|python_tag|>",
            Some(ToolFormat::Llama3),
            None,
        ),
        (
            "<|start_header_id|> {\"name\": n, \"parameters\": p}",
            Some(ToolFormat::Llama3),
            None,
        ),
        ("<|im_start|>{{ message }}<|im_end|>", None, None),
    ] {
        assert_eq!(ToolFormat::of_template(template), tools, "{template}");
        assert_eq!(
            ReasoningFormat::of_template(template),
            thoughts,
            "{template}"
        );
    }
    for format in ToolFormat::ALL {
        assert_eq!(format.name().parse(), Ok(format));
    }
    for format in ReasoningFormat::ALL {
        assert_eq!(format.name().parse(), Ok(format));
    }
    let unknown = "hermse".parse::<ToolFormat>().unwrap_err().to_string();
    assert!(
        unknown.contains("hermse") && unknown.contains("hermes, llama3"),
        "{unknown}"
    );
}

/// Formats whose calls are parts of content.
const WITHIN_TEXT: [ToolFormat; 4] = [
    ToolFormat::Hermes,
    ToolFormat::Llama3,
    ToolFormat::Mistral,
    ToolFormat::DeepSeek,
];

/// Parts that formats are made of, some of them broken.
fn part() -> impl Strategy<Value = String> {
    let fixed = [
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "{\"name\": \"weather\", \"arguments\": {\"a\": 1}}",
        "{\"name\": \"time\", \"parameters\": ",
        "{\"arguments\": {}, \"name\": \"x\"}",
        "{",
        "}",
        "]",
        "\"",
        "\\",
        "; ",
        ", ",
        "\n",
        "  ",
        "[TOOL_CALLS]",
        "[TOOL_CALLS] [",
        "[ARGS]",
        "weather",
        "<|python_tag|>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        "function",
        "\n```json\n",
        "\n```",
        "<think>",
        "</think>",
        "[THINK]",
        "[/THINK]",
        "<|channel|>analysis<|message|>",
        "<|end|>",
        "<|start|>",
        "assistant<|channel|>commentary to=functions.time<|message|>",
        "<|call|>",
        "é",
        "text",
        " to=",
        "<|",
    ];
    prop_oneof![
        8 => proptest::sample::select(fixed.to_vec()).prop_map(str::to_owned),
        1 => "[ -~é]{0,6}",
    ]
}

fn any_expected() -> impl Strategy<Value = Expected> {
    let names = vec!["weather".to_owned(), "time".to_owned()];
    let native =
        proptest::sample::select(ToolFormat::ALL.to_vec()).prop_map(move |format| Calls::Native {
            format,
            names: names.clone(),
        });
    let calls = prop_oneof![
        6 => native,
        1 => Just(Calls::None),
        1 => Just(Calls::List),
        1 => Just(Calls::One("time".to_owned())),
    ];
    let reasoning = proptest::option::of(proptest::sample::select(ReasoningFormat::ALL.to_vec()));
    (calls, reasoning, any::<bool>()).prop_map(|(calls, reasoning, constrained)| Expected {
        reasoning,
        calls,
        constrained,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn pieces_do_not_matter(
        expected in any_expected(),
        prompt in proptest::sample::select(vec!["", "<think>\n", "[THINK]"]),
        parts in proptest::collection::vec(part(), 0..12),
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..6),
    ) {
        let text = parts.concat();
        let mut borders: Vec<usize> = cuts.iter().map(|cut| {
            let at = cut.index(text.len() + 1);
            (0..=at).rev().find(|at| text.is_char_boundary(*at)).unwrap()
        }).collect();
        borders.extend([0, text.len()]);
        borders.sort_unstable();
        let pieces: Vec<&str> = borders.windows(2).map(|ends| &text[ends[0]..ends[1]]).collect();
        let whole = parsed(&expected, prompt, [text.as_str()]);
        prop_assert_eq!(&parsed(&expected, prompt, pieces), &whole);
        prop_assert_eq!(&parsed(&expected, prompt, text.split("")), &whole);
    }

    /// Without a call, all is content, to the last space.
    #[test]
    fn nothing_is_lost(
        format in proptest::sample::select(WITHIN_TEXT.to_vec()),
        parts in proptest::collection::vec(part(), 0..12),
    ) {
        let text = parts.concat();
        let found = parsed(&native(format), "", [text.as_str()]);

        if found.iter().any(|event| matches!(event, Event::Call { .. })) {
            // What is told is in the output in this order; marks are between it.
            let mut rest = text.as_str();
            for event in &found {
                let (Event::Content(told) | Event::Arguments(told)) = event else { continue };
                // Arguments before their name are told behind it, and none are `{}`.
                if let Event::Arguments(told) = event {
                    let there = told == "{}" || text.contains(told.as_str());
                    prop_assert!(there);
                    continue;
                }
                for part in told.split_whitespace() {
                    let at = rest.find(part);
                    prop_assert!(at.is_some(), "{:?} is not in {:?}", part, rest);
                    rest = &rest[at.unwrap() + part.len()..];
                }
            }
        } else {
            prop_assert_eq!(found, if text.is_empty() { vec![] } else { vec![content(&text)] });
        }

    }
}
