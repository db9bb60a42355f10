//! Load over OpenAI's HTTP/1.1: completions as server-sent events, read off the
//! socket without an HTTP library, since the client shares a core with the
//! worker.
//!
//! An event does not say how many tokens it has. The mock worker's text is a
//! function of the prompt, so that its length does.

use std::{net::SocketAddr, time::Instant};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{LoadConfig, Witness, reply::Reply};
use crate::{
    tokens::{PromptSeed, TokenFunction},
    vocabulary::Vocabulary,
};

/// One connection, kept from request to request.
pub(super) struct Connection {
    socket: TcpStream,
    read: BytesMut,
}

impl Connection {
    pub(super) async fn open(target: SocketAddr) -> std::io::Result<Self> {
        let socket = TcpStream::connect(target).await?;
        socket.set_nodelay(true)?;
        Ok(Self {
            socket,
            read: BytesMut::with_capacity(16 << 10),
        })
    }

    /// Sends one request and reads its answer to the end.
    pub(super) async fn exchange(
        &mut self,
        config: &LoadConfig,
        tokens: &TokenFunction,
        (number, round): (u32, u32),
        witness: &mut impl Witness,
    ) -> Result<(), String> {
        let text = |error: std::io::Error| error.to_string();
        let prompt = prompt(config, number, round);
        let ids = Vocabulary::byte_ids(&prompt);
        let body = serde_json::json!({"model": config.model, "prompt": prompt, "stream": true,
            "max_tokens": config.max_tokens, "ignore_eos": true})
        .to_string();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            config.target,
            body.len()
        );
        witness.sent(Instant::now());
        let sent = self.socket.write_all(request.as_bytes()).await;
        sent.map_err(text)?;
        self.head().await?;
        let mut events = Events {
            walk: Walk::new(tokens, &ids),
            chunks: Chunks::default(),
            text: BytesMut::new(),
            done: false,
        };
        loop {
            let now = Instant::now();
            let ended = events.feed(&mut self.read, |reply| witness.came(reply, now))?;
            if ended {
                return match events.done {
                    true => Ok(()),
                    false => Err("the stream ended without [DONE]".to_owned()),
                };
            }
            if self.socket.read_buf(&mut self.read).await.map_err(text)? == 0 {
                return Err("the connection ended within an answer".to_owned());
            }
        }
    }

    /// Reads the head of an answer that has to be a stream.
    async fn head(&mut self) -> Result<(), String> {
        loop {
            if let Some(at) = find(&self.read, b"\r\n\r\n") {
                let head = self.read.split_to(at + 4);
                return match head.starts_with(b"HTTP/1.1 200 ") {
                    true => Ok(()),
                    false => {
                        let head = String::from_utf8_lossy(&head);
                        let rest = String::from_utf8_lossy(&self.read);
                        Err(format!(
                            "{} {rest}",
                            head.lines().next().unwrap_or_default()
                        ))
                    }
                };
            }
            let read = self.socket.read_buf(&mut self.read).await;
            if read.map_err(|error| error.to_string())? == 0 {
                return Err("the connection ended before an answer".to_owned());
            }
        }
    }
}

/// A text of as many letters and digits as tokens are asked for: whoever
/// tokenises it finds these. The first ones make prompts differ.
fn prompt(config: &LoadConfig, number: u32, round: u32) -> String {
    const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let letter = |value: u32| char::from(LETTERS[value as usize % LETTERS.len()]);
    let names = [number, number / 62, round, round / 62];
    let rest = (4..config.prompt_tokens).map(|n| n * 7 + number);
    let all = names.into_iter().chain(rest).map(letter);
    all.take(config.prompt_tokens.max(1) as usize).collect()
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

/// Takes a body out of its chunks (RFC 9112, 7.1).
#[derive(Debug, Default)]
struct Chunks {
    /// What is left of the chunk, its line break included.
    left: usize,
    /// The chunk is the empty one that ends a body; trailers are none.
    last: bool,
}

impl Chunks {
    /// Moves what is whole into `body`. True at the end of the body.
    fn take(&mut self, read: &mut BytesMut, body: &mut BytesMut) -> Result<bool, String> {
        loop {
            if self.left > 0 {
                let data = self.left.saturating_sub(2).min(read.len());
                body.extend_from_slice(&read[..data]);
                read.advance(data);
                self.left -= data;
                if self.left > 2 || read.len() < self.left {
                    return Ok(false);
                }
                read.advance(self.left);
                self.left = 0;
                if self.last {
                    return Ok(true);
                }
            }
            let Some(at) = find(read, b"\r\n") else {
                return Ok(false);
            };
            let line = read.split_to(at + 2);
            let size = std::str::from_utf8(&line[..at]).unwrap_or_default();
            let size = usize::from_str_radix(size, 16);
            self.left = size.map_err(|error| format!("a chunk's size: {error}"))? + 2;
            self.last = self.left == 2;
        }
    }
}

struct Events {
    walk: Walk,
    chunks: Chunks,
    text: BytesMut,
    done: bool,
}

impl Events {
    /// Calls `each` for every event that is whole. True at the end.
    fn feed(&mut self, read: &mut BytesMut, mut each: impl FnMut(Reply)) -> Result<bool, String> {
        let ended = self.chunks.take(read, &mut self.text)?;
        while let Some(at) = find(&self.text, b"\n\n") {
            let event = self.text.split_to(at + 2);
            let Some(data) = event.strip_prefix(b"data: ") else {
                continue;
            };
            if data.starts_with(b"[DONE]") {
                self.done = true;
                each(Reply::Finished);
            } else if let Some(at) = find(data, b"\"text\":\"") {
                let tokens = self.walk.advance(unescaped(&data[at + 8..]));
                if tokens > 0 {
                    each(Reply::Tokens(tokens));
                }
            } else {
                return Err(String::from_utf8_lossy(data).into_owned());
            }
        }
        Ok(ended)
    }
}

/// Bytes of a JSON string's text, up to its closing quote.
fn unescaped(mut json: &[u8]) -> usize {
    let mut bytes = 0;
    loop {
        match json {
            [] | [b'"', ..] => return bytes,
            [b'\\', b'u', hex @ ..] => {
                // Only control characters are written so, by us and by the mock.
                bytes += 1;
                json = hex.get(4..).unwrap_or_default();
            }
            [b'\\', _, rest @ ..] | [_, rest @ ..] => {
                bytes += 1;
                json = rest;
            }
        }
    }
}

/// Which token of its output a text has come to.
struct Walk {
    tokens: TokenFunction,
    seed: PromptSeed,
    position: u32,
    /// Bytes beyond the last whole token.
    over: usize,
}

impl Walk {
    fn new(tokens: &TokenFunction, prompt: &[u32]) -> Self {
        Self {
            tokens: tokens.clone(),
            seed: TokenFunction::seed(prompt),
            position: 0,
            over: 0,
        }
    }

    /// Tokens that so many more bytes complete.
    fn advance(&mut self, bytes: usize) -> u64 {
        self.over += bytes;
        let mut whole = 0;
        loop {
            let id = self.tokens.at(self.seed, self.position);
            let length = self.tokens.vocabulary().text(id).len();
            if length == 0 || length > self.over {
                return whole;
            }
            self.over -= length;
            self.position += 1;
            whole += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn body(prompt: &[u32], cuts: &[usize]) -> Vec<u8> {
        let tokens = TokenFunction::built_in();
        let ids = tokens.expected(prompt, 12);
        let mut out = Vec::new();
        let mut chunk = |data: &str| {
            let event = format!("data: {data}\n\n");
            out.extend(format!("{:x}\r\n{event}\r\n", event.len()).bytes());
        };
        for pair in cuts.windows(2) {
            let texts = ids[pair[0]..pair[1]].iter();
            let text: String = texts.map(|id| tokens.vocabulary().text(*id)).collect();
            chunk(&serde_json::json!({"choices": [{"text": text}]}).to_string());
        }
        chunk("[DONE]");
        out.extend(b"0\r\n\r\n");
        out
    }

    #[test]
    fn tokens_are_counted_by_their_text_wherever_the_bytes_are_cut() {
        let prompt = [16, 17, 18];
        let bytes = body(&prompt, &[0, 1, 5, 12]);
        for cut in 0..bytes.len() {
            let mut events = Events {
                walk: Walk::new(&TokenFunction::built_in(), &prompt),
                chunks: Chunks::default(),
                text: BytesMut::new(),
                done: false,
            };
            let (mut read, mut seen) = (BytesMut::new(), Vec::new());
            let mut ended = false;
            for part in [&bytes[..cut], &bytes[cut..]] {
                read.extend_from_slice(part);
                ended = events.feed(&mut read, |reply| seen.push(reply)).unwrap();
            }
            let counted = [1, 4, 7].map(Reply::Tokens);
            assert_eq!(seen, [&counted[..], &[Reply::Finished]].concat());
            assert!(ended && events.done && read.is_empty());
        }
    }

    #[test]
    fn an_error_in_the_stream_is_one() {
        let mut events = Events {
            walk: Walk::new(&TokenFunction::built_in(), &[1]),
            chunks: Chunks::default(),
            text: BytesMut::from(&b"data: {\"error\": {}}\n\n"[..]),
            done: false,
        };
        assert!(events.feed(&mut BytesMut::new(), |_| {}).is_err());
    }
}
