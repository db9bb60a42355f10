//! Reasoning before content and calls, and calls that a grammar forced.

use kvmesh_output_parser::{Calls, Expected, ReasoningFormat, ToolFormat};

use crate::{call, calls, content, events, native, reasoning, thinking};

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
