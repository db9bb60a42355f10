//! The direct case once more, over HTTP/1.1: a completion as server-sent
//! events, an event a token. What a router of OpenAI's API is compared with,
//! and a worker of those that pass such an API on.
//!
//! As much of HTTP as these need: a request with a `content-length`, an answer
//! in chunks, a connection that is kept.

use std::{future::poll_fn, io, pin::Pin, sync::Arc};

use bytes::{Buf, BytesMut};
use kvmesh_wire::v1::{GenerateResponse, generate_response::Event};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::Instant,
};
use tokio_stream::Stream;
use tonic::Status;

use super::{direct::DirectStream, state::State};
use crate::vocabulary::Vocabulary;

/// Longest head of a request.
const MAX_HEAD: usize = 16 << 10;
/// Longest body of a request.
const MAX_BODY: usize = 16 << 20;

struct Request {
    method: String,
    path: String,
    body: BytesMut,
}

/// What is looked at of a body.
#[derive(Deserialize)]
struct Completion {
    #[serde(default)]
    prompt: String,
    max_tokens: Option<u32>,
    #[serde(default)]
    stream: bool,
}

/// Accepts until it is dropped, and its connections with it.
pub(super) async fn serve(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((socket, _)) = accepted else { return };
                connections.spawn(connection(socket, Arc::clone(&state)));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection; it ends with its client, or with what is no HTTP.
async fn connection(mut socket: TcpStream, state: Arc<State>) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let mut read = BytesMut::new();
    while let Some(request) = next(&mut socket, &mut read).await? {
        match (request.method.as_str(), request.path.as_str()) {
            ("POST", "/v1/completions" | "/v1/chat/completions") => {
                complete(&mut socket, &state, &request.body).await?;
            }
            // Those that pass requests on look around first.
            ("GET", _) => whole(&mut socket, &about(&state)).await?,
            _ => whole(&mut socket, &json!({})).await?,
        }
    }
    Ok(())
}

fn about(state: &State) -> Value {
    let model = &state.config.model;
    json!({"status": "ok", "object": "list", "model_path": model, "served_model_name": model,
        "is_generation": true, "version": "mock",
        "data": [{"id": model, "object": "model", "owned_by": "mock",
            "max_model_len": state.config.context_length}]})
}

/// The next request; `None` where the client has closed.
async fn next(socket: &mut TcpStream, read: &mut BytesMut) -> io::Result<Option<Request>> {
    let head = loop {
        if let Some(at) = read.windows(4).position(|part| part == b"\r\n\r\n") {
            break read.split_to(at + 4);
        }
        if read.len() > MAX_HEAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if socket.read_buf(read).await? == 0 {
            return Ok(None);
        }
    };
    let head = std::str::from_utf8(&head).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut lines = head.lines();
    let mut words = lines.next().unwrap_or_default().split(' ');
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(Ok(0), |(_, value)| value.trim().parse())
        .map_err(|_| io::ErrorKind::InvalidData)?;
    if length > MAX_BODY {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let (method, path) = (words.next(), words.next());
    let (method, path) = method.zip(path).ok_or(io::ErrorKind::InvalidData)?;
    let (method, path) = (method.to_owned(), path.to_owned());
    while read.len() < length {
        if socket.read_buf(read).await? == 0 {
            return Ok(None);
        }
    }
    Ok(Some(Request {
        method,
        path,
        body: read.split_to(length),
    }))
}

async fn complete(socket: &mut TcpStream, state: &Arc<State>, body: &[u8]) -> io::Result<()> {
    let asked: Completion = serde_json::from_slice(body)?;
    let prompt = Vocabulary::byte_ids(&asked.prompt);
    let delay = state.config.prefill + state.faults.plan().delay_first_token;
    let most = asked.max_tokens.unwrap_or(16);
    let mut stream = DirectStream::new(Arc::clone(state), &prompt, most, Instant::now() + delay);
    if asked.stream {
        events(socket, &state.config.model, &mut stream).await
    } else {
        let mut text = String::new();
        while let Some(event) = next_event(&mut stream).await {
            if let Event::Tokens(tokens) = event {
                text.push_str(&tokens.text);
            }
        }
        let usage = json!({"prompt_tokens": prompt.len(), "completion_tokens": most,
            "total_tokens": prompt.len() + most as usize});
        let choice = json!({"index": 0, "text": text, "finish_reason": "length"});
        whole(socket, &object(&state.config.model, &choice, &usage)).await
    }
}

fn object(model: &str, choice: &Value, usage: &Value) -> Value {
    json!({"id": "cmpl-mock", "object": "text_completion", "created": 0, "model": model,
        "choices": [choice], "usage": usage})
}

async fn next_event(stream: &mut DirectStream) -> Option<Event> {
    let next = poll_fn(|cx| Pin::new(&mut *stream).poll_next(cx)).await;
    let message: Option<Result<GenerateResponse, Status>> = next;
    message?.ok()?.event
}

async fn events(socket: &mut TcpStream, model: &str, stream: &mut DirectStream) -> io::Result<()> {
    let mut out = BytesMut::from(
        &b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"[..],
    );
    socket.write_all_buf(&mut out).await?;
    while let Some(event) = next_event(stream).await {
        match event {
            Event::Tokens(tokens) => {
                let choice = json!({"index": 0, "text": tokens.text, "logprobs": null,
                    "finish_reason": null});
                chunk(&object(model, &choice, &Value::Null).to_string(), &mut out);
            }
            Event::Finished(_) => {
                let choice = json!({"index": 0, "text": "", "finish_reason": "length"});
                chunk(&object(model, &choice, &Value::Null).to_string(), &mut out);
                chunk("[DONE]", &mut out);
                out.extend_from_slice(b"0\r\n\r\n");
            }
            Event::Accepted(_) | Event::Placed(_) => {}
        }
        while out.has_remaining() {
            socket.write_buf(&mut out).await?;
        }
    }
    Ok(())
}

/// An event as a chunk of its own.
fn chunk(data: &str, out: &mut BytesMut) {
    let event = format!("data: {data}\n\n");
    out.extend_from_slice(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes());
}

async fn whole(socket: &mut TcpStream, object: &Value) -> io::Result<()> {
    let body = object.to_string();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await?;
    socket.write_all(body.as_bytes()).await
}
