//! Sockets, inbound services, telemetry; drives session, scheduler and text.
#![forbid(unsafe_code)]

pub mod error;
pub mod mesh;
pub mod request;
