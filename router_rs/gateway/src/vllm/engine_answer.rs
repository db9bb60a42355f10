//! Answers in the messages of `VllmEngine`: token ids, never text.

use bytes::BytesMut;
use kvmesh_wire::{
    v1,
    vllm::grpc::engine::{
        GenerateComplete, GenerateResponse, GenerateStreamChunk, OutputLogProbs, TopLogProbs,
        generate_complete::MatchedStop, generate_response::Response,
    },
};

use super::answers::{Face, Stopped, cached, index};
use crate::serve::grpc;

/// What the messages of a call look like.
pub(super) struct EngineFace {
    stream: bool,
    logprobs: bool,
    answers: Vec<Answer>,
}

/// An answer so far.
#[derive(Default)]
struct Answer {
    prompt_tokens: u32,
    output_tokens: u32,
    /// All of it, where it is not streamed.
    ids: Vec<u32>,
    logprobs: OutputLogProbs,
}

impl EngineFace {
    pub(super) fn new(stream: bool, logprobs: bool) -> Self {
        Self {
            stream,
            logprobs,
            answers: Vec::new(),
        }
    }

    fn answer(&mut self, at: usize) -> &mut Answer {
        if self.answers.len() <= at {
            self.answers.resize_with(at + 1, Answer::default);
        }
        &mut self.answers[at]
    }

    fn complete(&mut self, at: usize, reason: &str) -> GenerateComplete {
        let with_logprobs = self.logprobs && !self.stream;
        let answer = std::mem::take(self.answer(at));
        GenerateComplete {
            output_ids: answer.ids,
            finish_reason: reason.to_owned(),
            prompt_tokens: answer.prompt_tokens,
            completion_tokens: answer.output_tokens,
            output_logprobs: with_logprobs.then_some(answer.logprobs),
            index: index(at),
            ..GenerateComplete::default()
        }
    }
}

impl Face for EngineFace {
    fn accepted(&mut self, at: usize, told: &v1::Accepted, _out: &mut BytesMut) {
        self.answer(at).prompt_tokens = told.prompt_tokens;
    }

    fn tokens(&mut self, at: usize, told: &v1::Tokens, out: &mut BytesMut) {
        let (stream, logprobs) = (self.stream, self.logprobs);
        let answer = self.answer(at);
        answer.output_tokens += index(told.ids.len());
        if !stream {
            answer.ids.extend_from_slice(&told.ids);
            if logprobs {
                add(told, &mut answer.logprobs);
            }
            return;
        }
        if told.ids.is_empty() {
            return;
        }
        let output_logprobs = logprobs.then(|| {
            let mut these = OutputLogProbs::default();
            add(told, &mut these);
            these
        });
        let chunk = GenerateStreamChunk {
            token_ids: told.ids.clone(),
            prompt_tokens: answer.prompt_tokens,
            completion_tokens: index(told.ids.len()),
            output_logprobs,
            index: index(at),
            ..GenerateStreamChunk::default()
        };
        write(Response::Chunk(chunk), out);
    }

    fn finished(&mut self, at: usize, told: &v1::Finished, stopped: Stopped, out: &mut BytesMut) {
        let reason = match told.reason() {
            v1::FinishReason::Length => "length",
            v1::FinishReason::Stop | v1::FinishReason::Unspecified => "stop",
        };
        let mut complete = self.complete(at, reason);
        complete.cached_tokens = told.usage.as_ref().map_or(0, cached);
        complete.matched_stop = match stopped {
            // vLLM does not name the model's own.
            Stopped::EndOfText(_) => None,
            Stopped::Token(id) => Some(MatchedStop::MatchedTokenId(id)),
            Stopped::Other if told.stop_string.is_empty() => None,
            Stopped::Other => Some(MatchedStop::MatchedStopStr(told.stop_string.clone())),
        };
        write(Response::Complete(complete), out);
    }

    fn aborted(&mut self, at: usize, out: &mut BytesMut) {
        let complete = self.complete(at, "abort");
        write(Response::Complete(complete), out);
    }
}

fn write(response: Response, out: &mut BytesMut) {
    let response = Some(response);
    grpc::encode_into(&GenerateResponse { response }, out);
}

/// Adds those of more tokens.
fn add(told: &v1::Tokens, to: &mut OutputLogProbs) {
    for (id, one) in told.ids.iter().zip(&told.logprobs) {
        to.token_ids.push(*id);
        to.token_logprobs.push(one.logprob);
        to.top_logprobs.push(TopLogProbs {
            values: one.top_logprobs.clone(),
            token_ids: one.top_ids.clone(),
        });
    }
}
