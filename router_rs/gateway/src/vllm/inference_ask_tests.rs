//! What becomes of each field, and of those that are refused.
#![allow(clippy::unwrap_used)]
use kvmesh_wire::vllm::{
    CandidateTokens, EngineReasoningGate, MediaItem, TokenIds, decoding_parameters,
};

use super::*;

fn own(request: GenerateRequest) -> v1::GenerateRequest {
    ask(request, String::new(), true)
        .map(|asked| asked.request)
        .unwrap()
}

#[test]
fn what_is_not_said_is_greedy_text_of_a_usual_request() {
    let own = own(GenerateRequest {
        prompt: Some(Prompt::Text("once".to_owned())),
        ..GenerateRequest::default()
    });
    assert_eq!(own.input, Some(Input::Prompt("once".to_owned())));
    let greedy = v1::Sampling {
        temperature: Some(0.0),
        ..v1::Sampling::default()
    };
    assert_eq!(own.sampling, Some(greedy));
    assert_eq!(own.stopping, Some(v1::Stopping::default()));
    assert_eq!(own.hints, Some(v1::Hints::default()));
    let output = own.output.unwrap();
    assert_eq!((output.text, output.special_tokens), (Some(true), false));
}

#[test]
fn each_field_has_its_place() {
    let asked = ask(
        GenerateRequest {
            request_id: "mine".to_owned(),
            prompt: Some(Prompt::TokenIds(TokenIds { ids: vec![4] })),
            temperature: Some(0.7),
            sampling: Some(RandomSampling {
                num_sequences: 3,
                top_k: Some(9),
                top_p: Some(0.9),
                min_p: Some(0.2),
                seed: Some(5),
            }),
            decoding: Some(DecodingParameters {
                presence_penalty: 0.1,
                frequency_penalty: 0.2,
                repetition_penalty: 1.3,
                logit_bias: HashMap::from([(9, 1.0), (1, 2.0)]),
                structured_output: Some(StructuredOutput::JsonObject(true)),
                ..DecodingParameters::default()
            }),
            stopping: Some(StoppingCriteria {
                max_new_tokens: 8,
                min_new_tokens: 1,
                stop_token_ids: vec![2],
                stop_strings: vec!["x".to_owned()],
                include_stop_strings: true,
                ignore_eos: true,
                thinking_token_budget: Some(-1),
            }),
            response: Some(ResponseOptions {
                prompt_token_ids: true,
                output_text: Some(false),
                skip_special_tokens: Some(false),
                output_logprobs: true,
                output_candidates: Some(CandidateTokens {
                    select: Some(Select::TopN(2)),
                }),
                ..ResponseOptions::default()
            }),
            kv: Some(KvCacheParameters {
                cache_salt: "salt".to_owned(),
                ..KvCacheParameters::default()
            }),
            priority: -1,
            session_id: Some("talk".to_owned()),
            lora_name: "adapter".to_owned(),
            watermarking: Some(true),
            ..GenerateRequest::default()
        },
        "named".to_owned(),
        true,
    )
    .unwrap();
    assert_eq!((asked.n, asked.prompt_ids), (3, true));
    assert_eq!(
        (asked.model.as_str(), asked.request_id.as_str()),
        ("named", "mine")
    );
    let own = asked.request;
    assert_eq!(own.adapter, "adapter");
    let sampling = own.sampling.unwrap();
    assert_eq!(sampling.temperature, Some(0.7));
    assert_eq!((sampling.top_k, sampling.top_p), (9, Some(0.9)));
    assert_eq!((sampling.min_p, sampling.seed), (0.2, Some(5)));
    assert_eq!(sampling.presence_penalty, 0.1);
    assert_eq!(sampling.frequency_penalty, 0.2);
    assert_eq!(sampling.repetition_penalty, Some(1.3));
    assert_eq!(sampling.logit_bias[0].token_id, 1);
    let stopping = v1::Stopping {
        max_tokens: 8,
        min_tokens: 1,
        stop: vec!["x".to_owned()],
        stop_token_ids: vec![2],
        ignore_end_of_text: true,
        include_stop: true,
    };
    assert_eq!(own.stopping, Some(stopping));
    // Stop strings are looked for in text, wherever it goes.
    let output = own.output.unwrap();
    assert_eq!((output.text, output.special_tokens), (Some(true), true));
    assert_eq!(output.logprobs, Some(2));
    let hints = own.hints.unwrap();
    assert_eq!(hints.request_class(), RequestClass::Interactive);
    assert_eq!(
        (hints.cache_salt.as_str(), hints.conversation_id.as_str()),
        ("salt", "talk")
    );
    assert_eq!(own.grammar.unwrap().kind, Some(Kind::JsonObject(true)));
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    fn with<T: Default>(change: impl FnOnce(&mut T)) -> Option<T> {
        let mut value = T::default();
        change(&mut value);
        Some(value)
    }
    let refused = |change: fn(&mut GenerateRequest)| {
        let mut request = GenerateRequest::default();
        change(&mut request);
        let refused = ask(request, String::new(), false).map(|_| ());
        refused.unwrap_err().to_string()
    };
    for (said, field) in [
        (
            refused(|r| r.truncate_prompt_tokens = 5),
            "truncate_prompt_tokens",
        ),
        (refused(|r| r.media = vec![MediaItem::default()]), "media"),
        (
            refused(|r| r.engine_reasoning_gate = Some(EngineReasoningGate::default())),
            "engine_reasoning_gate",
        ),
        (
            refused(|r| r.sampling = with(|s: &mut RandomSampling| s.num_sequences = 2)),
            "sampling.num_sequences",
        ),
        (
            refused(|r| {
                r.decoding = with(|d: &mut DecodingParameters| d.allowed_token_ids = vec![1]);
            }),
            "decoding.allowed_token_ids",
        ),
        (
            refused(|r| {
                r.decoding = with(|d: &mut DecodingParameters| {
                    d.bad_words_token_ids = vec![TokenIds::default()];
                });
            }),
            "decoding.bad_words_token_ids",
        ),
        (
            refused(|r| {
                r.decoding = with(|d: &mut DecodingParameters| {
                    let choices = decoding_parameters::StringChoices::default();
                    d.structured_output = Some(StructuredOutput::Choice(choices));
                });
            }),
            "decoding.choice",
        ),
        (
            refused(|r| {
                r.decoding = with(|d: &mut DecodingParameters| {
                    d.structured_output = Some(StructuredOutput::StructuralTag(String::new()));
                });
            }),
            "decoding.structural_tag",
        ),
        (
            refused(|r| {
                r.stopping = with(|s: &mut StoppingCriteria| s.thinking_token_budget = Some(0));
            }),
            "stopping.thinking_token_budget",
        ),
        (
            refused(|r| r.response = with(|o: &mut ResponseOptions| o.prompt_logprobs = true)),
            "response.prompt_logprobs",
        ),
        (
            refused(|r| {
                r.response = with(|o: &mut ResponseOptions| {
                    o.output_logprobs = true;
                    o.output_candidates = with(|c: &mut CandidateTokens| {
                        c.select = Some(Select::All(true));
                    });
                });
            }),
            "response.output_candidates.all",
        ),
        (
            refused(|r| {
                r.response = with(|o: &mut ResponseOptions| {
                    o.output_logprobs = true;
                    o.output_candidates = with(|c: &mut CandidateTokens| {
                        c.select = Some(Select::TokenIds(TokenIds::default()));
                    });
                });
            }),
            "response.output_candidates.token_ids",
        ),
        (
            refused(|r| r.kv = with(|k: &mut KvCacheParameters| k.bypass_prefix_cache = true)),
            "kv.bypass_prefix_cache",
        ),
        (
            refused(|r| {
                r.kv = with(|k: &mut KvCacheParameters| {
                    k.kv_transfer_params = Some(prost_types::Struct::default());
                });
            }),
            "kv.kv_transfer_params",
        ),
        (
            refused(|r| {
                r.kv = with(|k: &mut KvCacheParameters| {
                    k.ec_transfer_params = Some(prost_types::Struct::default());
                });
            }),
            "kv.ec_transfer_params",
        ),
    ] {
        assert!(said.contains(field), "{field}: {said}");
    }
}
