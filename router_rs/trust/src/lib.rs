//! Who is who inside a cluster (PROTOCOLS 6).
//!
//! ```text
//! file ─▶ Followed (looks every second, keeps what can be used) ─▶ ClusterToken
//! ```
//!
//! Routers show the token with every call to a worker, and workers ask for it
//! before they read anything else.
#![forbid(unsafe_code)]

mod dial;
mod followed;
mod token;

pub use dial::{Dialer, Dialled, Shown};
pub use followed::{FileError, Followed, Wrong};
pub use token::{ClusterToken, TOKEN_HEADER};
