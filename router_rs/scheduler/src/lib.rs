//! Where a request runs: cost in milliseconds, queue, admission.
#![forbid(unsafe_code)]
