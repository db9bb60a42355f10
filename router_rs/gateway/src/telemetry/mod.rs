//! Figures and logs. What the token path touches are plain numbers of its own
//! stream, flushed now and then; labels are looked up once a request.

mod collector;
mod encode;
mod goodput;
mod histogram;
mod log;
#[cfg(test)]
pub(crate) mod log_lines;
mod spans;

pub(crate) use collector::Exposition;
pub(crate) use goodput::{ClassEnd, HeldTo, Took};
pub(crate) use histogram::Histogram;
pub use log::init_logging;
pub(crate) use spans::{Address, Exporter, Headers, RequestSpan, Share, Spans, goes_on_below};

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use kvmesh_wire::v1;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use tokio::sync::Semaphore;

use crate::{door::permit_bytes, error::RequestError};
use goodput::ClassLabels;
use histogram::LocalHistogram;

/// Where a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Connection,
    Access,
    Tenant,
    Size,
    Permit,
    Body,
    Bound,
    Tokenize,
    Validate,
    Admission,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Access => "access",
            Self::Tenant => "tenant",
            Self::Size => "size",
            Self::Permit => "permit",
            Self::Body => "body",
            Self::Bound => "bound",
            Self::Tokenize => "tokenize",
            Self::Validate => "validate",
            Self::Admission => "admission",
        }
    }

    /// The step of an error met while a message was read.
    pub(crate) fn of_reading(error: &RequestError) -> Self {
        match error {
            RequestError::MessageTooLarge { .. } => Self::Size,
            RequestError::Overloaded { .. } => Self::Permit,
            _ => Self::Body,
        }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Rejection {
    step: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CallEnd {
    method: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reload {
    outcome: &'static str,
}

/// What the gateway counts.
#[derive(Debug, Default)]
pub(crate) struct Telemetry {
    rejected: Family<Rejection, Counter>,
    ended: Family<CallEnd, Counter>,
    by_class: Family<ClassLabels, Counter>,
    key_reloads: Family<Reload, Counter>,
    tls_reloads: Family<Reload, Counter>,
    jwt_key_reloads: Family<Reload, Counter>,
    spans_exported: Counter,
    spans_dropped: Counter,
    connections: AtomicI64,
    permits: OnceLock<(Arc<Semaphore>, usize)>,
    first_token: Histogram,
    between_tokens: Histogram,
    tokenize: Histogram,
    prefill: Histogram,
    queue: Histogram,
}

impl Telemetry {
    /// A refusal at the door.
    pub(crate) fn rejected(&self, step: Step, error: &RequestError) {
        let reason = reason_label(error);
        self.rejected
            .get_or_create(&Rejection {
                step: step.name(),
                reason,
            })
            .inc();
    }

    /// A connection that was not accepted.
    pub(crate) fn connection_rejected(&self) {
        let label = Rejection {
            step: Step::Connection.name(),
            reason: "LIMIT",
        };
        self.rejected.get_or_create(&label).inc();
    }

    /// A changed file of keys was taken, or was not.
    pub(crate) fn keys_reloaded(&self, taken: bool) {
        let outcome = if taken { "taken" } else { "refused" };
        self.key_reloads.get_or_create(&Reload { outcome }).inc();
    }

    /// A changed file of the keys that sign tokens was taken, or was not.
    pub(crate) fn jwt_keys_reloaded(&self, taken: bool) {
        let outcome = if taken { "taken" } else { "refused" };
        self.jwt_key_reloads
            .get_or_create(&Reload { outcome })
            .inc();
    }

    /// A changed certificate was taken, or was not.
    pub(crate) fn tls_reloaded(&self, taken: bool) {
        let outcome = if taken { "taken" } else { "refused" };
        self.tls_reloads.get_or_create(&Reload { outcome }).inc();
    }

    /// The end of a call.
    pub(crate) fn ended(&self, method: &'static str, error: Option<&RequestError>) {
        let outcome = error.map_or("OK", reason_label);
        self.ended.get_or_create(&CallEnd { method, outcome }).inc();
    }

    pub(crate) fn connection_opened(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn connection_closed(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }

    /// Template and tokeniser of one request.
    pub(crate) fn tokenized(&self, took: Duration) {
        self.tokenize.observe(took);
    }

    /// The end of a request of a class.
    pub(crate) fn class_ended(&self, class: v1::RequestClass, end: ClassEnd) {
        self.by_class
            .get_or_create(&ClassLabels::new(class, end))
            .inc();
    }

    /// What a generation that ended well took, against what it is held to.
    pub(crate) fn judged(&self, took: &Took, held: &HeldTo) {
        self.class_ended(held.class, took.judged(held));
    }

    /// A generation that ended well.
    pub(crate) fn finished(&self, finished: &v1::Finished) {
        let Some(timings) = &finished.timings else {
            return;
        };
        let ms = |ms: f64| Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default();
        self.prefill.observe(ms(timings.prefill_ms));
        self.queue.observe(ms(timings.queue_ms));
    }

    /// The budget for bytes of requests.
    pub(crate) fn watch_permits(&self, budget: &Arc<Semaphore>, all: usize) {
        // One door a router; a second one would be the same budget.
        let _ = self.permits.set((Arc::clone(budget), all));
    }

    fn held_bytes(&self) -> u64 {
        self.permits.get().map_or(0, |(budget, all)| {
            permit_bytes(all.saturating_sub(budget.available_permits()))
        })
    }
}

/// A reason as a label: a worker's own words would make labels without bound.
fn reason_label(error: &RequestError) -> &'static str {
    match error {
        RequestError::Invalid(_) | RequestError::OverContext(_) => "INVALID_FIELD",
        RequestError::Malformed(_) => "MALFORMED_MESSAGE",
        RequestError::MessageTooLarge { .. } => "MESSAGE_TOO_LARGE",
        RequestError::Text(_) => "TEXT_FAILED",
        RequestError::UnknownGeneration => "UNKNOWN_GENERATION",
        RequestError::NotYet { .. } => "NOT_YET",
        RequestError::UnknownService => "UNKNOWN_SERVICE",
        RequestError::UnknownWorker(_) => "UNKNOWN_WORKER",
        RequestError::Refused { reason, .. } => reason,
        RequestError::PermissionDenied => "PERMISSION_DENIED",
        RequestError::Unauthenticated => "UNAUTHENTICATED",
        RequestError::TenantLimit { .. } => "TENANT_LIMIT",
        RequestError::UnknownModel { .. } => "UNKNOWN_MODEL",
        RequestError::PromptTooLong { .. } => "PROMPT_TOO_LONG",
        RequestError::NoWorker(_) => "NO_WORKER",
        RequestError::Overloaded { .. } => "OVERLOADED",
        RequestError::WorkerLost { .. } => "WORKER_LOST",
        RequestError::WorkerFailed { .. } => "WORKER_FAILED",
        RequestError::TakenOver { .. } => "TAKEN_OVER",
        RequestError::Unsupported { .. } => "UNSUPPORTED",
        RequestError::DeadlineExceeded { .. } => "DEADLINE_EXCEEDED",
        RequestError::SlowClient { .. } => "SLOW_CLIENT",
        RequestError::Cancelled => "CANCELLED",
        RequestError::ShuttingDown { .. } => "SHUTTING_DOWN",
        RequestError::Internal { .. } => "INTERNAL",
    }
}

/// Figures of one token stream, on its own until flushed.
pub(crate) struct StreamFigures {
    arrived: Instant,
    last: Option<Instant>,
    gaps: LocalHistogram,
    tokens: u64,
}

/// Messages between two flushes.
const FLUSH_EVERY: u32 = 64;

impl StreamFigures {
    pub(crate) fn new(arrived: Instant) -> Self {
        Self {
            arrived,
            last: None,
            gaps: LocalHistogram::default(),
            tokens: 0,
        }
    }

    /// A message with tokens goes out, at `now`.
    pub(crate) fn tokens(&mut self, count: usize, now: Instant, telemetry: &Telemetry) {
        match self.last.replace(now) {
            None => telemetry
                .first_token
                .observe(now.saturating_duration_since(self.arrived)),
            Some(last) => self.gaps.observe(now.saturating_duration_since(last)),
        }
        self.tokens += count as u64;
        if self.gaps.count() >= FLUSH_EVERY {
            self.flush(telemetry);
        }
    }

    pub(crate) fn flush(&mut self, telemetry: &Telemetry) {
        telemetry.between_tokens.take(&mut self.gaps);
    }

    /// Tokens so far.
    pub(crate) fn count(&self) -> u64 {
        self.tokens
    }
}
