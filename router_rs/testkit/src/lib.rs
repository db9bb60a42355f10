//! Mock worker, fault proxy, stream checker and load client.
#![forbid(unsafe_code)]
