//! The OpenAI face over real sockets: HTTP/1.1 by hand, HTTP/2 by h2.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod answers;
mod errors;
mod formats;
mod http1;
mod sockets;
mod token_ids;
mod tools;
