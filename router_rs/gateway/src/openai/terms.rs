//! How an answer is drawn, where it ends, and what it is held to.

use std::collections::BTreeMap;

use kvmesh_wire::v1::{self, RequestClass, grammar::Kind};

use super::{
    Face,
    fields::{Fields, Logprobs, ResponseFormat},
};
use crate::error::RequestError;

/// Output length of a completion that gives none, where so many fit: what OpenAI's legacy
/// API and vLLM take. A chat without one may use what the context leaves.
const COMPLETION_TOKENS: u32 = 16;

/// The length of an answer whose body says none.
pub(super) fn most(face: Face, fields: &Fields) -> Result<Option<u32>, RequestError> {
    if face == Face::Chat || fields.max_tokens.is_some() {
        return Ok(None);
    }
    if fields
        .min_tokens
        .is_some_and(|least| least > COMPLETION_TOKENS)
    {
        let allowed = format!("0 to max_tokens, which is {COMPLETION_TOKENS}");
        return Err(RequestError::invalid("min_tokens", allowed));
    }
    Ok(Some(COMPLETION_TOKENS))
}

/// Alternatives to report.
pub(super) fn logprobs(face: Face, fields: &Fields) -> Result<Option<u32>, RequestError> {
    match (face, fields.logprobs) {
        (Face::Chat, Some(Logprobs::Flag(true))) => Ok(Some(fields.top_logprobs.unwrap_or(0))),
        (Face::Chat, None | Some(Logprobs::Flag(false))) => match fields.top_logprobs {
            None | Some(0) => Ok(None),
            Some(_) => Err(RequestError::invalid(
                "top_logprobs",
                "needs logprobs: true",
            )),
        },
        (Face::Completion, None | Some(Logprobs::Flag(false))) => Ok(None),
        (Face::Completion, Some(Logprobs::Count(count))) => Ok(Some(count)),
        (Face::Chat, Some(Logprobs::Count(_))) => {
            Err(RequestError::invalid("logprobs", "true or false in a chat"))
        }
        (Face::Completion, Some(Logprobs::Flag(true))) => Err(RequestError::invalid(
            "logprobs",
            "a number in a completion",
        )),
    }
}

pub(super) fn sampling(fields: &mut Fields) -> Result<v1::Sampling, RequestError> {
    let top_k = match fields.top_k {
        // vLLM's word for "all".
        None | Some(-1) => 0,
        Some(k) => u32::try_from(k)
            .map_err(|_| RequestError::invalid("top_k", format!("-1, 0 or above, not {k}")))?,
    };
    Ok(v1::Sampling {
        temperature: fields.temperature,
        top_k,
        top_p: fields.top_p,
        min_p: fields.min_p.unwrap_or(0.0),
        repetition_penalty: fields.repetition_penalty,
        frequency_penalty: fields.frequency_penalty.unwrap_or(0.0),
        presence_penalty: fields.presence_penalty.unwrap_or(0.0),
        logit_bias: biases(fields.logit_bias.take().unwrap_or_default())?,
        seed: fields.seed.map(i64::cast_unsigned),
    })
}

fn biases(given: BTreeMap<String, f32>) -> Result<Vec<v1::LogitBias>, RequestError> {
    let bias = |(id, bias): (String, f32)| match id.parse() {
        Ok(token_id) => Ok(v1::LogitBias { token_id, bias }),
        Err(_) => {
            let allowed = "keys are token ids, as text";
            Err(RequestError::invalid(format!("logit_bias[{id}]"), allowed))
        }
    };
    given.into_iter().map(bias).collect()
}

pub(super) fn stopping(face: Face, fields: &mut Fields) -> Result<v1::Stopping, RequestError> {
    let (name, asked) = match (fields.max_completion_tokens, face) {
        (Some(most), Face::Chat) => ("max_completion_tokens", Some(most)),
        _ => ("max_tokens", fields.max_tokens),
    };
    if asked == Some(0) {
        return Err(RequestError::invalid(name, "at least 1"));
    }
    let stop = fields.stop.take().map_or_else(Vec::new, |stop| stop.0);
    Ok(v1::Stopping {
        max_tokens: asked.unwrap_or(0),
        min_tokens: fields.min_tokens.unwrap_or(0),
        stop,
        stop_token_ids: fields.stop_token_ids.take().unwrap_or_default(),
        ignore_end_of_text: fields.ignore_eos.unwrap_or(false),
        include_stop: fields.include_stop_str_in_output.unwrap_or(false),
    })
}

/// `priority` as vLLM has it (less is sooner, 0 is usual), else OpenAI's tier.
pub(super) fn class(fields: &Fields) -> Result<RequestClass, RequestError> {
    if let Some(priority) = fields.priority {
        return Ok(match priority.signum() {
            -1 => RequestClass::Interactive,
            0 => RequestClass::Unspecified,
            _ => RequestClass::Batch,
        });
    }
    match fields.service_tier.as_deref() {
        // OpenAI's "scale" is a matter of contracts.
        None | Some("auto" | "default" | "scale") => Ok(RequestClass::Unspecified),
        Some("priority") => Ok(RequestClass::Interactive),
        Some("flex") => Ok(RequestClass::Batch),
        Some(_) => {
            let allowed = "auto, default, scale, priority or flex";
            Err(RequestError::invalid("service_tier", allowed))
        }
    }
}

pub(super) fn grammar(format: Option<ResponseFormat>) -> Result<Option<v1::Grammar>, RequestError> {
    let Some(format) = format else {
        return Ok(None);
    };
    let kind = match format.r#type.as_str() {
        "text" => return Ok(None),
        "json_object" => Kind::JsonObject(true),
        "json_schema" => {
            let schema = format.json_schema.and_then(|given| given.schema);
            let field = "response_format.json_schema.schema";
            let schema = schema.ok_or_else(|| RequestError::invalid(field, "required"))?;
            Kind::JsonSchema(schema.get().to_owned())
        }
        _ => {
            let allowed = "text, json_object or json_schema";
            return Err(RequestError::invalid("response_format.type", allowed));
        }
    };
    Ok(Some(v1::Grammar {
        kind: Some(kind),
        ..v1::Grammar::default()
    }))
}
