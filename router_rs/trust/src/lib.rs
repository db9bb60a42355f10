//! Who is who inside a cluster (PROTOCOLS 6).
//!
//! ```text
//! files ─▶ Followed (looks every second, keeps what can be used) ─┬▶ ClusterToken
//!                                                                 ├▶ PeerTls (a worker's ports)
//!                                                                 ├▶ WorkerTls (calls to workers)
//!                                                                 └▶ ServerTls (calls to etcd)
//! Dialer (token, TLS) ─▶ Connection: shows the token with every call, and knows by its
//!                        certificate which worker it is with
//! ```
//!
//! Both are used alone or together: what is set is asked for.
#![forbid(unsafe_code)]

mod dial;
mod followed;
mod identity;
mod outside;
mod tls;
mod token;

pub use dial::{Connection, Dialer, Dialled, Shown, UNACKNOWLEDGED};
pub use followed::{FileError, Followed, Wrong};
pub use identity::{Identity, IdentityError, Role};
pub use outside::{ServerTls, ServerTlsError};
pub use tls::{File, PeerTls, WorkerTls, public_port};
pub use token::{ClusterToken, TOKEN_HEADER};
