//! Errors of pools and nodes.

use std::io;

use rustls::InvalidMessage;

use crate::id::Reason;

/// Longest text of a peer that is kept, in characters.
const WORDS: usize = 512;

/// Why a pool could not be made or a peer's could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// A size is zero or too large for this machine's address space.
    #[error("{blocks} blocks of {block_bytes} bytes cannot be mapped")]
    Size {
        /// Slots asked for.
        blocks: u64,
        /// Bytes a slot.
        block_bytes: u64,
    },
    /// There is no such slot.
    #[error("slot {slot} of a pool of {blocks}")]
    Slot {
        /// The slot asked for.
        slot: u32,
        /// Slots that there are.
        blocks: u32,
    },
    /// The descriptor is no pool, lacks a seal, or is another pool than named.
    #[error("not the pool that was named: {0}")]
    Foreign(&'static str),
    /// The other end of the socket belongs to another user.
    #[error("peer has uid {0}")]
    Uid(u32),
    /// The kernel refused.
    #[error("{what}: {source}")]
    Os {
        /// The call.
        what: &'static str,
        /// Its error.
        source: io::Error,
    },
}

impl PoolError {
    /// The last error of the kernel, from the call `what`.
    pub(crate) fn os(what: &'static str) -> Self {
        Self::Os {
            what,
            source: io::Error::last_os_error(),
        }
    }
}

/// A call about a transfer that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// Kind of refusal, as on the wire.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

impl Refused {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }
}

/// Why a peer is nobody to exchange KV with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Untrusted {
    /// The peer speaks no TLS where this worker does.
    #[error(
        "the peer speaks no TLS for transfers of KV and this worker does; set tls_cert, \
         tls_key and tls_ca at both workers or at neither"
    )]
    Plain,
    /// The peer speaks TLS where this worker does not.
    #[error(
        "the peer speaks TLS for transfers of KV and this worker does not; set tls_cert, \
         tls_key and tls_ca at both workers or at neither"
    )]
    Secured,
    /// One of both refused what the other showed.
    #[error("TLS between the transfer ports failed: {0}")]
    Handshake(rustls::Error),
    /// The peer's certificate is another's than a worker's.
    #[error("the certificate on the transfer port does not do: {0}")]
    Certificate(String),
    /// The peer is another worker than it says.
    #[error("worker {said:?} shows the certificate of worker {certified:?}")]
    Name {
        /// By its hello.
        said: String,
        /// By its certificate.
        certified: String,
    },
    /// The peer's own words.
    #[error("the peer refuses: {0}")]
    Refused(String),
}

impl Untrusted {
    /// The peer's own words, as far as they are kept.
    pub(crate) fn refused(words: &str) -> io::Error {
        Self::Refused(words.chars().take(WORDS).collect()).into()
    }

    /// What keeps two from shaking hands: where it is about trust, it says so.
    pub(crate) fn while_greeting(error: io::Error) -> io::Error {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref());
        match tls {
            Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
                Self::Plain.into()
            }
            Some(tls) => Self::Handshake(tls.clone()).into(),
            None => error,
        }
    }

    /// Whether an error is one of these.
    pub(crate) fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }

    /// Whether it has shown nothing by which it could be of this cluster.
    pub(crate) fn is_of_a_stranger(&self) -> bool {
        matches!(self, Self::Plain | Self::Secured | Self::Handshake(_))
    }

    /// What the peer is told of it.
    pub(crate) fn to_peer(&self) -> String {
        match self {
            // As it looks from there.
            Self::Plain => Self::Secured.to_string(),
            Self::Secured => Self::Plain.to_string(),
            other => other.to_string(),
        }
    }
}

impl From<Untrusted> for io::Error {
    fn from(untrusted: Untrusted) -> Self {
        Self::new(io::ErrorKind::PermissionDenied, untrusted)
    }
}
