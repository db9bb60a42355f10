//! Why a request fails: one enum, mapped to gRPC statuses by one function.

use std::{collections::HashMap, fmt, time::Duration};

use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, StatusExt};

/// Domain of `google.rpc.ErrorInfo` in every status of ours.
pub const DOMAIN: &str = "kvmesh";
/// Longest message that a status carries, in bytes.
const MAX_MESSAGE: usize = 1024;
/// Most violations that one status names.
pub(crate) const MAX_VIOLATIONS: usize = 16;

/// Shortest and longest time after which a client is told to try again.
pub(crate) const RETRY_AFTER: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(60));

/// One field that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field as in the proto, "sampling.top_p".
    pub field: String,
    /// What is allowed.
    pub description: String,
}

/// Fields that are not as they must be, never none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violations(pub Vec<Violation>);

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, violation) in self.0.iter().take(MAX_VIOLATIONS).enumerate() {
            let separator = if at == 0 { "" } else { "; " };
            write!(
                f,
                "{separator}{}: {}",
                violation.field, violation.description
            )?;
        }
        Ok(())
    }
}

/// Why a request fails.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// Fields that are malformed or out of range.
    #[error("{0}")]
    Invalid(Violations),
    /// Fields that ask for more tokens than the context has. To gRPC they are fields
    /// out of range as others; clients of other APIs look for this one.
    #[error("{0}")]
    OverContext(Violations),
    /// The call's bytes are not what the protocol asks for.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// A message above the limit, by its length prefix or while inflating.
    #[error("message is longer than {limit} bytes")]
    MessageTooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// The model's template or tokeniser failed.
    #[error("{0}")]
    Text(String),
    /// No generation of this id for this caller. One text for all causes.
    #[error("no such generation")]
    UnknownGeneration,
    /// It cannot be said yet whether there is such a generation: ask again soon.
    #[error("{why}")]
    NotYet {
        /// In words.
        why: &'static str,
    },
    /// No service of this name: a question to health.
    #[error("unknown service")]
    UnknownService,
    /// No worker of this id.
    #[error("no worker {0:?}")]
    UnknownWorker(String),
    /// What was asked is not possible in the present state.
    #[error("{message}")]
    Refused {
        /// Reason for ErrorInfo.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// The call brought no key that is known. One text for all causes.
    #[error("a valid key is needed, as `authorization: Bearer KEY`")]
    Unauthenticated,
    /// The caller may not ask this.
    #[error("permission denied")]
    PermissionDenied,
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
    /// The caller's tenant has as much as it may have.
    #[error("{what}")]
    TenantLimit {
        /// Which limit, in words.
        what: &'static str,
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
    /// A feature that this model, engine or release lacks.
    #[error("not supported: {field}{}", in_words(words))]
    Unsupported {
        /// Path of the field, or the name of what was asked for.
        field: String,
        /// In the worker's words; may be empty.
        words: String,
    },
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
    #[error("internal error {id}")]
    Internal {
        /// To quote: the request's id, which the log line of the bug has.
        id: String,
        /// First index that the client lacks.
        next_index: u32,
    },
}

impl RequestError {
    /// One field that is not as it must be.
    pub fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        let violation = Violation {
            field: field.into(),
            description: description.into(),
        };
        Self::Invalid(Violations(vec![violation]))
    }

    /// One field that asks for more tokens than the context has.
    pub fn over_context(field: impl Into<String>, description: impl Into<String>) -> Self {
        let violation = Violation {
            field: field.into(),
            description: description.into(),
        };
        Self::OverContext(Violations(vec![violation]))
    }

    /// A field or call that is not supported.
    pub fn unsupported(field: impl Into<String>) -> Self {
        Self::Unsupported {
            field: field.into(),
            words: String::new(),
        }
    }

    /// Status code and the documented reason (`docs/protocols.md`).
    #[must_use]
    pub fn code_and_reason(&self) -> (Code, &str) {
        match self {
            Self::Invalid(_) | Self::OverContext(_) => (Code::InvalidArgument, "INVALID_FIELD"),
            Self::Malformed(_) => (Code::InvalidArgument, "MALFORMED_MESSAGE"),
            Self::PromptTooLong { .. } => (Code::InvalidArgument, "PROMPT_TOO_LONG"),
            Self::MessageTooLarge { .. } => (Code::ResourceExhausted, "MESSAGE_TOO_LARGE"),
            Self::Unsupported { .. } => (Code::Unimplemented, "UNSUPPORTED"),
            Self::UnknownModel { .. } => (Code::NotFound, "UNKNOWN_MODEL"),
            Self::UnknownGeneration => (Code::NotFound, "UNKNOWN_GENERATION"),
            Self::UnknownService => (Code::NotFound, "UNKNOWN_SERVICE"),
            Self::UnknownWorker(_) => (Code::NotFound, "UNKNOWN_WORKER"),
            Self::Text(_) => (Code::FailedPrecondition, "TEXT_FAILED"),
            Self::Refused { reason, .. } => (Code::FailedPrecondition, reason),
            Self::Unauthenticated => (Code::Unauthenticated, "UNAUTHENTICATED"),
            Self::PermissionDenied => (Code::PermissionDenied, "PERMISSION_DENIED"),
            Self::Overloaded { .. } => (Code::ResourceExhausted, "OVERLOADED"),
            Self::TenantLimit { .. } => (Code::ResourceExhausted, "TENANT_LIMIT"),
            Self::SlowClient { .. } => (Code::ResourceExhausted, "SLOW_CLIENT"),
            Self::NoWorker(_) => (Code::Unavailable, "NO_WORKER"),
            Self::NotYet { .. } => (Code::Unavailable, "NOT_YET"),
            Self::WorkerLost { .. } => (Code::Unavailable, "WORKER_LOST"),
            Self::ShuttingDown { .. } => (Code::Unavailable, "SHUTTING_DOWN"),
            Self::WorkerFailed { code, reason, .. } => (worker_code(*code), reason),
            Self::TakenOver { .. } => (Code::Aborted, "TAKEN_OVER"),
            Self::DeadlineExceeded { .. } => (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
            Self::Cancelled => (Code::Cancelled, "CANCELLED"),
            Self::Internal { .. } => (Code::Internal, "INTERNAL"),
        }
    }

    /// First output index that the client lacks, for ends of a generation that
    /// may have sent tokens. No other end can come after a token: where a
    /// generation that has begun finds no room or no worker, that is
    /// [`Self::WorkerLost`].
    #[must_use]
    pub fn next_index(&self) -> Option<u32> {
        match self {
            Self::WorkerLost { next_index, .. }
            | Self::WorkerFailed { next_index, .. }
            | Self::TakenOver { next_index }
            | Self::DeadlineExceeded { next_index }
            | Self::SlowClient { next_index }
            | Self::Internal { next_index, .. }
            | Self::ShuttingDown { next_index } => Some(*next_index),
            _ => None,
        }
    }

    /// The status of PROTOCOLS 5, with its details. The only place where an
    /// error becomes a status.
    #[must_use]
    pub fn to_status(&self) -> Status {
        let (code, reason) = self.code_and_reason();
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, self.metadata());
        match self {
            Self::Invalid(Violations(all)) | Self::OverContext(Violations(all)) => {
                for violation in all.iter().take(MAX_VIOLATIONS) {
                    let description = cut(violation.description.clone());
                    details.add_bad_request_violation(violation.field.as_str(), description);
                }
            }
            Self::PromptTooLong { limit, .. } => {
                let allowed = format!("at most {limit} tokens with the output");
                details.add_bad_request_violation("prompt", allowed);
            }
            Self::Unsupported { field, words } => {
                let why = match words.is_empty() {
                    true => "not supported".to_owned(),
                    false => cut(words.clone()),
                };
                details.add_bad_request_violation(field.as_str(), why);
            }
            _ => {}
        }
        let mut metadata = MetadataMap::new();
        if let Some(wait) = self.retry_after() {
            details.set_retry_info(Some(wait));
            // gRPC's own clients wait for what this says (gRFC A6); RetryInfo is
            // for those who read details.
            let ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            metadata.insert("grpc-retry-pushback-ms", ms.into());
        }
        let message = cut(self.to_string());
        Status::with_error_details_and_metadata(code, message, details, metadata)
    }

    /// How long a client should wait before it tries again, where that is known.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Overloaded { retry_after, .. } | Self::TenantLimit { retry_after, .. } => {
                Some(*retry_after)
            }
            Self::NotYet { .. } => Some(RETRY_AFTER.0),
            _ => None,
        }
    }

    fn metadata(&self) -> HashMap<String, String> {
        let mut metadata = HashMap::new();
        if let Some(next) = self.next_index() {
            metadata.insert("next_index".to_owned(), next.to_string());
        }
        match self {
            Self::MessageTooLarge { limit } | Self::PromptTooLong { limit, .. } => {
                metadata.insert("limit".to_owned(), limit.to_string());
            }
            Self::UnknownModel { known, .. } => {
                metadata.insert("models".to_owned(), cut(known.join(",")));
            }
            Self::Unsupported { field, .. } => {
                metadata.insert("field".to_owned(), cut(field.clone()));
            }
            Self::Internal { id, .. } => {
                metadata.insert("id".to_owned(), id.clone());
            }
            _ => {}
        }
        metadata
    }
}

/// A predicted wait as what a client is told.
pub(crate) fn retry_after(wait_ms: f64) -> Duration {
    Duration::try_from_secs_f64(wait_ms / 1e3)
        .unwrap_or(RETRY_AFTER.1)
        .clamp(RETRY_AFTER.0, RETRY_AFTER.1)
}

/// A worker says whether the request, its state or the worker is at fault. All
/// else, say who the client is or what it may do, is the router's to say.
fn worker_code(code: u32) -> Code {
    match Code::from(i32::try_from(code).unwrap_or(i32::MAX)) {
        code @ (Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::ResourceExhausted
        | Code::Unimplemented
        | Code::Unavailable
        | Code::DataLoss) => code,
        _ => Code::Internal,
    }
}

/// A worker's words behind what is said already; nothing where it has none.
fn in_words(words: &str) -> String {
    match words.is_empty() {
        true => String::new(),
        false => format!(": {words}"),
    }
}

/// Cuts at a character border: headers are small, and messages may hold what
/// a client or a template sent.
pub(crate) fn cut(mut message: String) -> String {
    if message.len() > MAX_MESSAGE {
        let mut end = MAX_MESSAGE;
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
    }
    message
}
