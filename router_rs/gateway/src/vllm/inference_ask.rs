//! From a `GenerateRequest` of `vllm.Inference` to the one that is ours.

use std::collections::HashMap;

use kvmesh_wire::{
    v1::{self, RequestClass, generate_request::Input, grammar::Kind},
    vllm::{
        DecodingParameters, GenerateRequest, KvCacheParameters, RandomSampling, ResponseOptions,
        StoppingCriteria, candidate_tokens::Select, decoding_parameters::StructuredOutput,
        generate_request::Prompt,
    },
};

use super::{
    field::Names,
    inference_answer::{InferenceFace, Wanted},
    open::Asked,
    unsupported,
};
use crate::error::RequestError;

/// Fields of ours by their names here; `sampling` is called so in both.
pub(super) const NAMES: Names = &[
    ("adapter", "lora_name"),
    ("grammar", "decoding.structured_output"),
    ("hints.cache_salt", "kv.cache_salt"),
    ("hints.conversation_id", "session_id"),
    ("input", "prompt"),
    ("n", "sampling.num_sequences"),
    ("output.logprobs", "response.output_candidates"),
    ("prompt", "text"),
    ("sampling.frequency_penalty", "decoding.frequency_penalty"),
    ("sampling.logit_bias", "decoding.logit_bias"),
    ("sampling.presence_penalty", "decoding.presence_penalty"),
    ("sampling.repetition_penalty", "decoding.repetition_penalty"),
    ("sampling.temperature", "temperature"),
    ("stopping.ignore_end_of_text", "stopping.ignore_eos"),
    ("stopping.include_stop", "stopping.include_stop_strings"),
    ("stopping.max_tokens", "stopping.max_new_tokens"),
    ("stopping.min_tokens", "stopping.min_new_tokens"),
    ("stopping.stop", "stopping.stop_strings"),
];

/// What a call asks for; `named` is the model that its metadata names.
///
/// # Errors
/// For fields that are out of their range, and for those that cannot be done.
pub(super) fn ask(
    request: GenerateRequest,
    named: String,
    stream: bool,
) -> Result<Asked, RequestError> {
    possible(&request)?;
    let response = request.response.unwrap_or_default();
    let (logprobs, candidates) = logprobs(&response)?;
    let kv = kv(request.kv.unwrap_or_default())?;
    let drawing = request.sampling.unwrap_or_default();
    let n = drawing.num_sequences;
    if n > 1 && !stream {
        let allowed = "0 or 1: an answer in one piece holds one, GenerateStream several";
        return Err(RequestError::invalid("sampling.num_sequences", allowed));
    }
    let mut decoding = request.decoding.unwrap_or_default();
    let stopping = stopping(request.stopping.unwrap_or_default());
    let wanted = Wanted {
        stream,
        text: response.output_text.unwrap_or(true),
        ids: response.output_token_ids,
        logprobs: logprobs.is_some(),
        candidates,
    };
    let input = request.prompt.map(|prompt| match prompt {
        Prompt::Text(text) => Input::Prompt(text),
        Prompt::TokenIds(ids) => Input::TokenIds(v1::TokenIds { ids: ids.ids }),
    });
    let own = v1::GenerateRequest {
        input,
        adapter: request.lora_name,
        grammar: grammar(decoding.structured_output.take())?,
        // Unset is greedy here, other than ours.
        sampling: Some(sampling(
            request.temperature.unwrap_or(0.0),
            drawing,
            decoding,
        )),
        output: Some(v1::Output {
            text: Some(wanted.text || !stopping.stop.is_empty()),
            logprobs,
            special_tokens: !response.skip_special_tokens.unwrap_or(true),
            ..v1::Output::default()
        }),
        stopping: Some(stopping),
        hints: Some(v1::Hints {
            request_class: class(request.priority).into(),
            conversation_id: request.session_id.unwrap_or_default(),
            cache_salt: kv,
            ..v1::Hints::default()
        }),
        ..v1::GenerateRequest::default()
    };
    Ok(Asked {
        request_id: request.request_id,
        model: match request.model.is_empty() {
            true => named,
            false => request.model,
        },
        request: own,
        n,
        prompt_ids: response.prompt_token_ids,
        face: Box::new(InferenceFace::new(wanted)),
        names: NAMES,
    })
}

/// Refuses what would be another answer than the one that was asked for.
fn possible(request: &GenerateRequest) -> Result<(), RequestError> {
    let decoding = request.decoding.as_ref();
    let response = request.response.as_ref();
    let stopping = request.stopping.as_ref();
    let lacking = [
        (
            request.truncate_prompt_tokens != 0,
            "truncate_prompt_tokens",
            "a prompt is never cut",
        ),
        (!request.media.is_empty(), "media", "prompts are text"),
        (
            request.engine_reasoning_gate.is_some(),
            "engine_reasoning_gate",
            "no parser of thought runs here",
        ),
        (
            decoding.is_some_and(|asked| !asked.allowed_token_ids.is_empty()),
            "decoding.allowed_token_ids",
            "",
        ),
        (
            decoding.is_some_and(|asked| !asked.bad_words_token_ids.is_empty()),
            "decoding.bad_words_token_ids",
            "",
        ),
        (
            stopping
                .is_some_and(|asked| asked.thinking_token_budget.is_some_and(|most| most != -1)),
            "stopping.thinking_token_budget",
            "no parser of thought runs here",
        ),
        (
            response.is_some_and(|asked| asked.prompt_logprobs),
            "response.prompt_logprobs",
            "",
        ),
    ];
    for (asked, field, words) in lacking {
        if asked {
            return Err(unsupported(field, words));
        }
    }
    Ok(())
}

/// Alternatives to report, and whether they go into the answer.
fn logprobs(response: &ResponseOptions) -> Result<(Option<u32>, bool), RequestError> {
    if !response.output_logprobs {
        return Ok((None, false));
    }
    let candidates = response.output_candidates.as_ref();
    match candidates.and_then(|asked| asked.select.as_ref()) {
        None | Some(Select::All(false)) => Ok((Some(0), false)),
        Some(Select::TopN(count)) => Ok((Some(*count), true)),
        Some(Select::TokenIds(_)) => Err(unsupported("response.output_candidates.token_ids", "")),
        Some(Select::All(true)) => Err(unsupported("response.output_candidates.all", "")),
    }
}

/// The salt of its prefixes.
fn kv(given: KvCacheParameters) -> Result<String, RequestError> {
    let own = "the mesh moves KV between its workers itself";
    for (asked, field, words) in [
        (given.bypass_prefix_cache, "kv.bypass_prefix_cache", ""),
        (
            given.kv_transfer_params.is_some(),
            "kv.kv_transfer_params",
            own,
        ),
        (
            given.ec_transfer_params.is_some(),
            "kv.ec_transfer_params",
            own,
        ),
    ] {
        if asked {
            return Err(unsupported(field, words));
        }
    }
    Ok(given.cache_salt)
}

fn sampling(
    temperature: f32,
    drawing: RandomSampling,
    decoding: DecodingParameters,
) -> v1::Sampling {
    v1::Sampling {
        temperature: Some(temperature),
        top_k: drawing.top_k.unwrap_or(0),
        top_p: drawing.top_p,
        min_p: drawing.min_p.unwrap_or(0.0),
        repetition_penalty: Some(decoding.repetition_penalty).filter(|given| *given != 0.0),
        frequency_penalty: decoding.frequency_penalty,
        presence_penalty: decoding.presence_penalty,
        logit_bias: biases(decoding.logit_bias),
        seed: drawing.seed.map(i64::cast_unsigned),
    }
}

fn biases(given: HashMap<u32, f32>) -> Vec<v1::LogitBias> {
    let bias = |(token_id, bias)| v1::LogitBias { token_id, bias };
    let mut all: Vec<_> = given.into_iter().map(bias).collect();
    // A map has no order, and what is computed should have one.
    all.sort_unstable_by_key(|bias| bias.token_id);
    all
}

fn stopping(given: StoppingCriteria) -> v1::Stopping {
    v1::Stopping {
        max_tokens: given.max_new_tokens,
        min_tokens: given.min_new_tokens,
        stop: given.stop_strings,
        stop_token_ids: given.stop_token_ids,
        ignore_end_of_text: given.ignore_eos,
        include_stop: given.include_stop_strings,
    }
}

/// Less is sooner, 0 is usual.
fn class(priority: i32) -> RequestClass {
    match priority.signum() {
        -1 => RequestClass::Interactive,
        0 => RequestClass::Unspecified,
        _ => RequestClass::Batch,
    }
}

fn grammar(given: Option<StructuredOutput>) -> Result<Option<v1::Grammar>, RequestError> {
    let Some(given) = given else {
        return Ok(None);
    };
    let kind = match given {
        StructuredOutput::Json(schema) => Kind::JsonSchema(schema),
        StructuredOutput::Regex(regex) => Kind::Regex(regex),
        StructuredOutput::Grammar(grammar) => Kind::Ebnf(grammar),
        StructuredOutput::JsonObject(true) => Kind::JsonObject(true),
        StructuredOutput::JsonObject(false) => return Ok(None),
        StructuredOutput::Choice(_) => return Err(unsupported("decoding.choice", "")),
        StructuredOutput::StructuralTag(_) => {
            return Err(unsupported("decoding.structural_tag", ""));
        }
    };
    Ok(Some(v1::Grammar {
        kind: Some(kind),
        ..v1::Grammar::default()
    }))
}

#[cfg(test)]
#[path = "inference_ask_tests.rs"]
mod tests;
