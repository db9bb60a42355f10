//! Generations as one JSON object, once all have ended.

use std::{future::poll_fn, sync::Arc, task::Poll};

use kvmesh_wire::v1::generate_response::Event;
use serde::Serialize;

use super::{
    Face,
    answer::{Called, End, Head, StopReason, Usage},
    generate::Answered,
    logprobs::{Logprobs, Scribe},
    parsed::{Parsed, Parts, ToolCall},
};
use crate::{error::RequestError, serve::generation::Generation};

/// The whole answer of a call.
#[derive(Debug, Serialize)]
pub(super) struct Whole {
    #[serde(flatten)]
    head: Head,
    choices: Vec<Choice>,
    usage: Usage,
    /// Of a chat; those of completions are with each choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Serialize)]
struct Choice {
    index: usize,
    #[serde(flatten)]
    said: Said,
    logprobs: Option<Logprobs>,
    finish_reason: &'static str,
    stop_reason: Option<StopReason>,
    /// Where they are wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Said {
    Chat { message: Message },
    Completion { text: String },
}

#[derive(Debug, Serialize)]
struct Message {
    role: &'static str,
    content: Option<String>,
    refusal: Option<()>,
    /// By the two names that it has in streams.
    #[serde(skip_serializing_if = "String::is_empty")]
    reasoning_content: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    reasoning: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// A choice as it comes.
struct Coming {
    /// Until it has ended: what ended is not waited for, and is no longer its tenant's.
    generation: Option<Generation>,
    /// Of its prompt and its own, where they are wanted.
    ids: Option<(Arc<[u32]>, Vec<u32>)>,
    scribe: Option<Scribe>,
    logprobs: Option<Logprobs>,
    text: String,
    /// Where reasoning and calls are looked for.
    parsed: Option<Parsed>,
    end: Option<End>,
}

/// Waits for the end of all; `n` of them answer a prompt each.
///
/// # Errors
/// The first that fails ends the call, and with it the others.
pub(super) async fn gather(
    face: Face,
    answers: Vec<Answered>,
    n: usize,
    head: Head,
) -> Result<Whole, RequestError> {
    let coming = |answer: Answered| Coming {
        generation: Some(answer.generation),
        ids: answer.prompt_ids.map(|prompt| (prompt, Vec::new())),
        logprobs: answer.scribe.as_ref().map(Scribe::empty),
        scribe: answer.scribe,
        text: String::new(),
        parsed: answer.parsed,
        end: None,
    };
    let mut all: Vec<Coming> = answers.into_iter().map(coming).collect();
    let mut usage = Usage::default();
    poll_fn(|cx| {
        let mut open = false;
        for (at, one) in all.iter_mut().enumerate() {
            match one.poll(cx, &mut usage, at % n == 0) {
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(())) => {}
                Poll::Pending => open = true,
            }
        }
        match open {
            true => Poll::Pending,
            false => Poll::Ready(Ok(())),
        }
    })
    .await?;
    let asked = all.first().and_then(|one| one.ids.as_ref());
    let prompt_token_ids = match face {
        Face::Chat => asked.map(|(prompt, _)| prompt.to_vec()),
        Face::Completion => None,
    };
    let choices = all.into_iter().enumerate();
    Ok(Whole {
        head,
        choices: choices
            .map(|(index, one)| one.choice(face, index))
            .collect(),
        usage,
        prompt_token_ids,
    })
}

impl Coming {
    /// Takes what is there; ready at its end.
    fn poll(
        &mut self,
        cx: &mut std::task::Context<'_>,
        usage: &mut Usage,
        first_of_prompt: bool,
    ) -> Poll<Result<(), RequestError>> {
        let Self {
            generation: coming,
            ids,
            scribe,
            logprobs,
            text,
            end,
            ..
        } = self;
        while let Some(generation) = coming {
            let polled = generation.poll(cx, |message| match &message.event {
                Some(Event::Tokens(tokens)) => {
                    text.push_str(&tokens.text);
                    if let Some((_, ids)) = ids.as_mut() {
                        ids.extend_from_slice(&tokens.ids);
                    }
                    if let (Some(scribe), Some(logprobs)) = (scribe.as_mut(), logprobs.as_mut()) {
                        scribe.add(tokens, logprobs);
                    }
                }
                Some(Event::Finished(finished)) => {
                    text.push_str(&finished.text);
                    *end = Some(End::of(finished));
                    usage.add(&finished.usage.unwrap_or_default(), first_of_prompt);
                }
                _ => {}
            });
            match polled {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(Some(Ok(()))) => {}
                Poll::Ready(None) => *coming = None,
            }
        }
        Poll::Ready(Ok(()))
    }

    fn choice(self, face: Face, index: usize) -> Choice {
        let text = self.text;
        let mut called = Called::Nothing;
        let said = match face {
            Face::Chat => {
                let parts = match self.parsed {
                    Some(parsed) => parsed.whole(&text),
                    None => Parts {
                        content: text,
                        ..Parts::default()
                    },
                };
                called = parts.called;
                Said::Chat {
                    message: Message::of(parts),
                }
            }
            Face::Completion => Said::Completion { text },
        };
        let end = self.end.map(|end| end.of_calls(called));
        let (finish_reason, stop_reason) =
            end.map_or(("stop", None), |end| (end.finish_reason, end.stop_reason));
        let (prompt_token_ids, token_ids) = match (self.ids, face) {
            (None, _) => (None, None),
            (Some((_, ids)), Face::Chat) => (None, Some(ids)),
            (Some((prompt, ids)), Face::Completion) => (Some(prompt.to_vec()), Some(ids)),
        };
        Choice {
            index,
            said,
            logprobs: self.logprobs,
            finish_reason,
            stop_reason,
            prompt_token_ids,
            token_ids,
        }
    }
}

impl Message {
    fn of(parts: Parts) -> Self {
        // Without words of its own an answer that thought or called has none, not empty ones.
        let silent =
            parts.content.is_empty() && !(parts.reasoning.is_empty() && parts.calls.is_empty());
        Self {
            role: "assistant",
            content: (!silent).then_some(parts.content),
            refusal: None,
            reasoning_content: parts.reasoning.clone(),
            reasoning: parts.reasoning,
            tool_calls: parts.calls,
        }
    }
}
