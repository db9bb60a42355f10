//! What the body of a request says, field by field.
//!
//! Read by hand, so that an error names its field, a long prompt is copied
//! once, and what is not known costs nothing.

use std::collections::BTreeMap;

use serde::{
    Deserialize,
    de::{
        DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor,
        value::SeqAccessDeserializer,
    },
};
use serde_json::value::RawValue;

use super::{
    message::Message,
    prompt::Prompt,
    refused::{Asks, Refused, refused},
};
use crate::{door::MAX_TOOLS, error::RequestError};

/// A body. What is absent and what is `null` are the same. JSON that is passed on stays text: as
/// values it would take many times its bytes.
#[derive(Debug, Default)]
pub(super) struct Fields {
    pub(super) model: Option<String>,
    pub(super) messages: Option<Vec<Message>>,
    pub(super) prompt: Option<Prompt>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) n: Option<u32>,
    pub(super) best_of: Option<u32>,
    pub(super) max_tokens: Option<u32>,
    pub(super) max_completion_tokens: Option<u32>,
    pub(super) min_tokens: Option<u32>,
    pub(super) stop: Option<Stop>,
    pub(super) stop_token_ids: Option<Vec<u32>>,
    pub(super) ignore_eos: Option<bool>,
    pub(super) include_stop_str_in_output: Option<bool>,
    pub(super) skip_special_tokens: Option<bool>,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f32>,
    pub(super) repetition_penalty: Option<f32>,
    pub(super) frequency_penalty: Option<f32>,
    pub(super) presence_penalty: Option<f32>,
    pub(super) logit_bias: Option<BTreeMap<String, f32>>,
    pub(super) seed: Option<i64>,
    pub(super) logprobs: Option<Logprobs>,
    pub(super) top_logprobs: Option<u32>,
    pub(super) priority: Option<i64>,
    pub(super) service_tier: Option<String>,
    pub(super) cache_salt: Option<String>,
    pub(super) session_id: Option<String>,
    pub(super) response_format: Option<ResponseFormat>,
    pub(super) tools: Option<Offered>,
    pub(super) tool_choice: Option<Box<RawValue>>,
    pub(super) parallel_tool_calls: Option<bool>,
    pub(super) modalities: Option<Vec<String>>,
    pub(super) reasoning_effort: Option<String>,
    pub(super) add_generation_prompt: Option<bool>,
    pub(super) add_special_tokens: Option<bool>,
    pub(super) chat_template_kwargs: Option<Box<RawValue>>,
    pub(super) return_token_strs: Option<bool>,
    pub(super) return_token_ids: Option<bool>,
    pub(super) return_tokens_as_token_ids: Option<bool>,
    pub(super) tokens: Option<Vec<u32>>,
    /// The first that was asked for of those that nothing here can do.
    pub(super) refused: Option<&'static Refused>,
}

/// Where to stop.
#[derive(Debug)]
pub(super) struct Stop(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(StopVisitor)
    }
}

struct StopVisitor;

impl<'de> Visitor<'de> for StopVisitor {
    type Value = Stop;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("text, or a list of texts")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Stop, E> {
        Ok(Stop(vec![text.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Stop, A::Error> {
        Deserialize::deserialize(SeqAccessDeserializer::new(list)).map(Stop)
    }
}

/// A flag for chats, a number for completions.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged, expecting = "true or false in a chat, else a whole number")]
pub(super) enum Logprobs {
    Flag(bool),
    Count(u32),
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct StreamOptions {
    pub(super) include_usage: Option<bool>,
    pub(super) continuous_usage_stats: Option<bool>,
    pub(super) include_obfuscation: Option<bool>,
}

/// The language of the answer.
#[derive(Debug, Deserialize)]
pub(super) struct ResponseFormat {
    pub(super) r#type: String,
    pub(super) json_schema: Option<JsonSchema>,
}

#[derive(Debug, Deserialize)]
pub(super) struct JsonSchema {
    pub(super) schema: Option<Box<RawValue>>,
}

/// What is wrong with a body, without what it says: that may be a prompt, and errors are
/// logged.
fn needed(error: &serde_json::Error) -> String {
    let said = error.to_string();
    match said.rsplit_once(", expected ") {
        Some((_, needed)) => format!("needed is {needed}"),
        None => said,
    }
}

impl Fields {
    /// Reads a body.
    ///
    /// # Errors
    /// [`RequestError::Malformed`] for what is no JSON object, and
    /// [`RequestError::Invalid`] for a field of another type.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, RequestError> {
        let mut reading = Reading::default();
        let mut json = serde_json::Deserializer::from_slice(bytes);
        let read = reading
            .deserialize(&mut json)
            .and_then(|fields| json.end().map(|()| fields));
        read.map_err(|error| match reading.field.take() {
            Some(field) if error.is_data() => RequestError::invalid(field, needed(&error)),
            _ => RequestError::Malformed(needed(&error)),
        })
    }

    /// Takes the value of one field.
    fn take<'de, A: MapAccess<'de>>(&mut self, field: &str, map: &mut A) -> Result<(), A::Error> {
        match field {
            "model" => self.model = map.next_value()?,
            "messages" => self.messages = map.next_value()?,
            "prompt" => self.prompt = map.next_value()?,
            "stream" => self.stream = map.next_value()?,
            "stream_options" => self.stream_options = map.next_value()?,
            "n" => self.n = map.next_value()?,
            "best_of" => self.best_of = map.next_value()?,
            "max_tokens" => self.max_tokens = map.next_value()?,
            "max_completion_tokens" => self.max_completion_tokens = map.next_value()?,
            "min_tokens" => self.min_tokens = map.next_value()?,
            "stop" => self.stop = map.next_value()?,
            "stop_token_ids" => self.stop_token_ids = map.next_value()?,
            "ignore_eos" => self.ignore_eos = map.next_value()?,
            "include_stop_str_in_output" => self.include_stop_str_in_output = map.next_value()?,
            "skip_special_tokens" => self.skip_special_tokens = map.next_value()?,
            "temperature" => self.temperature = map.next_value()?,
            "top_p" => self.top_p = map.next_value()?,
            "top_k" => self.top_k = map.next_value()?,
            "min_p" => self.min_p = map.next_value()?,
            "repetition_penalty" => self.repetition_penalty = map.next_value()?,
            "frequency_penalty" => self.frequency_penalty = map.next_value()?,
            "presence_penalty" => self.presence_penalty = map.next_value()?,
            "logit_bias" => self.logit_bias = map.next_value()?,
            "seed" => self.seed = map.next_value()?,
            "logprobs" => self.logprobs = map.next_value()?,
            "top_logprobs" => self.top_logprobs = map.next_value()?,
            "priority" => self.priority = map.next_value()?,
            "service_tier" => self.service_tier = map.next_value()?,
            "cache_salt" => self.cache_salt = map.next_value()?,
            "session_id" => self.session_id = map.next_value()?,
            "response_format" => self.response_format = map.next_value()?,
            "tools" => self.tools = map.next_value()?,
            "tool_choice" => self.tool_choice = map.next_value()?,
            "parallel_tool_calls" => self.parallel_tool_calls = map.next_value()?,
            "modalities" => self.modalities = map.next_value()?,
            "reasoning_effort" => self.reasoning_effort = map.next_value()?,
            "add_generation_prompt" => self.add_generation_prompt = map.next_value()?,
            "add_special_tokens" => self.add_special_tokens = map.next_value()?,
            "chat_template_kwargs" => self.chat_template_kwargs = map.next_value()?,
            "return_token_strs" => self.return_token_strs = map.next_value()?,
            "return_tokens_as_token_ids" => self.return_tokens_as_token_ids = map.next_value()?,
            "return_token_ids" => self.return_token_ids = map.next_value()?,
            "tokens" => self.tokens = map.next_value()?,
            // Of these the default is not what is empty.
            "include_reasoning" => {
                let included: Option<bool> = map.next_value()?;
                self.refuse(field, included == Some(false));
            }
            "thinking_token_budget" => {
                let most: Option<i64> = map.next_value()?;
                self.refuse(field, most.is_some_and(|most| most >= 0));
            }
            "prompt_logprobs" | "routed_experts_prompt_start" => {
                let given: Option<i64> = map.next_value()?;
                self.refuse(field, given.is_some());
            }
            "stream_interval" => {
                let tokens: Option<i64> = map.next_value()?;
                self.refuse(field, tokens.is_some_and(|tokens| tokens != 1));
            }
            "verbosity" => {
                let how: Option<String> = map.next_value()?;
                self.refuse(field, how.is_some_and(|how| how != "medium"));
            }
            field if refused(field).is_some() => {
                let Asks(asked) = map.next_value()?;
                self.refuse(field, asked);
            }
            _ => {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    /// Remembers a field that cannot be done, where it was asked for.
    fn refuse(&mut self, field: &str, asked: bool) {
        if asked && self.refused.is_none() {
            self.refused = refused(field);
        }
    }
}

/// Tools as they were written. One more is kept than may be offered: the call is refused for
/// that, whatever is behind it.
#[derive(Debug)]
pub(super) struct Offered(pub(super) Vec<Box<RawValue>>);

impl Offered {
    /// Bytes that their schemas take as trees: as they were sent, as what a grammar holds to, and
    /// as a part of the whole grammar.
    pub(super) fn tree_bytes(&self) -> usize {
        let tools = self.0.iter().map(|tool| tool.get());
        3 * tools
            .map(|tool| kvmesh_text::tree_bytes(tool, false))
            .sum::<usize>()
    }
}

impl<'de> Deserialize<'de> for Offered {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(OfferedVisitor)
    }
}

struct OfferedVisitor;

impl<'de> Visitor<'de> for OfferedVisitor {
    type Value = Offered;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of tools")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Offered, A::Error> {
        let mut tools = Vec::new();
        while tools.len() <= MAX_TOOLS {
            match list.next_element()? {
                Some(tool) => tools.push(tool),
                None => return Ok(Offered(tools)),
            }
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Offered(tools))
    }
}

/// Knows which field is being read.
#[derive(Default)]
struct Reading {
    field: Option<String>,
}

impl<'de> DeserializeSeed<'de> for &mut Reading {
    type Value = Fields;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Fields, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Reading {
    type Value = Fields;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Fields::default();
        while let Some(field) = map.next_key::<String>()? {
            let taken = fields.take(&field, &mut map);
            self.field = Some(field);
            taken?;
            self.field = None;
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_error_names_the_field_that_has_it() {
        for (body, field) in [
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"model": "m", "max_tokens": -1}"#, "max_tokens"),
            (r#"{"prompt": [1, -2]}"#, "prompt"),
            (r#"{"prompt": {"text": 1}, "n": 1}"#, "prompt"),
            (r#"{"messages": [{"content": "no role"}]}"#, "messages"),
            (r#"{"stop": 7}"#, "stop"),
        ] {
            let error = Fields::read(body.as_bytes()).unwrap_err();
            let RequestError::Invalid(all) = &error else {
                panic!("{body}: {error}");
            };
            assert_eq!(all.0[0].field, field, "{error}");
        }
        for body in ["", "[]", "{", "{\"n\": 1} x", "\u{0}", "null", "{\"n\": }"] {
            let error = Fields::read(body.as_bytes()).unwrap_err();
            assert!(
                matches!(error, RequestError::Malformed(_)),
                "{body}: {error}"
            );
        }
    }

    /// Errors are logged, and a prompt is not.
    #[test]
    fn an_error_says_nothing_of_what_a_field_held() {
        for body in [
            r#"{"messages": "a secret, expected by nobody"}"#,
            r#"{"messages": [{"role": "user", "content": {"a secret": 1}}]}"#,
            r#"{"temperature": "a secret"}"#,
            r#"{"prompt": {"a secret": 1}}"#,
            r#"{"stream_options": "a secret"}"#,
            r#""a secret""#,
        ] {
            let error = Fields::read(body.as_bytes()).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn null_is_absent_and_what_is_not_known_is_not_looked_at() {
        let body = r#"{"n": null, "stop": null, "made_up": {"deep": [1, {"x": null}]}, "user": 7,
            "echo": false, "suffix": null, "function_call": "none", "bad_words": [],
            "kv_transfer_params": null, "include_reasoning": true, "thinking_token_budget": -1}"#;
        let fields = Fields::read(body.as_bytes()).unwrap();
        assert!(fields.n.is_none() && fields.stop.is_none() && fields.refused.is_none());
    }

    #[test]
    fn stops_are_a_text_or_several() {
        for (body, expected) in [
            (r#"{"stop": "a"}"#, vec!["a"]),
            (r#"{"stop": ["a", "\u00e9"]}"#, vec!["a", "é"]),
            (r#"{"stop": []}"#, vec![]),
        ] {
            let fields = Fields::read(body.as_bytes()).unwrap();
            assert_eq!(fields.stop.unwrap().0, expected, "{body}");
        }
        for body in [
            r#"{"stop": [1]}"#,
            r#"{"stop": {"a": 1}}"#,
            r#"{"stop": [["a"]]}"#,
        ] {
            let error = Fields::read(body.as_bytes()).unwrap_err();
            assert!(matches!(&error, RequestError::Invalid(all) if all.0[0].field == "stop"));
        }
    }

    #[test]
    fn of_more_tools_than_may_be_offered_one_is_kept() {
        let body =
            |count: usize| format!("{{\"tools\": [{}], \"n\": 2}}", vec!["{}"; count].join(","));
        for (sent, kept) in [(0, 0), (MAX_TOOLS, MAX_TOOLS), (100_000, MAX_TOOLS + 1)] {
            let fields = Fields::read(body(sent).as_bytes()).unwrap();
            assert_eq!((fields.tools.unwrap().0.len(), fields.n), (kept, Some(2)));
        }
        let error = Fields::read(b"{\"tools\": {}}").unwrap_err();
        assert!(matches!(&error, RequestError::Invalid(all) if all.0[0].field == "tools"));
    }

    #[test]
    fn what_cannot_be_done_is_seen_where_it_is_asked_for() {
        for body in [
            r#"{"echo": true}"#,
            r#"{"suffix": "x"}"#,
            r#"{"prompt_logprobs": 3}"#,
            r#"{"guided_json": {"type": "object"}}"#,
            r#"{"kv_transfer_params": {"do_remote_decode": true}}"#,
            r#"{"include_reasoning": false}"#,
            r#"{"thinking_token_budget": 0}"#,
            r#"{"vllm_xargs": {"a": 1}}"#,
        ] {
            let fields = Fields::read(body.as_bytes()).unwrap();
            assert!(body.contains(fields.refused.unwrap().0), "{body}");
        }
    }
}
