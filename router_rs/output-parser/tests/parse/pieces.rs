//! Made-up outputs: how they are cut changes nothing, and nothing is lost.

use kvmesh_output_parser::{Calls, Event, Expected, ReasoningFormat, ToolFormat};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{content, native, parsed, tools};

/// Formats whose calls are parts of content.
const WITHIN_TEXT: [ToolFormat; 7] = [
    ToolFormat::Hermes,
    ToolFormat::Llama3,
    ToolFormat::Mistral,
    ToolFormat::DeepSeek,
    ToolFormat::Qwen3Coder,
    ToolFormat::Glm45,
    ToolFormat::Pythonic,
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
    of_these(&fixed)
}

/// Parts of the formats that are no JSON.
fn other_part() -> impl Strategy<Value = String> {
    let fixed = [
        "<tool_call>",
        "</tool_call>",
        "<function=weather>",
        "<function=other>",
        "</function>",
        "<parameter=city>",
        "<parameter=days>",
        "<parameter=near>",
        "</parameter>",
        "weather\n",
        "time",
        "<arg_key>city</arg_key>",
        "<arg_key>tags</arg_key>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "[",
        "]",
        "weather(",
        "time()",
        ")",
        "city=\"Paris\"",
        "days=",
        ", ",
        "=",
        "'",
        "\"",
        "\\",
        "(",
        "{",
        "}",
        "\n",
        " ",
        "5",
        "null",
        "[\"a\", 'b']",
        "é",
        "<|python_start|>",
        "<|python_end|>",
        "<",
    ];
    of_these(&fixed)
}

fn of_these(fixed: &[&'static str]) -> impl Strategy<Value = String> + use<> {
    prop_oneof![
        8 => proptest::sample::select(fixed.to_vec()).prop_map(str::to_owned),
        1 => "[ -~é]{0,6}",
    ]
}

/// Pieces of a text, cut at these places.
fn pieces<'a>(text: &'a str, cuts: &[proptest::sample::Index]) -> Vec<&'a str> {
    let cut = |cut: &proptest::sample::Index| text.floor_char_boundary(cut.index(text.len() + 1));
    let mut borders: Vec<usize> = cuts.iter().map(cut).collect();
    borders.extend([0, text.len()]);
    borders.sort_unstable();
    let ends = borders.windows(2);
    ends.map(|ends| &text[ends[0]..ends[1]]).collect()
}

fn any_expected() -> impl Strategy<Value = Expected> {
    let native =
        proptest::sample::select(ToolFormat::ALL.to_vec()).prop_map(|format| Calls::Native {
            format,
            tools: tools(),
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
        let whole = parsed(&expected, prompt, [text.as_str()]);
        prop_assert_eq!(&parsed(&expected, prompt, pieces(&text, &cuts)), &whole);
        prop_assert_eq!(&parsed(&expected, prompt, text.split("")), &whole);
    }

    #[test]
    fn pieces_do_not_matter_in_formats_that_are_no_json(
        format in proptest::sample::select(vec![
            ToolFormat::Qwen3Coder,
            ToolFormat::Glm45,
            ToolFormat::Pythonic,
        ]),
        opened in any::<bool>(),
        parts in proptest::collection::vec(other_part(), 0..14),
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..6),
    ) {
        // Mostly within a call.
        let begin = match (opened, format) {
            (false, _) => "",
            (true, ToolFormat::Qwen3Coder) => "<tool_call>\n<function=weather>\n<parameter=city>",
            (true, ToolFormat::Glm45) => "<tool_call>weather\n<arg_key>city</arg_key>",
            (true, _) => "[weather(city=",
        };
        let text = begin.to_owned() + &parts.concat();
        let expected = native(format);
        let whole = parsed(&expected, "", [text.as_str()]);
        prop_assert_eq!(&parsed(&expected, "", pieces(&text, &cuts)), &whole);
        prop_assert_eq!(&parsed(&expected, "", text.split("")), &whole);
    }

    /// Without a call, all is content, to the last space.
    #[test]
    fn nothing_is_lost(
        format in proptest::sample::select(WITHIN_TEXT.to_vec()),
        parts in proptest::collection::vec(prop_oneof![part(), other_part()], 0..12),
    ) {
        let text = parts.concat();
        let rewritten = matches!(
            format,
            ToolFormat::Qwen3Coder | ToolFormat::Glm45 | ToolFormat::Pythonic
        );
        let found = parsed(&native(format), "", [text.as_str()]);

        if found.iter().any(|event| matches!(event, Event::Call { .. })) {
            // What is told is in the output in this order; marks are between it.
            let mut rest = text.as_str();
            for event in &found {
                let (Event::Content(told) | Event::Arguments(told)) = event else { continue };
                // Arguments before their name are told behind it, and none are `{}`.
                if let Event::Arguments(told) = event {
                    let there = told == "{}" || text.contains(told.as_str());
                    prop_assert!(there || rewritten);
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

    /// What a template writes of a call is read back as that call.
    #[test]
    fn calls_are_read_as_they_were_written(
        format in proptest::sample::select(vec![
            ToolFormat::Qwen3Coder,
            ToolFormat::Glm45,
            ToolFormat::Pythonic,
        ]),
        city in "[ -;=-~é\\n\"'\\\\]{0,20}",
        days in any::<i64>(),
        tags in proptest::collection::vec("[ -;=-~é\\n]{0,6}", 0..3),
        exact in any::<bool>(),
    ) {
        let wanted = json!({"city": city, "days": days, "tags": tags, "exact": exact, "near": null});
        let members = wanted.as_object().unwrap();
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let written = match format {
            ToolFormat::Qwen3Coder => {
                let all = members.iter().map(|(key, value)| {
                    format!("<parameter={key}>\n{}\n</parameter>\n", text(value))
                });
                let all: String = all.collect();
                format!("<tool_call>\n<function=weather>\n{all}</function>\n</tool_call>")
            }
            ToolFormat::Glm45 => {
                let all = members.iter().map(|(key, value)| {
                    let value = text(value);
                    format!("<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n")
                });
                format!("<tool_call>weather\n{}</tool_call>", all.collect::<String>())
            }
            _ => {
                let all = members.iter().map(|(key, value)| match value {
                    Value::Bool(true) => format!("{key}=True"),
                    Value::Bool(false) => format!("{key}=False"),
                    Value::Null => format!("{key}=None"),
                    value => format!("{key}={value}"),
                });
                format!("[weather({})]", all.collect::<Vec<_>>().join(", "))
            }
        };
        let found = parsed(&native(format), "", [written.as_str()]);
        let [Event::Call { name }, Event::Arguments(arguments)] = found.as_slice() else {
            panic!("{written}: {found:?}");
        };
        prop_assert_eq!(name, "weather");
        let read: Value = serde_json::from_str(arguments).unwrap();
        prop_assert_eq!(read, wanted, "{}", written);
    }
}
