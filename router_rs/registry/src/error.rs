//! What can go wrong, as types.

use std::time::Duration;

use crate::record::RecordError;

/// A setting is wrong. The text names it and says what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// No endpoint at all.
    #[error("etcd endpoints are empty; at least one \"host:port\" is needed")]
    NoEndpoint,
    /// An endpoint is no address.
    #[error(
        "etcd endpoint is {0:?}; allowed are \"host:port\", \"http://host:port\" and \
         \"https://host:port\""
    )]
    Endpoint(String),
    /// An https endpoint without TLS settings, or the other way round.
    #[error(
        "etcd endpoint {0:?} and the TLS settings do not agree: https needs them, http has none"
    )]
    TlsMismatch(String),
    /// A cluster name that cannot be part of a key.
    #[error("cluster is {0:?}; allowed are 1 to 128 characters of A-Z a-z 0-9 . _ -")]
    Cluster(String),
    /// A TTL outside of what is sensible.
    #[error("lease TTL is {0:?}; allowed are 2 s to 1 h")]
    Ttl(Duration),
}

/// A call to etcd, or what it was for, failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// No endpoint answered. Worth another try later.
    #[error("etcd cannot be reached for {operation}: {reason}")]
    Unreachable {
        /// The call.
        operation: &'static str,
        /// What the last endpoint that was tried said.
        reason: String,
    },
    /// etcd answered and refused. Another try needs a change first.
    #[error("etcd refused {operation}: {reason}")]
    Rejected {
        /// The call.
        operation: &'static str,
        /// etcd's words.
        reason: String,
    },
    /// Another live worker or router has this id.
    #[error("{id} is taken: {holder} is registered under this id and answers")]
    Taken {
        /// The id.
        id: String,
        /// Address of who has it.
        holder: String,
    },
    /// A record that may not be written, or that cannot be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The lease ended before the key was written.
    #[error("the lease ended before the key was written")]
    LeaseLost,
    /// Others wrote each time that this was to be written after a look.
    #[error("others wrote {0} at the same time, again and again")]
    Contended(&'static str),
    /// A watch ended; a new one starts with a list.
    #[error("the watch broke: {0}")]
    WatchBroken(#[from] WatchBreak),
}

/// Why a watch is not trusted any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WatchBreak {
    /// The stream ended.
    #[error("the stream ended: {0}")]
    Ended(String),
    /// No answer to a progress request in time.
    #[error("no answer to a progress request within {0:?}")]
    Silent(Duration),
    /// A revision below one that was seen: etcd lost its data.
    #[error("revision {now} came after {seen}: etcd started over")]
    WentBack {
        /// Highest revision seen.
        seen: i64,
        /// Revision that came now.
        now: i64,
    },
    /// History that was still to come is compacted.
    #[error("history up to revision {0} is compacted")]
    Compacted(i64),
    /// etcd ended the watch.
    #[error("etcd ended the watch: {0}")]
    Cancelled(String),
}
