//! vLLM's two gRPC APIs over real sockets, by clients made from their protos.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod aborts;
mod calls;
mod engine;
mod facts;
mod inference;
mod refusals;
