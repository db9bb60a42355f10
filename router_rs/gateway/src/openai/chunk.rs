//! Chunks of a stream, as bytes: what is the same in each of a choice is made
//! once, and a token adds its escaped text. Objects are built only where there
//! are log-probabilities.

use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use serde::Serialize;

use super::{
    Face,
    answer::{End, Head, Usage, UsageSoFar, Usages},
    logprobs::Logprobs,
    parsed::Delta,
};

/// What each event begins with (WHATWG HTML, "Server-sent events").
const DATA: &[u8] = b"data: ";
const DONE: &[u8] = b"data: [DONE]\n\n";
/// A comment: no event, and a sign of life for whoever is in between.
const COMMENT: &[u8] = b": keep-alive\n\n";

/// What a chunk has beside its text.
pub(super) struct Beside<'a> {
    pub(super) logprobs: Option<Logprobs>,
    /// Of the tokens that came; told where ids are wanted.
    pub(super) ids: &'a [u32],
}

/// Writes the chunks of one choice.
pub(super) struct ChoiceChunks {
    face: Face,
    /// From `data:` to the text.
    begin: Vec<u8>,
    /// How much of it is before an object in the place of the text's.
    delta: usize,
    /// Behind the choices: to the end, or to the usage so far.
    close: &'static [u8],
    /// Behind the text, where there is nothing beside it: as far as `close` goes.
    tail: Vec<u8>,
    /// Where ids of tokens are wanted.
    ids: Option<Ids>,
    /// Where each chunk tells it.
    so_far: Option<UsageSoFar>,
}

/// Ids of tokens, as vLLM tells them.
struct Ids {
    /// Of the prompt, until they are told: with the first chunk.
    prompt: Option<Arc<[u32]>>,
}

/// Writes what belongs to no choice.
pub(super) struct StreamChunks {
    /// From `data:` to the choices.
    head: Vec<u8>,
    usage: Usages,
}

impl StreamChunks {
    pub(super) fn new(head: &Head, usage: Usages) -> Self {
        let mut bytes = DATA.to_vec();
        append(&head, &mut bytes);
        // The object goes on.
        bytes.pop();
        bytes.extend_from_slice(b",\"choices\":[");
        Self { head: bytes, usage }
    }

    /// Those of a choice. Where ids of tokens are wanted, `prompt` has those of its prompt.
    pub(super) fn choice(
        &self,
        face: Face,
        index: usize,
        prompt: Option<Arc<[u32]>>,
    ) -> ChoiceChunks {
        let mut begin = self.head.clone();
        let (key, text) = match face {
            Face::Chat => ("\"delta\":", "{\"content\":"),
            Face::Completion => ("\"text\":", ""),
        };
        begin.extend_from_slice(format!("{{\"index\":{index},{key}").as_bytes());
        let delta = begin.len();
        begin.extend_from_slice(text.as_bytes());
        let close: &[u8] = match self.usage {
            Usages::Nowhere => b"}\n\n",
            Usages::Last => b",\"usage\":null}\n\n",
            Usages::Each => b",\"usage\":",
        };
        let mut tail = closed(face).to_vec();
        tail.extend_from_slice(PLAIN);
        tail.extend_from_slice(CHOSEN);
        tail.extend_from_slice(close);
        ChoiceChunks {
            face,
            begin,
            delta,
            close,
            tail,
            ids: prompt.map(|ids| Ids { prompt: Some(ids) }),
            so_far: (self.usage == Usages::Each).then(UsageSoFar::default),
        }
    }

    /// The last words of a stream that ended well.
    pub(super) fn end(&self, usage: &Usage, out: &mut BytesMut) {
        if self.usage != Usages::Nowhere {
            out.extend_from_slice(&self.head);
            out.extend_from_slice(b"],\"usage\":");
            append(usage, out.writer());
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(DONE);
    }
}

/// Behind a part with nothing beside it.
const PLAIN: &[u8] = b",\"logprobs\":null,\"finish_reason\":null";
/// Ends the choices.
const CHOSEN: &[u8] = b"}]";

/// Ends the part of a chunk that has the text.
fn closed(face: Face) -> &'static [u8] {
    match face {
        Face::Chat => b"}",
        Face::Completion => b"",
    }
}

impl ChoiceChunks {
    /// The tokens of the prompt, told before any chunk.
    pub(super) fn prompt(&mut self, tokens: u32) {
        if let Some(so_far) = &mut self.so_far {
            so_far.prompt(tokens);
        }
    }

    /// Tokens that came: of them the next chunk tells.
    pub(super) fn came(&mut self, tokens: usize) {
        if let Some(so_far) = &mut self.so_far {
            so_far.add(tokens);
        }
    }

    /// Whether a chunk is wanted for tokens that have no text.
    pub(super) fn tells_ids(&self) -> bool {
        self.ids.is_some()
    }

    /// Ends a chunk that came as far as `close` goes.
    fn ends(&self, out: &mut BytesMut) {
        if let Some(so_far) = &self.so_far {
            append(so_far, out.writer());
            out.extend_from_slice(b"}\n\n");
        }
    }

    /// Says who speaks: the first chunk of a chat's choice.
    pub(super) fn role(&mut self, out: &mut BytesMut) {
        if self.face != Face::Chat {
            return;
        }
        out.extend_from_slice(&self.begin);
        out.extend_from_slice(b"\"\",\"role\":\"assistant\"");
        match self.ids.as_mut().and_then(|ids| ids.prompt.take()) {
            None => out.extend_from_slice(&self.tail),
            Some(prompt) => {
                out.extend_from_slice(closed(self.face));
                out.extend_from_slice(PLAIN);
                out.extend_from_slice(CHOSEN);
                out.extend_from_slice(b",\"prompt_token_ids\":");
                append(&prompt[..], out.writer());
                out.extend_from_slice(self.close);
            }
        }
        self.ends(out);
    }

    /// A part of a chat's answer.
    pub(super) fn part(
        &mut self,
        part: &Delta<'_>,
        beside: Option<&Beside<'_>>,
        out: &mut BytesMut,
    ) {
        match part {
            Delta::Content(text) => self.text(text, beside, out),
            Delta::Other(other) => {
                out.extend_from_slice(&self.begin[..self.delta]);
                append(other, out.writer());
                self.behind(beside, out);
            }
        }
    }

    /// Text as it comes.
    pub(super) fn text(&mut self, text: &str, beside: Option<&Beside<'_>>, out: &mut BytesMut) {
        out.reserve(self.begin.len() + text.len() + 2 + self.tail.len());
        out.extend_from_slice(&self.begin);
        append(text, out.writer());
        if beside.is_none() && self.ids.is_none() {
            out.extend_from_slice(&self.tail);
            self.ends(out);
            return;
        }
        out.extend_from_slice(closed(self.face));
        self.behind(beside, out);
    }

    /// What stands behind a delta, or a text, to the end.
    fn behind(&mut self, beside: Option<&Beside<'_>>, out: &mut BytesMut) {
        out.extend_from_slice(b",\"logprobs\":");
        append(&beside.map(|beside| &beside.logprobs), out.writer());
        out.extend_from_slice(b",\"finish_reason\":null");
        self.ids(beside.map_or(&[][..], |beside| beside.ids), out);
        out.extend_from_slice(CHOSEN);
        out.extend_from_slice(self.close);
        self.ends(out);
    }

    /// Ids of the tokens of a chunk, and where it is the first one of a completion those of
    /// its prompt.
    fn ids(&mut self, came: &[u32], out: &mut BytesMut) {
        let Some(ids) = &mut self.ids else {
            return;
        };
        if let Some(prompt) = ids.prompt.take() {
            out.extend_from_slice(b",\"prompt_token_ids\":");
            append(&prompt[..], out.writer());
        }
        out.extend_from_slice(b",\"token_ids\":");
        append(came, out.writer());
    }

    /// Its end, with the text that was held back until then.
    pub(super) fn end(&mut self, text: &str, end: &End, out: &mut BytesMut) {
        out.extend_from_slice(&self.begin);
        append(text, out.writer());
        out.extend_from_slice(closed(self.face));
        out.extend_from_slice(b",\"logprobs\":null,\"finish_reason\":");
        append(end.finish_reason, out.writer());
        out.extend_from_slice(b",\"stop_reason\":");
        append(&end.stop_reason, out.writer());
        self.ids(&[], out);
        out.extend_from_slice(CHOSEN);
        out.extend_from_slice(self.close);
        self.ends(out);
    }
}

/// An error: the last event of a stream.
pub(super) fn error(json: &[u8], out: &mut BytesMut) {
    out.extend_from_slice(DATA);
    out.extend_from_slice(json);
    out.extend_from_slice(b"\n\n");
}

/// A sign of life.
pub(super) fn comment(out: &mut BytesMut) {
    out.extend_from_slice(COMMENT);
}

/// Appends JSON.
fn append(value: &(impl Serialize + ?Sized), to: impl std::io::Write) {
    if let Err(error) = serde_json::to_writer(to, value) {
        // Memory takes all that is written, and none of our types fails.
        tracing::error!(event = "bug", %error, "a chunk is no JSON");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::openai::answer::StopReason;

    const USAGES: [Usages; 3] = [Usages::Nowhere, Usages::Last, Usages::Each];

    #[derive(Serialize)]
    struct Sent {
        id: &'static str,
    }

    fn chunks(usage: Usages) -> StreamChunks {
        let mut head = DATA.to_vec();
        append(&Sent { id: "x" }, &mut head);
        head.pop();
        head.extend_from_slice(b",\"choices\":[");
        StreamChunks { head, usage }
    }

    /// The objects of all events.
    fn events(bytes: &BytesMut) -> Vec<Value> {
        let text = std::str::from_utf8(bytes).unwrap();
        let events = text.strip_suffix("\n\n").unwrap().split("\n\n");
        events
            .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }

    proptest! {
        #[test]
        fn each_chunk_is_one_line_of_json_with_the_text_as_it_was(
            text in any::<String>(), index in 0_usize..200, usage in 0_usize..3, chat: bool,
        ) {
            let usage = USAGES[usage];
            let face = if chat { Face::Chat } else { Face::Completion };
            let all = chunks(usage);
            let mut choice = all.choice(face, index, None);
            let mut out = BytesMut::new();
            choice.prompt(3);
            choice.role(&mut out);
            choice.came(2);
            choice.text(&text, None, &mut out);
            let end = End { finish_reason: "stop", stop_reason: Some(StopReason::Token(7)) };
            choice.end("", &end, &mut out);
            let told = events(&out);
            let place = if chat { "/choices/0/delta/content" } else { "/choices/0/text" };
            let content = |chunk: &Value| chunk.pointer(place).unwrap().as_str().unwrap().to_owned();
            let texts: Vec<String> = told.iter().map(content).collect();
            prop_assert_eq!(texts.concat(), text);
            prop_assert_eq!(told.len(), if chat { 3 } else { 2 });
            let last = told.last().unwrap();
            for (at, chunk) in told.iter().enumerate() {
                prop_assert_eq!(&chunk["id"], "x");
                prop_assert_eq!(&chunk["choices"][0]["index"], &json!(index));
                let came = if chat && at == 0 { 0 } else { 2 };
                let so_far = json!({"prompt_tokens": 3, "completion_tokens": came,
                    "total_tokens": 3 + came});
                let expected = match usage {
                    Usages::Nowhere => None,
                    Usages::Last => Some(&Value::Null),
                    Usages::Each => Some(&so_far),
                };
                prop_assert_eq!(chunk.get("usage"), expected);
                let reason = if chunk == last { json!("stop") } else { Value::Null };
                prop_assert_eq!(&chunk["choices"][0]["finish_reason"], &reason);
            }
            prop_assert_eq!(&last["choices"][0]["stop_reason"], &json!(7));
            if chat {
                prop_assert_eq!(&told[0]["choices"][0]["delta"]["role"], "assistant");
            }
        }
    }

    #[test]
    fn a_stream_ends_with_its_usage_and_the_word() {
        let mut out = BytesMut::new();
        for usage in [Usages::Last, Usages::Each] {
            out.clear();
            chunks(usage).end(&Usage::default(), &mut out);
            let text = std::str::from_utf8(&out).unwrap();
            let text = text.strip_suffix("data: [DONE]\n\n").unwrap();
            let told = events(&BytesMut::from(text.as_bytes()));
            assert_eq!(told[0]["choices"], json!([]));
            assert_eq!(told[0]["usage"]["total_tokens"], 0);
        }
        out.clear();
        chunks(Usages::Nowhere).end(&Usage::default(), &mut out);
        assert_eq!(&out[..], DONE);
    }
}
