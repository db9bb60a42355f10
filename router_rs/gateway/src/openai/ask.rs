//! From what a body says to the requests that gRPC would send.

use kvmesh_wire::v1::{self, generate_request::Input};
use serde_json::{Map, Value};

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
    if let Some((field, words)) = fields.refused {
        return unsupported(field, words);
    }
    let tools = fields.tools.as_ref();
    let tools = tools.is_some_and(|tools| !tools.0.is_empty());
    if tools && face == Face::Completion {
        return unsupported("tools", "only in chats");
    }
    let modalities = fields.modalities.as_deref().unwrap_or_default();
    if modalities.iter().any(|kind| kind != "text") {
        return unsupported("modalities", "answers are text");
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
    let mut arguments = fields.chat_template_kwargs.take().unwrap_or_default();
    if let Some(effort) = fields.reasoning_effort.take() {
        arguments
            .entry("reasoning_effort")
            .or_insert(Value::String(effort));
    }
    Ok(v1::Chat {
        add_generation_prompt: fields.add_generation_prompt,
        template_arguments_json: text_of(arguments),
        tools_json: tools.map(Tools::offered).unwrap_or_default(),
        ..message::chat(messages)?
    })
}

fn text_of(arguments: Map<String, Value>) -> String {
    match arguments.is_empty() {
        true => String::new(),
        false => Value::Object(arguments).to_string(),
    }
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
mod tests {
    #![allow(clippy::unwrap_used)]
    use kvmesh_wire::v1::{RequestClass, grammar::Kind};
    use serde_json::json;

    use super::*;

    fn asked(face: Face, body: &Value) -> Result<Asked, RequestError> {
        ask(face, Fields::read(body.to_string().as_bytes()).unwrap())
    }

    fn one(face: Face, body: &Value) -> v1::GenerateRequest {
        let mut asked = asked(face, body).unwrap();
        v1::GenerateRequest {
            input: asked.inputs.pop(),
            ..asked.request
        }
    }

    #[test]
    fn each_field_has_its_place_in_the_request() {
        let body = json!({"model": "m", "prompt": "p", "max_tokens": 9, "min_tokens": 2,
            "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": -1,
            "repetition_penalty": 1.5, "frequency_penalty": 0.75, "presence_penalty": -0.5,
            "logit_bias": {"5": -100, "6": 2.5}, "stop": ["a", "b"], "stop_token_ids": [3],
            "ignore_eos": true, "include_stop_str_in_output": true, "skip_special_tokens": false,
            "logprobs": 4, "priority": 3, "cache_salt": "s"});
        let request = one(Face::Completion, &body);
        let bias = |token_id, bias| v1::LogitBias { token_id, bias };
        let expected = v1::GenerateRequest {
            model: "m".to_owned(),
            input: Some(Input::Prompt("p".to_owned())),
            sampling: Some(v1::Sampling {
                temperature: Some(0.5),
                top_k: 7,
                top_p: Some(0.25),
                min_p: 0.125,
                repetition_penalty: Some(1.5),
                frequency_penalty: 0.75,
                presence_penalty: -0.5,
                logit_bias: vec![bias(5, -100.0), bias(6, 2.5)],
                seed: Some(u64::MAX),
            }),
            stopping: Some(v1::Stopping {
                max_tokens: 9,
                min_tokens: 2,
                stop: vec!["a".to_owned(), "b".to_owned()],
                stop_token_ids: vec![3],
                ignore_end_of_text: true,
                include_stop: true,
            }),
            output: Some(v1::Output {
                logprobs: Some(4),
                special_tokens: true,
                ..Default::default()
            }),
            hints: Some(v1::Hints {
                request_class: RequestClass::Batch.into(),
                cache_salt: "s".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(request, expected);
    }

    #[test]
    fn an_absent_length_is_16_in_a_completion_and_the_rest_of_the_context_in_a_chat() {
        let most = |face, body: Value| {
            let asked = asked(face, &body).unwrap();
            (asked.request.stopping.unwrap().max_tokens, asked.most)
        };
        assert_eq!(
            most(Face::Completion, json!({"prompt": "p"})),
            (0, Some(16))
        );
        let given = json!({"prompt": "p", "max_tokens": 20, "min_tokens": 20});
        assert_eq!(most(Face::Completion, given), (20, None));
        let messages = json!([{"role": "user", "content": "hi"}]);
        assert_eq!(most(Face::Chat, json!({"messages": messages})), (0, None));
        let both = json!({"messages": messages, "max_tokens": 5, "max_completion_tokens": 7});
        assert_eq!(most(Face::Chat, both), (7, None));
    }

    #[test]
    fn several_prompts_are_several_requests_with_n_answers_each() {
        let body = json!({"prompt": [[1, 2], [3]], "n": 3});
        let asked = asked(Face::Completion, &body).unwrap();
        let ids = |input| match input {
            Input::TokenIds(ids) => ids.ids,
            other => panic!("{other:?}"),
        };
        let all: Vec<_> = asked.inputs.into_iter().map(ids).collect();
        assert_eq!((all, asked.n), (vec![vec![1, 2], vec![3]], 3));
    }

    #[test]
    fn parts_of_text_are_joined_and_a_template_is_told_of_the_effort() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let body = json!({"messages": [{"role": "user", "content": parts}],
            "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": false}});
        let Some(Input::Chat(chat)) = one(Face::Chat, &body).input else {
            panic!("a chat");
        };
        assert_eq!(chat.messages[0].content, "a\nb");
        let arguments: Value = serde_json::from_str(&chat.template_arguments_json).unwrap();
        assert_eq!(
            arguments,
            json!({"enable_thinking": false, "reasoning_effort": "low"})
        );
    }

    #[test]
    fn what_an_assistant_refused_in_words_is_what_it_said() {
        let refusal = json!({"type": "refusal", "refusal": "No."});
        let text = json!({"type": "text", "text": "Well."});
        let said = |message: Value| {
            let body = json!({"messages": [message]});
            asked(Face::Chat, &body).map(|mut asked| match asked.inputs.pop() {
                Some(Input::Chat(mut chat)) => chat.messages.remove(0).content,
                other => panic!("{other:?}"),
            })
        };
        let parts = json!({"role": "assistant", "content": [text, refusal]});
        assert_eq!(said(parts).unwrap(), "Well.\nNo.");
        let answered = json!({"role": "assistant", "content": null, "refusal": "No."});
        assert_eq!(said(answered).unwrap(), "No.");
        let both = json!({"role": "assistant", "content": "Well.", "refusal": null});
        assert_eq!(said(both).unwrap(), "Well.");
        // Nobody else refuses.
        let other = json!({"role": "user", "content": [refusal]});
        let error = said(other).unwrap_err().to_string();
        assert!(error.contains("messages[0].content[0].type"), "{error}");
        let empty = json!({"role": "assistant", "content": [{"type": "refusal"}]});
        let error = said(empty).unwrap_err().to_string();
        assert!(error.contains("messages[0].content[0].refusal"), "{error}");
    }

    #[test]
    fn each_tier_has_its_class() {
        for (tier, class) in [
            ("auto", RequestClass::Unspecified),
            ("default", RequestClass::Unspecified),
            ("scale", RequestClass::Unspecified),
            ("priority", RequestClass::Interactive),
            ("flex", RequestClass::Batch),
        ] {
            let body = json!({"prompt": "p", "service_tier": tier});
            let hints = one(Face::Completion, &body).hints.unwrap();
            assert_eq!(hints.request_class(), class, "{tier}");
        }
    }

    #[test]
    fn a_language_is_asked_for_as_over_grpc() {
        let schema = json!({"type": "object"});
        let format = |format: Value| {
            let body = json!({"prompt": "p", "response_format": format});
            one(Face::Completion, &body)
                .grammar
                .map(|g| g.kind.unwrap())
        };
        assert_eq!(format(json!({"type": "text"})), None);
        let any = format(json!({"type": "json_object"}));
        assert_eq!(any, Some(Kind::JsonObject(true)));
        let one = format(json!({"type": "json_schema", "json_schema": {"schema": schema}}));
        assert_eq!(one, Some(Kind::JsonSchema(schema.to_string())));
    }

    #[test]
    fn what_is_refused_names_its_field() {
        let message = json!([{"role": "user", "content": "hi"}]);
        let image = json!([{"role": "user", "content": [{"type": "image_url"}]}]);
        let tool = json!([{"type": "function", "function": {"name": "f"}}]);
        for (face, body, field) in [
            (Face::Completion, json!({}), "prompt"),
            (Face::Chat, json!({"prompt": "p"}), "messages"),
            (Face::Completion, json!({"prompt": "p", "n": 0}), "n"),
            (Face::Completion, json!({"prompt": "p", "n": 129}), "n"),
            (
                Face::Completion,
                json!({"prompt": "p", "best_of": 2}),
                "best_of",
            ),
            (
                Face::Completion,
                json!({"prompt": "p", "max_tokens": 0}),
                "max_tokens",
            ),
            (
                Face::Completion,
                json!({"prompt": "p", "min_tokens": 17}),
                "min_tokens",
            ),
            (
                Face::Completion,
                json!({"prompt": "p", "echo": true}),
                "echo",
            ),
            (
                Face::Completion,
                json!({"prompt": "p", "top_k": -2}),
                "top_k",
            ),
            (
                Face::Completion,
                json!({"prompt": "p", "logprobs": true}),
                "logprobs",
            ),
            (
                Face::Completion,
                json!({"prompt": "p", "logit_bias": {"x": 1}}),
                "logit_bias[x]",
            ),
            (
                Face::Completion,
                json!({"prompt": "p", "service_tier": "gold"}),
                "service_tier",
            ),
            (
                Face::Chat,
                json!({"messages": message, "top_logprobs": 3}),
                "top_logprobs",
            ),
            (
                Face::Completion,
                json!({"prompt": "p", "tools": tool}),
                "tools",
            ),
            (
                Face::Chat,
                json!({"messages": message, "tool_choice": "required"}),
                "tool_choice",
            ),
            (
                Face::Chat,
                json!({"messages": message, "modalities": ["audio"]}),
                "modalities",
            ),
            (
                Face::Chat,
                json!({"messages": image}),
                "messages[0].content[0].type",
            ),
        ] {
            let error = asked(face, &body).unwrap_err();
            let named = match &error {
                RequestError::Invalid(all) => &all.0[0].field,
                RequestError::Unsupported { field, .. } => field,
                other => panic!("{body}: {other}"),
            };
            assert_eq!(named, field, "{body}");
        }
        // Tools that are offered and not to be used change nothing.
        let none = json!({"messages": message, "tools": tool, "tool_choice": "none"});
        assert!(asked(Face::Chat, &none).unwrap().tools.is_none());
    }
}
