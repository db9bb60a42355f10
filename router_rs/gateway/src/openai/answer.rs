//! What every answer of one call has in common.

use std::time::{SystemTime, UNIX_EPOCH};

use kvmesh_wire::v1;
use serde::Serialize;

use super::Face;
use crate::mesh::ServedModel;

/// Hexadecimal digits of a model's digest in its fingerprint.
const FINGERPRINT: usize = 12;

/// What is told in each object of an answer.
#[derive(Debug, Serialize)]
pub(super) struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
}

impl Head {
    /// `generation` is the id of the first one, as `kvmesh explain` takes it;
    /// `model` is the name that was asked for.
    pub(super) fn new(
        face: Face,
        stream: bool,
        generation: &str,
        model: String,
        served: &ServedModel,
    ) -> Self {
        let (prefix, object) = match (face, stream) {
            (Face::Chat, true) => ("chatcmpl", "chat.completion.chunk"),
            (Face::Chat, false) => ("chatcmpl", "chat.completion"),
            (Face::Completion, _) => ("cmpl", "text_completion"),
        };
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let digest = &served.record.digest;
        let shown = digest.get(..FINGERPRINT).unwrap_or(digest);
        Self {
            id: format!("{prefix}-{generation}"),
            object,
            created: now.as_secs(),
            model,
            system_fingerprint: format!("fp_{shown}"),
        }
    }
}

/// Where a stream tells how many tokens there were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Usages {
    Nowhere,
    /// In a chunk of its own behind the last choice; the others say that they have none.
    Last,
    /// There, and in each chunk those of its choice so far.
    Each,
}

/// Tokens of a choice that is under way.
#[derive(Debug, Default, Serialize)]
pub(super) struct UsageSoFar {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
}

impl UsageSoFar {
    /// Those of its prompt.
    pub(super) fn prompt(&mut self, tokens: u32) {
        self.prompt_tokens = tokens;
        self.total_tokens = tokens.saturating_add(self.completion_tokens);
    }

    /// More of its own.
    pub(super) fn add(&mut self, tokens: usize) {
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        self.completion_tokens = self.completion_tokens.saturating_add(tokens);
        self.total_tokens = self.total_tokens.saturating_add(tokens);
    }
}

/// Tokens of a call, over all its choices.
#[derive(Debug, Default, Serialize)]
pub(super) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokens,
}

#[derive(Debug, Default, Serialize)]
struct PromptTokens {
    cached_tokens: u32,
}

impl Usage {
    /// Adds a choice. A prompt counts once, with its first choice.
    pub(super) fn add(&mut self, usage: &v1::Usage, first_of_prompt: bool) {
        if first_of_prompt {
            let cached = usage.cached_tokens.saturating_add(usage.pulled_tokens);
            let details = &mut self.prompt_tokens_details;
            details.cached_tokens = details.cached_tokens.saturating_add(cached);
            self.prompt_tokens = self.prompt_tokens.saturating_add(usage.prompt_tokens);
        }
        self.completion_tokens = self.completion_tokens.saturating_add(usage.output_tokens);
        self.total_tokens = self.prompt_tokens.saturating_add(self.completion_tokens);
    }
}

/// Why a choice ended.
#[derive(Debug, Serialize)]
pub(super) struct End {
    pub(super) finish_reason: &'static str,
    pub(super) stop_reason: Option<StopReason>,
}

/// What stopped it, as vLLM tells it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum StopReason {
    Text(String),
    Token(u32),
}

/// What an answer called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Called {
    #[default]
    Nothing,
    /// Tools, with all of their arguments.
    Whole,
    /// Tools, and the arguments of the last one have not come to their end.
    Within,
}

impl End {
    /// The same of an answer that called tools, or not. One that was cut off says that,
    /// whatever it was about to call: by its length, or by a stop string among arguments.
    pub(super) fn of_calls(self, called: Called) -> Self {
        let by_text = matches!(self.stop_reason, Some(StopReason::Text(_)));
        let called = match called {
            Called::Nothing => false,
            Called::Whole => true,
            Called::Within => !by_text,
        };
        match self.finish_reason {
            "stop" if called => Self {
                finish_reason: "tool_calls",
                ..self
            },
            _ => self,
        }
    }

    pub(super) fn of(finished: &v1::Finished) -> Self {
        let text = Some(&finished.stop_string).filter(|text| !text.is_empty());
        Self {
            finish_reason: match finished.reason() {
                v1::FinishReason::Length => "length",
                v1::FinishReason::Stop | v1::FinishReason::Unspecified => "stop",
            },
            stop_reason: text
                .map(|text| StopReason::Text(text.clone()))
                .or_else(|| finished.stop_token_id.map(StopReason::Token)),
        }
    }
}
