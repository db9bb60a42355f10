//! Names: of a transfer, and of why it ended.

use std::fmt;

use kvmesh_wire::v1::AbortReason;

/// Name of a transfer: 16 bytes that say nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(pub [u8; 16]);

impl TransferId {
    /// From the wire; `None` where it is not 16 bytes.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a transfer ended without success.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No such transfer within the offer timeout.
    Unknown,
    /// The request was cancelled or ended.
    Cancelled,
    /// The lease ended, or the sender fell silent for as long.
    LeaseExpired,
    /// Model, number type, format or geometry differ.
    Incompatible,
    /// A block did not match its checksum or version.
    Mismatch,
    /// The first token ended the request.
    Finished,
    /// The peer failed, or broke the protocol.
    Failed,
    /// The two do not trust each other: TLS at one of them, or another certificate.
    Untrusted,
    /// The connection broke or could not be made. Never on the wire.
    Lost,
}

impl Reason {
    /// All, in the order of the wire's numbers.
    pub const ALL: [Self; 9] = [
        Self::Unknown,
        Self::Cancelled,
        Self::LeaseExpired,
        Self::Incompatible,
        Self::Mismatch,
        Self::Finished,
        Self::Failed,
        Self::Untrusted,
        Self::Lost,
    ];

    /// Lower-case name, as in Python and in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Cancelled => "cancelled",
            Self::LeaseExpired => "lease_expired",
            Self::Incompatible => "incompatible",
            Self::Mismatch => "mismatch",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Untrusted => "untrusted",
            Self::Lost => "lost",
        }
    }

    /// By its name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }

    pub(crate) fn to_wire(self) -> AbortReason {
        match self {
            Self::Unknown => AbortReason::Unknown,
            Self::Cancelled => AbortReason::Cancelled,
            Self::LeaseExpired => AbortReason::LeaseExpired,
            Self::Incompatible => AbortReason::Incompatible,
            Self::Mismatch => AbortReason::Mismatch,
            Self::Finished => AbortReason::Finished,
            Self::Untrusted => AbortReason::Untrusted,
            Self::Failed | Self::Lost => AbortReason::Failed,
        }
    }

    pub(crate) fn from_wire(number: i32) -> Self {
        match AbortReason::try_from(number) {
            Ok(AbortReason::Unknown) => Self::Unknown,
            Ok(AbortReason::Cancelled) => Self::Cancelled,
            Ok(AbortReason::LeaseExpired) => Self::LeaseExpired,
            Ok(AbortReason::Incompatible) => Self::Incompatible,
            Ok(AbortReason::Mismatch) => Self::Mismatch,
            Ok(AbortReason::Finished) => Self::Finished,
            Ok(AbortReason::Untrusted) => Self::Untrusted,
            Ok(AbortReason::Unspecified | AbortReason::Failed) | Err(_) => Self::Failed,
        }
    }
}
