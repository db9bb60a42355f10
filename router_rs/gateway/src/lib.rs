//! Sockets, inbound services, telemetry; drives session, scheduler and text.
#![forbid(unsafe_code)]
