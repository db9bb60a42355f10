//! From a `Generate` of `VllmEngine` to the request that ours would bring.

use std::collections::HashMap;

use kvmesh_wire::{
    v1::{self, generate_request::Input, grammar::Kind},
    vllm::grpc::engine::{
        GenerateRequest, SamplingParams, generate_request::Input as Given,
        sampling_params::Constraint,
    },
};

use super::{engine_answer::EngineFace, field::Names, open::Asked, unsupported};
use crate::error::RequestError;

/// Fields of ours by their names here.
pub(super) const NAMES: Names = &[
    ("adapter", "x-kvmesh-model"),
    ("grammar", "sampling_params.constraint"),
    ("model", "x-kvmesh-model"),
    ("n", "sampling_params.n"),
    ("output", "sampling_params"),
    ("prompt", "text"),
    ("sampling", "sampling_params"),
    ("stopping", "sampling_params"),
    ("stopping.ignore_end_of_text", "sampling_params.ignore_eos"),
    (
        "stopping.include_stop",
        "sampling_params.include_stop_str_in_output",
    ),
    ("token_ids.ids", "tokenized.input_ids"),
];

/// Says why KV of another engine is of no use here.
const OWN_KV: &str = "the mesh moves KV between its workers itself";
const NO_MEDIA: &str = "prompts are text";

/// What a call asks for; `model` is what its metadata names.
///
/// # Errors
/// For fields that are out of their range, and for those that cannot be done.
pub(super) fn ask(request: GenerateRequest, model: String) -> Result<Asked, RequestError> {
    possible(&request)?;
    let mut params = request.sampling_params.unwrap_or_default();
    let logprobs = count(params.logprobs, "sampling_params.logprobs")?;
    let input = request.input.map(|input| match input {
        Given::Tokenized(prompt) => Input::TokenIds(v1::TokenIds {
            ids: prompt.input_ids,
        }),
        Given::Text(text) => Input::Prompt(text),
    });
    let own = v1::GenerateRequest {
        input,
        output: Some(v1::Output {
            // No answer has text: it is made only where stop strings are looked for in it.
            text: Some(!params.stop.is_empty()),
            logprobs,
            special_tokens: !params.skip_special_tokens,
            ..v1::Output::default()
        }),
        grammar: grammar(params.constraint.take())?,
        sampling: Some(sampling(&mut params)?),
        stopping: Some(stopping(&mut params)?),
        ..v1::GenerateRequest::default()
    };
    Ok(Asked {
        request_id: request.request_id,
        model,
        request: own,
        n: params.n,
        prompt_ids: false,
        face: Box::new(EngineFace::new(request.stream, logprobs.is_some())),
        names: NAMES,
    })
}

/// Refuses what would be another answer than the one that was asked for.
fn possible(request: &GenerateRequest) -> Result<(), RequestError> {
    let params = request.sampling_params.as_ref();
    let of = |has: fn(&SamplingParams) -> bool| params.is_some_and(has);
    let lacking = [
        (
            request.kv_transfer_params.is_some(),
            "kv_transfer_params",
            OWN_KV,
        ),
        (
            request.kv_transfer_params_json.is_some(),
            "kv_transfer_params_json",
            OWN_KV,
        ),
        (request.mm_inputs.is_some(), "mm_inputs", NO_MEDIA),
        (
            !request.extra_mm_inputs.is_empty(),
            "extra_mm_inputs",
            NO_MEDIA,
        ),
        (request.media_refs.is_some(), "media_refs", NO_MEDIA),
        (
            of(|params| params.prompt_logprobs.is_some()),
            "sampling_params.prompt_logprobs",
            "",
        ),
        (
            of(|params| params.truncate_prompt_tokens.is_some()),
            "sampling_params.truncate_prompt_tokens",
            "a prompt is never cut",
        ),
    ];
    for (asked, field, words) in lacking {
        if asked {
            return Err(unsupported(field, words));
        }
    }
    if request.data_parallel_rank.is_some_and(|rank| rank != 0) {
        let allowed = "0: a mesh is one rank, and chooses its workers itself";
        return Err(RequestError::invalid("data_parallel_rank", allowed));
    }
    Ok(())
}

/// A count that vLLM has -1 for "all" in.
fn count(given: Option<i32>, field: &str) -> Result<Option<u32>, RequestError> {
    let counted = |given: i32| {
        let allowed = || RequestError::invalid(field, format!("0 or above, not {given}"));
        u32::try_from(given).map_err(|_| allowed())
    };
    given.map(counted).transpose()
}

fn sampling(params: &mut SamplingParams) -> Result<v1::Sampling, RequestError> {
    // 0 is nobody's choice in these: proto3 has no other word for "unset".
    let given = |value: f32| (value != 0.0).then_some(value);
    Ok(v1::Sampling {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: given(params.top_p),
        min_p: params.min_p,
        repetition_penalty: given(params.repetition_penalty),
        frequency_penalty: params.frequency_penalty,
        presence_penalty: params.presence_penalty,
        logit_bias: biases(std::mem::take(&mut params.logit_bias))?,
        seed: params.seed.map(|seed| i64::from(seed).cast_unsigned()),
    })
}

fn biases(given: HashMap<i32, f32>) -> Result<Vec<v1::LogitBias>, RequestError> {
    let bias = |(id, bias): (i32, f32)| match u32::try_from(id) {
        Ok(token_id) => Ok(v1::LogitBias { token_id, bias }),
        Err(_) => {
            let field = format!("sampling_params.logit_bias[{id}]");
            Err(RequestError::invalid(field, "keys are token ids"))
        }
    };
    let mut all = given.into_iter().map(bias).collect::<Result<Vec<_>, _>>()?;
    // A map has no order, and what is computed should have one.
    all.sort_unstable_by_key(|bias| bias.token_id);
    Ok(all)
}

fn stopping(params: &mut SamplingParams) -> Result<v1::Stopping, RequestError> {
    if params.max_tokens == Some(0) {
        return Err(RequestError::invalid(
            "sampling_params.max_tokens",
            "at least 1",
        ));
    }
    Ok(v1::Stopping {
        max_tokens: params.max_tokens.unwrap_or(0),
        min_tokens: params.min_tokens,
        stop: std::mem::take(&mut params.stop),
        stop_token_ids: std::mem::take(&mut params.stop_token_ids),
        ignore_end_of_text: params.ignore_eos,
        include_stop: params.include_stop_str_in_output,
    })
}

fn grammar(constraint: Option<Constraint>) -> Result<Option<v1::Grammar>, RequestError> {
    let Some(constraint) = constraint else {
        return Ok(None);
    };
    let kind = match constraint {
        Constraint::JsonSchema(schema) => Kind::JsonSchema(schema),
        Constraint::Regex(regex) => Kind::Regex(regex),
        Constraint::Grammar(grammar) => Kind::Ebnf(grammar),
        Constraint::JsonObject(true) => Kind::JsonObject(true),
        Constraint::JsonObject(false) => return Ok(None),
        Constraint::StructuralTag(_) => {
            return Err(unsupported("sampling_params.structural_tag", ""));
        }
        Constraint::Choice(_) => return Err(unsupported("sampling_params.choice", "")),
    };
    Ok(Some(v1::Grammar {
        kind: Some(kind),
        ..v1::Grammar::default()
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kvmesh_wire::vllm::grpc::engine::{
        ChoiceConstraint, KvTransferParams, MediaRefs, MultimodalInputs, TokenizedInput,
    };

    use super::*;

    fn asked(params: SamplingParams) -> Result<v1::GenerateRequest, RequestError> {
        let request = GenerateRequest {
            sampling_params: Some(params),
            input: Some(Given::Tokenized(TokenizedInput {
                original_text: "ignored".to_owned(),
                input_ids: vec![5, 6],
            })),
            ..GenerateRequest::default()
        };
        ask(request, String::new()).map(|asked| asked.request)
    }

    #[test]
    fn what_is_not_said_is_the_default_of_each_side() {
        let own = asked(SamplingParams::default()).unwrap();
        let ids = v1::TokenIds { ids: vec![5, 6] };
        assert_eq!(own.input, Some(Input::TokenIds(ids)));
        assert_eq!(own.sampling, Some(v1::Sampling::default()));
        assert_eq!(own.stopping, Some(v1::Stopping::default()));
        let output = own.output.unwrap();
        assert_eq!((output.text, output.logprobs), (Some(false), None));
        assert!(output.special_tokens && own.grammar.is_none());
    }

    #[test]
    fn each_parameter_has_its_place() {
        let own = asked(SamplingParams {
            temperature: Some(0.0),
            top_p: 0.5,
            top_k: 7,
            min_p: 0.1,
            frequency_penalty: 0.2,
            presence_penalty: -0.3,
            repetition_penalty: 1.5,
            max_tokens: Some(9),
            min_tokens: 2,
            stop: vec!["end".to_owned()],
            stop_token_ids: vec![3],
            skip_special_tokens: true,
            ignore_eos: true,
            logprobs: Some(4),
            seed: Some(-1),
            include_stop_str_in_output: true,
            logit_bias: HashMap::from([(8, 1.0), (2, -1.0)]),
            constraint: Some(Constraint::Regex("a+".to_owned())),
            ..SamplingParams::default()
        })
        .unwrap();
        let bias = |token_id, bias| v1::LogitBias { token_id, bias };
        let sampling = v1::Sampling {
            temperature: Some(0.0),
            top_k: 7,
            top_p: Some(0.5),
            min_p: 0.1,
            repetition_penalty: Some(1.5),
            frequency_penalty: 0.2,
            presence_penalty: -0.3,
            logit_bias: vec![bias(2, -1.0), bias(8, 1.0)],
            seed: Some(u64::MAX),
        };
        assert_eq!(own.sampling, Some(sampling));
        let stopping = v1::Stopping {
            max_tokens: 9,
            min_tokens: 2,
            stop: vec!["end".to_owned()],
            stop_token_ids: vec![3],
            ignore_end_of_text: true,
            include_stop: true,
        };
        assert_eq!(own.stopping, Some(stopping));
        let output = own.output.unwrap();
        assert_eq!((output.text, output.logprobs), (Some(true), Some(4)));
        assert!(!output.special_tokens);
        let kind = own.grammar.unwrap().kind;
        assert_eq!(kind, Some(Kind::Regex("a+".to_owned())));
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let params = |change: fn(&mut SamplingParams)| {
            let mut params = SamplingParams::default();
            change(&mut params);
            asked(params).unwrap_err().to_string()
        };
        for (said, field) in [
            (
                params(|p| p.logprobs = Some(-1)),
                "sampling_params.logprobs",
            ),
            (
                params(|p| p.max_tokens = Some(0)),
                "sampling_params.max_tokens",
            ),
            (
                params(|p| p.prompt_logprobs = Some(0)),
                "sampling_params.prompt_logprobs",
            ),
            (
                params(|p| p.truncate_prompt_tokens = Some(-1)),
                "sampling_params.truncate_prompt_tokens",
            ),
            (
                params(|p| p.logit_bias = HashMap::from([(-2, 1.0)])),
                "sampling_params.logit_bias[-2]",
            ),
            (
                params(|p| p.constraint = Some(Constraint::StructuralTag(String::new()))),
                "sampling_params.structural_tag",
            ),
            (
                params(|p| p.constraint = Some(Constraint::Choice(ChoiceConstraint::default()))),
                "sampling_params.choice",
            ),
        ] {
            assert!(said.contains(field), "{field}: {said}");
        }
        let request = |change: fn(&mut GenerateRequest)| {
            let mut request = GenerateRequest::default();
            change(&mut request);
            let refused = ask(request, String::new()).map(|_| ());
            refused.unwrap_err().to_string()
        };
        for (said, field) in [
            (
                request(|r| r.kv_transfer_params = Some(KvTransferParams::default())),
                "kv_transfer_params",
            ),
            (
                request(|r| r.kv_transfer_params_json = Some("{}".to_owned())),
                "kv_transfer_params_json",
            ),
            (
                request(|r| r.data_parallel_rank = Some(1)),
                "data_parallel_rank",
            ),
            (
                request(|r| r.mm_inputs = Some(MultimodalInputs::default())),
                "mm_inputs",
            ),
            (
                request(|r| r.extra_mm_inputs = vec![MultimodalInputs::default()]),
                "extra_mm_inputs",
            ),
            (
                request(|r| r.media_refs = Some(MediaRefs::default())),
                "media_refs",
            ),
        ] {
            assert!(said.contains(field), "{field}: {said}");
        }
    }
}
