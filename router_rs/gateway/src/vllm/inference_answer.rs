//! Answers in the messages of `vllm.Inference`.

use bytes::BytesMut;
use kvmesh_wire::{
    v1,
    vllm::{
        CandidateTokenInfo, FinishInfo, GenerateResponse, PromptInfo, SequenceOutput,
        candidate_token_info::TokenInfo,
        finish_info::{FinishReason, StopReason},
    },
};

use super::answers::{Face, Stopped, cached, index};
use crate::serve::grpc;

/// What the answer of a call has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) stream: bool,
    pub(super) text: bool,
    pub(super) ids: bool,
    pub(super) logprobs: bool,
    /// Other tokens at each place.
    pub(super) candidates: bool,
}

/// What the messages of a call look like.
pub(super) struct InferenceFace {
    wanted: Wanted,
    prompt: PromptInfo,
    /// The prompt was told of.
    begun: bool,
    /// What is not sent yet; and how many tokens there were in all.
    answers: Vec<(SequenceOutput, u32)>,
}

impl InferenceFace {
    pub(super) fn new(wanted: Wanted) -> Self {
        Self {
            wanted,
            prompt: PromptInfo::default(),
            begun: false,
            answers: Vec::new(),
        }
    }

    fn answer(&mut self, at: usize) -> &mut (SequenceOutput, u32) {
        if self.answers.len() <= at {
            self.answers.resize_with(at + 1, Default::default);
        }
        &mut self.answers[at]
    }

    /// Sends what is not sent yet.
    fn send(&mut self, at: usize, finish_info: Option<FinishInfo>, out: &mut BytesMut) {
        let outputs = SequenceOutput {
            index: index(at),
            finish_info,
            ..std::mem::take(&mut self.answer(at).0)
        };
        let whole = !self.wanted.stream;
        let response = GenerateResponse {
            prompt_info: whole.then(|| std::mem::take(&mut self.prompt)),
            outputs: Some(outputs),
        };
        grpc::encode_into(&response, out);
    }
}

impl Face for InferenceFace {
    fn prompt(&mut self, ids: Vec<u32>) {
        self.prompt.token_ids = ids;
    }

    fn accepted(&mut self, _at: usize, told: &v1::Accepted, out: &mut BytesMut) {
        self.prompt.num_prompt_tokens = told.prompt_tokens;
        if self.wanted.stream && !std::mem::replace(&mut self.begun, true) {
            let response = GenerateResponse {
                prompt_info: Some(std::mem::take(&mut self.prompt)),
                outputs: None,
            };
            grpc::encode_into(&response, out);
        }
    }

    fn tokens(&mut self, at: usize, told: &v1::Tokens, out: &mut BytesMut) {
        let wanted = self.wanted;
        let (kept, count) = self.answer(at);
        *count += index(told.ids.len());
        kept.num_tokens += index(told.ids.len());
        if wanted.text {
            kept.text.push_str(&told.text);
        }
        if wanted.ids {
            kept.token_ids.extend_from_slice(&told.ids);
        }
        if wanted.logprobs {
            let logprobs = told.logprobs.iter();
            kept.logprobs.extend(logprobs.map(|one| one.logprob));
        }
        if wanted.candidates {
            let drawn = told.ids.iter().zip(&told.logprobs);
            kept.candidate_tokens
                .extend(drawn.map(|(&id, told)| candidates(id, told)));
        }
        if wanted.stream {
            self.send(at, None, out);
        }
    }

    fn finished(&mut self, at: usize, told: &v1::Finished, stopped: Stopped, out: &mut BytesMut) {
        let text = self.wanted.text;
        let (kept, count) = self.answer(at);
        if text {
            kept.text.push_str(&told.text);
        }
        let reason = match told.reason() {
            v1::FinishReason::Length => FinishReason::Length,
            v1::FinishReason::Stop | v1::FinishReason::Unspecified => FinishReason::Stop,
        };
        let finish = FinishInfo {
            num_output_tokens: *count,
            finish_reason: reason.into(),
            stop_reason: match stopped {
                Stopped::EndOfText(id) => Some(StopReason::EosTokenId(id)),
                Stopped::Token(id) => Some(StopReason::StopTokenId(id)),
                Stopped::Other if told.stop_string.is_empty() => None,
                Stopped::Other => Some(StopReason::StopString(told.stop_string.clone())),
            },
            num_cached_tokens: told.usage.as_ref().map(cached),
            ..FinishInfo::default()
        };
        self.send(at, Some(finish), out);
    }

    fn aborted(&mut self, at: usize, out: &mut BytesMut) {
        let finish = FinishInfo {
            num_output_tokens: self.answer(at).1,
            finish_reason: FinishReason::Aborted.into(),
            ..FinishInfo::default()
        };
        self.send(at, Some(finish), out);
    }
}

/// The most likely tokens at one place but the one that was drawn; their order is their rank.
fn candidates(drawn: u32, told: &v1::TokenLogprobs) -> CandidateTokenInfo {
    let pairs = told.top_ids.iter().zip(&told.top_logprobs);
    let token = |(at, (id, logprob)): (usize, (&u32, &f32))| TokenInfo {
        id: *id,
        logprob: *logprob,
        rank: index(at + 1),
    };
    CandidateTokenInfo {
        tokens: pairs
            .enumerate()
            .filter(|(_, (id, _))| **id != drawn)
            .map(token)
            .collect(),
    }
}
