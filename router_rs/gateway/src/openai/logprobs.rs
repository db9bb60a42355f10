//! Log-probabilities in the shapes of both faces.

use std::sync::Arc;

use kvmesh_text::ModelText;
use kvmesh_wire::v1::{TokenLogprobs, Tokens};
use serde::Serialize;
use serde_json::{Map, Value};

use super::Face;

/// What stands for a log-probability that JSON has no number for (minus
/// infinity); vLLM's number, too.
const LEAST: f32 = -9_999.0;

/// Log-probabilities of a choice, of one chunk or of all of it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Logprobs {
    Chat {
        content: Vec<ChatToken>,
    },
    Completion {
        text_offset: Vec<usize>,
        token_logprobs: Vec<f32>,
        tokens: Vec<String>,
        top_logprobs: Vec<Map<String, Value>>,
    },
}

/// One token of a chat, with its alternatives.
#[derive(Debug, Serialize)]
pub(super) struct ChatToken {
    #[serde(flatten)]
    token: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Debug, Serialize)]
struct Alternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// What tokens are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// By their text, which several of them may share.
    Texts,
    /// By their ids, in vLLM's form.
    Ids,
}

/// Makes them of what comes with tokens.
pub(super) struct Scribe {
    face: Face,
    names: Names,
    text: Arc<ModelText>,
    /// Characters of the tokens so far.
    offset: usize,
}

impl Scribe {
    pub(super) fn new(face: Face, names: Names, text: Arc<ModelText>) -> Self {
        Self {
            face,
            names,
            text,
            offset: 0,
        }
    }

    /// Nothing yet.
    pub(super) fn empty(&self) -> Logprobs {
        match self.face {
            Face::Chat => Logprobs::Chat {
                content: Vec::new(),
            },
            Face::Completion => Logprobs::Completion {
                text_offset: Vec::new(),
                token_logprobs: Vec::new(),
                tokens: Vec::new(),
                top_logprobs: Vec::new(),
            },
        }
    }

    /// Adds those of more tokens.
    pub(super) fn add(&mut self, message: &Tokens, to: &mut Logprobs) {
        for (id, told) in message.ids.iter().zip(&message.logprobs) {
            match to {
                Logprobs::Chat { content } => content.push(ChatToken {
                    token: self.alternative(*id, told.logprob),
                    top_logprobs: pairs(told)
                        .map(|(id, logprob)| self.alternative(id, logprob))
                        .collect(),
                }),
                Logprobs::Completion {
                    text_offset,
                    token_logprobs,
                    tokens,
                    top_logprobs,
                } => {
                    let token = self.name(*id);
                    text_offset.push(self.offset);
                    self.offset += token.chars().count();
                    token_logprobs.push(finite(told.logprob));
                    // The token that was drawn is among them in any case.
                    let mut top: Map<String, Value> = pairs(told)
                        .map(|(id, logprob)| (self.name(id), finite(logprob).into()))
                        .collect();
                    top.entry(token.clone())
                        .or_insert_with(|| finite(told.logprob).into());
                    top_logprobs.push(top);
                    tokens.push(token);
                }
            }
        }
    }

    fn alternative(&self, id: u32, logprob: f32) -> Alternative {
        let bytes = self.text.token_bytes(id).unwrap_or_default();
        Alternative {
            token: self.name(id),
            logprob: finite(logprob),
            bytes: bytes.to_vec(),
        }
    }

    fn name(&self, id: u32) -> String {
        match self.names {
            Names::Ids => format!("token_id:{id}"),
            Names::Texts => {
                let bytes = self.text.token_bytes(id).unwrap_or_default();
                String::from_utf8_lossy(bytes).into_owned()
            }
        }
    }
}

fn pairs(told: &TokenLogprobs) -> impl Iterator<Item = (u32, f32)> {
    let ids = told.top_ids.iter().copied();
    ids.zip(told.top_logprobs.iter().copied())
}

fn finite(logprob: f32) -> f32 {
    // NaN becomes the least, too.
    logprob.max(LEAST)
}
