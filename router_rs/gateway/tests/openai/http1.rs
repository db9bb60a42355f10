//! HTTP/1.1 by hand: a test decides what is sent, what is read, and when it goes.

use std::{collections::HashMap, io::ErrorKind};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::common::Mesh;

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const COMPLETIONS: &str = "/v1/completions";

/// Status and headers of an answer.
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
}

/// A whole answer.
pub(crate) struct Answer {
    pub(crate) head: Head,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// Objects of all events; the last one has to be the word.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.head.status, 200, "{}", self.body);
        let kind = &self.head.headers["content-type"];
        assert_eq!(kind, "text/event-stream; charset=utf-8");
        let mut events = events(&self.body);
        assert_eq!(events.pop(), Some(Value::String("[DONE]".to_owned())));
        events
    }

    /// Why it failed, by OpenAI's shape: status, `code`, `param`.
    pub(crate) fn error(&self) -> (u16, String, Value) {
        let error = &self.json()["error"];
        assert!(error["message"].is_string() && error["type"].is_string());
        let code = error["code"].as_str().unwrap().to_owned();
        (self.head.status, code, error["param"].clone())
    }
}

/// Events of a body; comments are none, and the last word is text.
pub(crate) fn events(body: &str) -> Vec<Value> {
    let whole = body.strip_suffix("\n\n").expect("ends with an event");
    let data = whole
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "));
    let read = |text: &str| match text {
        "[DONE]" => Value::String(text.to_owned()),
        text => serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}")),
    };
    data.map(read).collect()
}

/// What a stream's choice said, over all its chunks.
pub(crate) fn said(events: &[Value], index: usize) -> String {
    let choices = events
        .iter()
        .flat_map(|event| event["choices"].as_array().unwrap());
    choices
        .filter(|choice| choice["index"] == index)
        .map(|choice| {
            let chat = choice.pointer("/delta/content");
            let text = chat.unwrap_or_else(|| &choice["text"]);
            text.as_str().unwrap()
        })
        .collect()
}

/// One connection.
pub(crate) struct Http1 {
    socket: TcpStream,
    read: Vec<u8>,
}

impl Http1 {
    pub(crate) async fn connect(mesh: &Mesh) -> Self {
        Self {
            socket: TcpStream::connect(mesh.address()).await.unwrap(),
            read: Vec::new(),
        }
    }

    pub(crate) async fn send(&mut self, head: &str, body: &[u8]) {
        self.socket.write_all(head.as_bytes()).await.unwrap();
        self.socket.write_all(body).await.unwrap();
    }

    /// Sends more of a body, which may have been refused, and its connection closed, by then.
    pub(crate) async fn offer(&mut self, body: &[u8]) {
        if let Err(error) = self.socket.write_all(body).await {
            let closed = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
            assert!(closed.contains(&error.kind()), "{error}");
        }
    }

    /// Posts an object, with more headers.
    pub(crate) async fn post(&mut self, path: &str, headers: &[(&str, &str)], body: &Value) {
        let body = body.to_string();
        let more: String = headers
            .iter()
            .map(|(name, value)| format!("{name}: {value}\r\n"))
            .collect();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\n{more}\
             content-length: {}\r\n\r\n",
            body.len()
        );
        self.send(&head, body.as_bytes()).await;
    }

    /// False: the other side has closed.
    async fn more(&mut self) -> bool {
        // One that reset the connection has closed it, too.
        self.socket.read_buf(&mut self.read).await.unwrap_or(0) > 0
    }

    /// Waits until the other side closes; nothing is to come before.
    pub(crate) async fn closed(&mut self) {
        assert!(!self.more().await, "{:?}", self.read);
    }

    /// Takes up to and with `end`; `None` where the connection ends before.
    async fn until(&mut self, end: &[u8]) -> Option<Vec<u8>> {
        loop {
            let found = self.read.windows(end.len()).position(|part| part == end);
            if let Some(at) = found {
                let rest = self.read.split_off(at + end.len());
                return Some(std::mem::replace(&mut self.read, rest));
            }
            if !self.more().await {
                return None;
            }
        }
    }

    async fn exactly(&mut self, length: usize) -> Option<Vec<u8>> {
        while self.read.len() < length {
            if !self.more().await {
                return None;
            }
        }
        let rest = self.read.split_off(length);
        Some(std::mem::replace(&mut self.read, rest))
    }

    pub(crate) async fn head(&mut self) -> Head {
        let bytes = self.until(b"\r\n\r\n").await.expect("an answer");
        let text = String::from_utf8(bytes).unwrap();
        let mut lines = text.trim_end().lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap();
        let header = |line: &str| {
            let (name, value) = line.split_once(": ").unwrap();
            (name.to_ascii_lowercase(), value.to_owned())
        };
        Head {
            status: status.parse().unwrap(),
            headers: lines.map(header).collect(),
        }
    }

    /// The next chunk of a body; empty at its end, `None` where it is cut off.
    pub(crate) async fn chunk(&mut self) -> Option<String> {
        let size = self.until(b"\r\n").await?;
        let size = std::str::from_utf8(&size).unwrap().trim_end().to_owned();
        let size = usize::from_str_radix(&size, 16).unwrap();
        let data = self.exactly(size).await?;
        assert_eq!(self.exactly(2).await?, b"\r\n");
        Some(String::from_utf8(data).unwrap())
    }

    /// Reads an answer to its end.
    pub(crate) async fn answer(&mut self) -> Answer {
        let head = self.head().await;
        let mut body = String::new();
        match head.headers.get("content-length") {
            Some(length) => {
                let bytes = self.exactly(length.parse().unwrap()).await.unwrap();
                body = String::from_utf8(bytes).unwrap();
            }
            None => loop {
                let chunk = self.chunk().await.expect("it is not cut off");
                if chunk.is_empty() {
                    break;
                }
                body.push_str(&chunk);
            },
        }
        Answer { head, body }
    }
}

/// Posts an object and reads the whole answer.
pub(crate) async fn post(mesh: &Mesh, path: &str, body: &Value) -> Answer {
    let mut connection = Http1::connect(mesh).await;
    connection.post(path, &[], body).await;
    connection.answer().await
}

/// Asks with a method that has no body.
pub(crate) async fn ask(mesh: &Mesh, method: &str, path: &str) -> Answer {
    let mut connection = Http1::connect(mesh).await;
    let head = format!("{method} {path} HTTP/1.1\r\nhost: router\r\n\r\n");
    connection.send(&head, b"").await;
    connection.answer().await
}
