//! Nothing that a body asks for is lost: each field that OpenAI's clients and vLLM's server have
//! changes what is asked of the door or how the answer looks, or is refused by its name, or is one
//! of those that docs/openai.md says are ignored. tests/structure/test_openai_fields.py looks for
//! all names that the packages know in this file, and for all of this file on that page.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Taken,
    Refused,
    /// It changes no answer.
    Ignored,
}
use Fate::{Ignored, Refused, Taken};

const CHAT: &[Face] = &[Face::Chat];
const COMPLETION: &[Face] = &[Face::Completion];
const BOTH: &[Face] = &[Face::Chat, Face::Completion];

/// A field: who has it, what becomes of it, a value that is no default, and what has to stand
/// beside it.
type Row = (&'static str, &'static [Face], Fate, Value, Value);

fn tool() -> Value {
    json!([{"type": "function", "function": {"name": "f"}}])
}

#[rustfmt::skip]
fn rows() -> Vec<Row> {
    let none = || json!({});
    let format = json!({"type": "json_object"});
    let message = json!([{"role": "user", "content": "ho"}]);
    vec![
        ("model", BOTH, Taken, json!("other"), none()),
        ("messages", CHAT, Taken, message.clone(), none()),
        ("messages", COMPLETION, Refused, message, none()),
        ("prompt", COMPLETION, Taken, json!("q"), none()),
        ("prompt", CHAT, Refused, json!("q"), none()),
        ("stream", BOTH, Taken, json!(true), none()),
        ("stream_options", BOTH, Taken, json!({"include_usage": true}), none()),
        ("n", BOTH, Taken, json!(2), none()),
        ("best_of", BOTH, Refused, json!(2), none()),
        ("max_tokens", BOTH, Taken, json!(9), none()),
        ("max_completion_tokens", CHAT, Taken, json!(9), none()),
        ("max_completion_tokens", COMPLETION, Refused, json!(9), none()),
        ("min_tokens", BOTH, Taken, json!(3), none()),
        ("stop", BOTH, Taken, json!("x"), none()),
        ("stop_token_ids", BOTH, Taken, json!([7]), none()),
        ("ignore_eos", BOTH, Taken, json!(true), none()),
        ("include_stop_str_in_output", BOTH, Taken, json!(true), none()),
        ("skip_special_tokens", BOTH, Taken, json!(false), none()),
        ("temperature", BOTH, Taken, json!(0.5), none()),
        ("top_p", BOTH, Taken, json!(0.5), none()),
        ("top_k", BOTH, Taken, json!(5), none()),
        ("min_p", BOTH, Taken, json!(0.5), none()),
        ("repetition_penalty", BOTH, Taken, json!(1.5), none()),
        ("frequency_penalty", BOTH, Taken, json!(0.5), none()),
        ("presence_penalty", BOTH, Taken, json!(0.5), none()),
        ("logit_bias", BOTH, Taken, json!({"5": 1}), none()),
        ("seed", BOTH, Taken, json!(-3), none()),
        ("logprobs", CHAT, Taken, json!(true), none()),
        ("logprobs", COMPLETION, Taken, json!(2), none()),
        ("top_logprobs", CHAT, Taken, json!(2), json!({"logprobs": true})),
        ("top_logprobs", COMPLETION, Refused, json!(2), none()),
        ("priority", BOTH, Taken, json!(-1), none()),
        ("service_tier", BOTH, Taken, json!("flex"), none()),
        ("cache_salt", BOTH, Taken, json!("s"), none()),
        ("session_id", BOTH, Taken, json!("s"), none()),
        ("response_format", BOTH, Taken, format, none()),
        ("tools", CHAT, Taken, tool(), none()),
        ("tools", COMPLETION, Refused, tool(), none()),
        ("tool_choice", CHAT, Taken, json!("required"), json!({"tools": tool()})),
        ("tool_choice", COMPLETION, Refused, json!("required"), none()),
        ("parallel_tool_calls", CHAT, Taken, json!(false), json!({"tools": tool()})),
        ("modalities", BOTH, Refused, json!(["audio"]), none()),
        ("reasoning_effort", CHAT, Taken, json!("low"), none()),
        ("reasoning_effort", COMPLETION, Refused, json!("low"), none()),
        ("add_generation_prompt", CHAT, Taken, json!(false), none()),
        ("add_generation_prompt", COMPLETION, Refused, json!(false), none()),
        ("chat_template_kwargs", CHAT, Taken, json!({"a": 1}), none()),
        ("chat_template_kwargs", COMPLETION, Refused, json!({"a": 1}), none()),
        ("add_special_tokens", CHAT, Refused, json!(true), none()),
        ("add_special_tokens", COMPLETION, Refused, json!(false), none()),
        ("return_token_ids", BOTH, Taken, json!(true), none()),
        ("return_tokens_as_token_ids", CHAT, Taken, json!(true), json!({"logprobs": true})),
        ("return_tokens_as_token_ids", COMPLETION, Taken, json!(true), json!({"logprobs": 1})),
        // Refused wherever they are.
        ("allowed_token_ids", BOTH, Refused, json!([1]), none()),
        ("audio", BOTH, Refused, json!({"voice": "x"}), none()),
        ("bad_words", BOTH, Refused, json!(["x"]), none()),
        ("chat_template", BOTH, Refused, json!("x"), none()),
        ("continue_final_message", BOTH, Refused, json!(true), none()),
        ("documents", BOTH, Refused, json!([{}]), none()),
        ("ec_transfer_params", BOTH, Refused, json!({"a": 1}), none()),
        ("echo", BOTH, Refused, json!(true), none()),
        ("function_call", BOTH, Refused, json!("auto"), none()),
        ("functions", BOTH, Refused, json!([{"name": "f"}]), none()),
        ("guided_choice", BOTH, Refused, json!(["x"]), none()),
        ("guided_grammar", BOTH, Refused, json!("x"), none()),
        ("guided_json", BOTH, Refused, json!({"a": 1}), none()),
        ("guided_regex", BOTH, Refused, json!("x"), none()),
        ("include_reasoning", BOTH, Refused, json!(false), none()),
        ("kv_transfer_params", BOTH, Refused, json!({"a": 1}), none()),
        ("logits_processors", BOTH, Refused, json!(["x"]), none()),
        ("logprob_token_ids", BOTH, Refused, json!([1]), none()),
        ("media_io_kwargs", BOTH, Refused, json!({"a": 1}), none()),
        ("mm_payload", BOTH, Refused, json!({"a": 1}), none()),
        ("mm_processor_kwargs", BOTH, Refused, json!({"a": 1}), none()),
        ("moderation", BOTH, Refused, json!({"model": "x"}), none()),
        ("prompt_embeds", BOTH, Refused, json!("x"), none()),
        ("prompt_logprobs", BOTH, Refused, json!(0), none()),
        ("repetition_detection", BOTH, Refused, json!({"a": 1}), none()),
        ("return_mm_kwargs", BOTH, Refused, json!(true), none()),
        ("return_prompt_text", BOTH, Refused, json!(true), none()),
        ("return_token_offsets", BOTH, Refused, json!(true), none()),
        ("routed_experts_prompt_start", BOTH, Refused, json!(0), none()),
        ("store", BOTH, Refused, json!(true), none()),
        ("stream_interval", BOTH, Refused, json!(4), none()),
        ("stream_options", BOTH, Refused, json!({"include_obfuscation": true}), none()),
        ("structured_outputs", BOTH, Refused, json!({"regex": "x"}), none()),
        ("suffix", BOTH, Refused, json!("x"), none()),
        ("thinking_token_budget", BOTH, Refused, json!(0), none()),
        ("truncate_prompt_tokens", BOTH, Refused, json!(5), none()),
        ("use_beam_search", BOTH, Refused, json!(true), none()),
        ("verbosity", BOTH, Refused, json!("low"), none()),
        ("vllm_xargs", BOTH, Refused, json!({"a": 1}), none()),
        ("watermarking", BOTH, Refused, json!(true), none()),
        ("web_search_options", BOTH, Refused, json!({"a": 1}), none()),
        ("messages", CHAT, Refused, json!([{"role": "assistant", "audio": {"id": "x"}}]), none()),
        ("messages", CHAT, Refused,
            json!([{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]), none()),
        // Whom it is for, what else the caller keeps of it, and what has no effect without
        // something that is refused.
        ("user", BOTH, Ignored, json!("x"), none()),
        ("metadata", BOTH, Ignored, json!({"a": "b"}), none()),
        ("safety_identifier", BOTH, Ignored, json!("x"), none()),
        ("prompt_cache_key", BOTH, Ignored, json!("x"), none()),
        ("prompt_cache_options", BOTH, Ignored, json!({"mode": "x"}), none()),
        ("prompt_cache_retention", BOTH, Ignored, json!("24h"), none()),
        ("prediction", BOTH, Ignored, json!({"type": "content", "content": "x"}), none()),
        ("request_id", BOTH, Ignored, json!("x"), none()),
        ("length_penalty", BOTH, Ignored, json!(2.0), none()),
        ("spaces_between_special_tokens", BOTH, Ignored, json!(false), none()),
        ("truncation_side", BOTH, Ignored, json!("left"), none()),
    ]
}

fn body(face: Face, beside: &Value) -> Value {
    let mut body = match face {
        Face::Chat => json!({"messages": [{"role": "user", "content": "hi"}]}),
        Face::Completion => json!({"prompt": "p"}),
    };
    let all = body.as_object_mut().unwrap();
    all.extend(beside.as_object().unwrap().clone());
    body
}

fn read(face: Face, body: &Value) -> Result<String, RequestError> {
    let fields = Fields::read(body.to_string().as_bytes())?;
    ask(face, fields).map(|asked| format!("{asked:?}"))
}

#[test]
fn each_field_is_taken_refused_by_name_or_known_to_change_no_answer() {
    for (field, faces, fate, value, beside) in rows() {
        for face in faces {
            let plain = body(*face, &beside);
            let without = read(*face, &plain).unwrap();
            let mut with = plain.clone();
            with[field] = value.clone();
            match (fate, read(*face, &with)) {
                (Taken, Ok(asked)) => assert_ne!(asked, without, "{face:?}: {with} is lost"),
                (Ignored, Ok(asked)) => assert_eq!(asked, without, "{face:?}: {with}"),
                (Refused, Err(error)) => {
                    let named = match &error {
                        RequestError::Invalid(all) => &all.0[0].field,
                        RequestError::Unsupported { field, .. } => field,
                        other => panic!("{with}: {other}"),
                    };
                    let rest = named.strip_prefix(field);
                    let begins =
                        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
                    assert!(begins, "{face:?}: {with}: {error}");
                }
                (_, told) => panic!("{face:?}: {with}: {fate:?}, but {told:?}"),
            }
            // Null is absent.
            let mut null = plain;
            null[field] = match field {
                "prompt" if *face == Face::Completion => continue,
                "messages" if *face == Face::Chat => continue,
                _ => Value::Null,
            };
            assert_eq!(read(*face, &null).unwrap(), without, "{null}");
        }
    }
}
