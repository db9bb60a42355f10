//! State machines of sessions, attempts and generations.
#![forbid(unsafe_code)]
