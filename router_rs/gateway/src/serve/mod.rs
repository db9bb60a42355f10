//! One port: gRPC and plain HTTP over one accept loop.

mod accept;
mod admin;
pub(crate) mod body;
#[cfg(test)]
mod border_tests;
mod calls;
pub(crate) mod generation;
pub(crate) mod grpc;
mod health;
mod inference;
mod io;
mod lazily;
mod one_call;
mod plain;
mod port;
mod reflection;
mod resets;
mod resume;
mod service;
mod tokens;

pub(crate) use accept::{Acceptor, bind};
pub(crate) use calls::CallEnd;
pub(crate) use health::Health;
pub(crate) use inference::{refuse, unary};
pub(crate) use port::Port;
pub(crate) use reflection::Reflection;
pub(crate) use service::{Call, RouterFacts, Shared};
