//! From what a body says to the requests that gRPC would send.

use kvmesh_wire::v1::{self, generate_request::Input};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use super::{
    Face,
    answer::Usages,
    fields::{Fields, StreamOptions},
    logprobs::Names,
    message,
    prompt::Prompt,
    terms,
    tools::Tools,
};
use crate::error::RequestError;

/// Most answers that one call may ask for, over all its prompts.
pub(super) const MAX_CHOICES: usize = 128;

/// What a call asks for.
#[derive(Debug)]
pub(super) struct Asked {
    /// Without its input.
    pub(super) request: v1::GenerateRequest,
    /// One a prompt. They meet the rest one by one: what the first is refused for is not
    /// copied for the others.
    pub(super) inputs: Vec<Input>,
    /// Answers to each.
    pub(super) n: u32,
    /// Their length, where the body says none: at most so many tokens, and as many as fit.
    pub(super) most: Option<u32>,
    pub(super) shape: Shape,
    /// Where any may be called.
    pub(super) tools: Option<Tools>,
}

/// What the answer looks like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) face: Face,
    pub(super) stream: bool,
    /// Of a stream.
    pub(super) usage: Usages,
    /// Where log-probabilities are wanted: what they call tokens.
    pub(super) logprobs: Option<Names>,
    /// It has the ids of tokens, those of the prompt, too.
    pub(super) token_ids: bool,
}

/// Refuses what no router of ours does.
fn unsupported<T>(field: &str, words: &str) -> Result<T, RequestError> {
    Err(RequestError::Unsupported {
        field: field.to_owned(),
        words: words.to_owned(),
    })
}

/// What a call asks for.
///
/// # Errors
/// For fields that are out of their range, and for those that cannot be done.
pub(super) fn ask(face: Face, mut fields: Fields) -> Result<Asked, RequestError> {
    possible(face, &fields)?;
    let tools = Tools::take(&mut fields)?;
    let inputs = inputs(face, &mut fields, tools.as_ref())?;
    let n = fields.n.unwrap_or(1);
    let choices = inputs.len().saturating_mul(n as usize);
    if !(1..=MAX_CHOICES).contains(&choices) {
        // Of more prompts not all were counted.
        let asked = match inputs.len() > MAX_CHOICES {
            true => "more".to_owned(),
            false => choices.to_string(),
        };
        let allowed = format!("1 to {MAX_CHOICES} answers to all prompts, not {asked}");
        return Err(RequestError::invalid("n", allowed));
    }
    if fields.best_of.is_some_and(|best| best != n) {
        return unsupported("best_of", "all answers are given: ask for them with n");
    }
    let logprobs = terms::logprobs(face, &fields)?;
    let most = terms::most(face, &fields)?;
    let stream = fields.stream.unwrap_or(false);
    let shape = Shape {
        face,
        stream,
        usage: usages(&fields),
        logprobs: logprobs.map(|_| match fields.return_tokens_as_token_ids {
            Some(true) => Names::Ids,
            _ => Names::Texts,
        }),
        token_ids: fields.return_token_ids.unwrap_or(false),
    };
    let request = v1::GenerateRequest {
        model: fields.model.take().unwrap_or_default(),
        sampling: Some(terms::sampling(&mut fields)?),
        stopping: Some(terms::stopping(face, &mut fields)?),
        output: Some(v1::Output {
            logprobs,
            special_tokens: !fields.skip_special_tokens.unwrap_or(true),
            ..v1::Output::default()
        }),
        hints: Some(v1::Hints {
            request_class: terms::class(&fields)?.into(),
            cache_salt: fields.cache_salt.take().unwrap_or_default(),
            conversation_id: fields.session_id.take().unwrap_or_default(),
            ..v1::Hints::default()
        }),
        grammar: match tools.as_ref().map(Tools::grammar).transpose()?.flatten() {
            Some(forced) => Some(forced),
            None => terms::grammar(fields.response_format.take())?,
        },
        ..v1::GenerateRequest::default()
    };
    Ok(Asked {
        request,
        inputs,
        n,
        most,
        shape,
        tools,
    })
}

/// Refuses what would be another answer than the one that was asked for.
fn possible(face: Face, fields: &Fields) -> Result<(), RequestError> {
    known(fields)?;
    match face {
        Face::Completion => no_chat(fields)?,
        Face::Chat if fields.messages.is_some() && fields.prompt.is_some() => {
            return unsupported("prompt", "a chat has messages");
        }
        Face::Chat => {}
    }
    let modalities = fields.modalities.as_deref().unwrap_or_default();
    if modalities.iter().any(|kind| kind != "text") {
        return unsupported("modalities", "answers are text");
    }
    Ok(())
}

/// Refuses what nothing here can do, on whatever path.
pub(super) fn known(fields: &Fields) -> Result<(), RequestError> {
    if let Some((field, words)) = fields.refused {
        return unsupported(field, words);
    }
    let options = fields.stream_options.as_ref();
    if options.and_then(|options| options.include_obfuscation) == Some(true) {
        return unsupported(
            "stream_options.include_obfuscation",
            "chunks are not padded",
        );
    }
    Ok(())
}

/// Refuses what only a chat can have.
pub(super) fn no_chat(fields: &Fields) -> Result<(), RequestError> {
    let tools = fields.tools.as_ref();
    for (given, field) in [
        (fields.messages.is_some(), "messages"),
        (tools.is_some_and(|tools| !tools.0.is_empty()), "tools"),
        (
            fields.max_completion_tokens.is_some(),
            "max_completion_tokens",
        ),
        (
            fields.top_logprobs.is_some_and(|top| top > 0),
            "top_logprobs",
        ),
        (fields.reasoning_effort.is_some(), "reasoning_effort"),
        (
            fields.add_generation_prompt.is_some(),
            "add_generation_prompt",
        ),
        (
            fields.chat_template_kwargs.is_some(),
            "chat_template_kwargs",
        ),
    ] {
        if given {
            return unsupported(field, "only in chats");
        }
    }
    Ok(())
}

fn inputs(
    face: Face,
    fields: &mut Fields,
    tools: Option<&Tools>,
) -> Result<Vec<Input>, RequestError> {
    match face {
        Face::Chat => Ok(vec![Input::Chat(chat(fields, tools)?)]),
        Face::Completion => {
            added_tokens(fields, true)?;
            let prompt = fields.prompt.take();
            let prompt = prompt.ok_or_else(|| RequestError::invalid("prompt", "required"))?;
            Ok(prompts(prompt))
        }
    }
}

fn prompts(prompt: Prompt) -> Vec<Input> {
    let ids = |ids| Input::TokenIds(v1::TokenIds { ids });
    match prompt {
        Prompt::Text(text) => vec![Input::Prompt(text)],
        Prompt::Ids(list) => vec![ids(list)],
        Prompt::Texts(texts) => texts.into_iter().map(Input::Prompt).collect(),
        Prompt::IdLists(lists) => lists.into_iter().map(ids).collect(),
    }
}

/// The conversation, and what its template is told besides.
pub(super) fn chat(fields: &mut Fields, tools: Option<&Tools>) -> Result<v1::Chat, RequestError> {
    added_tokens(fields, false)?;
    let messages = fields.messages.take();
    let messages = messages.ok_or_else(|| RequestError::invalid("messages", "required"))?;
    let arguments = fields.chat_template_kwargs.take();
    let arguments = template_arguments(arguments.as_deref(), fields.reasoning_effort.take())?;
    Ok(v1::Chat {
        add_generation_prompt: fields.add_generation_prompt,
        template_arguments_json: arguments,
        tools_json: tools.map(Tools::offered).unwrap_or_default(),
        ..message::chat(messages)?
    })
}

/// What a template is told besides, as JSON: an effort of its own among what the client wrote wins.
fn template_arguments(
    given: Option<&RawValue>,
    effort: Option<String>,
) -> Result<String, RequestError> {
    #[derive(Deserialize)]
    struct Known {
        /// Null counts, too.
        #[serde(default, rename = "reasoning_effort", deserialize_with = "there")]
        effort: bool,
    }
    fn there<'de, D: serde::Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
        IgnoredAny::deserialize(from).map(|_| true)
    }
    let invalid = || RequestError::invalid("chat_template_kwargs", "a JSON object");
    let given = given.map_or("{}", RawValue::get);
    let known: Known = match given.starts_with('{') {
        true => serde_json::from_str(given).map_err(|_| invalid())?,
        false => return Err(invalid()),
    };
    let within = given.trim_start_matches('{').trim_start();
    let empty = within.starts_with('}');
    Ok(match effort.filter(|_| !known.effort) {
        None if empty => String::new(),
        None => given.to_owned(),
        Some(effort) => {
            let comma = if empty { "" } else { "," };
            let effort = serde_json::Value::String(effort);
            format!("{{\"reasoning_effort\":{effort}{comma}{within}")
        }
    })
}

/// Special tokens around a prompt are the tokeniser's to add, around a chat its
/// template's.
pub(super) fn added_tokens(fields: &Fields, added: bool) -> Result<(), RequestError> {
    match fields
        .add_special_tokens
        .is_some_and(|asked| asked != added)
    {
        true => unsupported(
            "add_special_tokens",
            "it is true for a prompt, false for a chat",
        ),
        false => Ok(()),
    }
}

/// As vLLM: the usage so far is told where that of all is.
fn usages(fields: &Fields) -> Usages {
    let asked = |flag: fn(&StreamOptions) -> Option<bool>| {
        fields.stream_options.as_ref().and_then(flag) == Some(true)
    };
    match asked(|options| options.include_usage) {
        false => Usages::Nowhere,
        true if asked(|options| options.continuous_usage_stats) => Usages::Each,
        true => Usages::Last,
    }
}

#[cfg(test)]
#[path = "every_field_tests.rs"]
mod every_field;

#[cfg(test)]
#[path = "ask_tests.rs"]
mod tests;
