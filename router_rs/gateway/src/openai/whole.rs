//! Generations as one JSON object, once all have ended.

use std::{future::poll_fn, task::Poll};

use kvmesh_wire::v1::generate_response::Event;
use serde::Serialize;

use super::{
    Face,
    answer::{End, Head, StopReason, Usage},
    logprobs::{Logprobs, Scribe},
};
use crate::{error::RequestError, serve::generation::Generation};

/// The whole answer of a call.
#[derive(Debug, Serialize)]
pub(super) struct Whole {
    #[serde(flatten)]
    head: Head,
    choices: Vec<Choice>,
    usage: Usage,
}

#[derive(Debug, Serialize)]
struct Choice {
    index: usize,
    #[serde(flatten)]
    said: Said,
    logprobs: Option<Logprobs>,
    finish_reason: &'static str,
    stop_reason: Option<StopReason>,
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
    content: String,
    refusal: Option<()>,
}

/// A choice as it comes.
struct Coming {
    /// Until it has ended: what ended is not waited for, and is no longer its tenant's.
    generation: Option<Generation>,
    scribe: Option<Scribe>,
    logprobs: Option<Logprobs>,
    text: String,
    end: Option<End>,
}

/// Waits for the end of all; `n` of them answer a prompt each.
///
/// # Errors
/// The first that fails ends the call, and with it the others.
pub(super) async fn gather(
    face: Face,
    generations: Vec<(Generation, Option<Scribe>)>,
    n: usize,
    head: Head,
) -> Result<Whole, RequestError> {
    let coming = |(generation, scribe): (Generation, Option<Scribe>)| Coming {
        generation: Some(generation),
        logprobs: scribe.as_ref().map(Scribe::empty),
        scribe,
        text: String::new(),
        end: None,
    };
    let mut all: Vec<Coming> = generations.into_iter().map(coming).collect();
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
    let choices = all.into_iter().enumerate();
    Ok(Whole {
        head,
        choices: choices
            .map(|(index, one)| one.choice(face, index))
            .collect(),
        usage,
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
            scribe,
            logprobs,
            text,
            end,
        } = self;
        while let Some(generation) = coming {
            let polled = generation.poll(cx, |message| match &message.event {
                Some(Event::Tokens(tokens)) => {
                    text.push_str(&tokens.text);
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
        let said = match face {
            Face::Chat => Said::Chat {
                message: Message {
                    role: "assistant",
                    content: text,
                    refusal: None,
                },
            },
            Face::Completion => Said::Completion { text },
        };
        let (finish_reason, stop_reason) = self
            .end
            .map_or(("stop", None), |end| (end.finish_reason, end.stop_reason));
        Choice {
            index,
            said,
            logprobs: self.logprobs,
            finish_reason,
            stop_reason,
        }
    }
}
