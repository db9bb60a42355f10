//! Why a request fails: one enum, mapped to gRPC statuses by one function.

use std::time::Duration;

/// Why a request fails.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// No such model; the models that exist.
    #[error("no model {name:?}; there are: {}", known.join(", "))]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The prompt does not fit the largest pool.
    #[error("prompt of {tokens} tokens: the largest pool holds {limit}")]
    PromptTooLong {
        /// Its length.
        tokens: u64,
        /// The limit.
        limit: u64,
    },
    /// No worker can run it now.
    #[error("no worker for {0}")]
    NoWorker(String),
    /// The queue is full, or the request waited too long in it.
    #[error("{reason}")]
    Overloaded {
        /// In words.
        reason: &'static str,
        /// When to try again.
        retry_after: Duration,
    },
    /// A worker was lost, or all tries are spent.
    #[error("{reason}")]
    WorkerLost {
        /// In words.
        reason: String,
        /// First index that the client lacks.
        next_index: u32,
    },
    /// The engine said that it failed.
    #[error("{message}")]
    WorkerFailed {
        /// Canonical status code.
        code: u32,
        /// Reason for ErrorInfo.
        reason: String,
        /// For people.
        message: String,
        /// First index that the client lacks.
        next_index: u32,
    },
    /// Another router took the generation over.
    #[error("resumed at another router")]
    TakenOver {
        /// First index that the client lacks.
        next_index: u32,
    },
    /// The engine lacks a feature.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The client's deadline passed.
    #[error("deadline passed")]
    DeadlineExceeded {
        /// First index that the client lacks.
        next_index: u32,
    },
    /// The client read nothing for too long.
    #[error("the client read nothing for too long")]
    SlowClient {
        /// First index that the client lacks.
        next_index: u32,
    },
    /// The client went away.
    #[error("cancelled by the client")]
    Cancelled,
    /// This router is shutting down.
    #[error("the router is shutting down")]
    ShuttingDown {
        /// First index that the client lacks.
        next_index: u32,
    },
    /// A bug of ours.
    #[error("internal error {0}")]
    Internal(String),
}
