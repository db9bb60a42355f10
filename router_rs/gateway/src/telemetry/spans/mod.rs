//! Requests as spans of OpenTelemetry, told to a collector over OTLP/gRPC.
//!
//! ```text
//!  begin ─▶ RequestSpan ─▶ queue (bounded; what is too much is dropped) ─▶ exporter ─▶ collector
//! ```
//!
//! A stream pays for one offer to the queue at its end, and waits for nothing. The
//! exporter is one task: it makes spans of what was offered, and sends them in batches.
//! The wall clock is read once a request, at its beginning; all else is counted from
//! there.

mod collector;
mod context;
mod exporter;
mod otlp;
mod queue;
mod request;

use std::sync::Arc;

use kvmesh_trust::ServerTlsError;

pub(crate) use collector::{Address, Headers};
pub(crate) use context::{Share, goes_on_below};
pub(crate) use exporter::Exporter;
pub(crate) use request::RequestSpan;

use self::{collector::Collector, context::Context, queue::Queue};
use super::Telemetry;
use crate::{door::CallMetadata, settings::Settings};

/// Spans that wait for the collector at most, of all requests together: some 10 MiB.
const QUEUED_SPANS: usize = 16_384;

/// Begins spans of requests.
pub(crate) struct Spans {
    queue: Arc<Queue>,
    share: Share,
}

impl Spans {
    /// `None` where the settings name no collector. Must be called within a tokio
    /// runtime.
    ///
    /// # Errors
    /// [`ServerTlsError`] for a file that cannot be used.
    pub(crate) fn start(
        settings: &Settings,
        router_id: &str,
        telemetry: &Telemetry,
    ) -> Result<Option<(Self, Exporter)>, ServerTlsError> {
        let Some(address) = Address::read(&settings.otlp_endpoint) else {
            return Ok(None);
        };
        // Settings that are wrong were refused before.
        let headers = Headers::read(&settings.otlp_headers.0).unwrap_or_default();
        let collector = Collector::new(address, settings.otlp_ca.as_deref(), headers)?;
        let queue = Arc::new(Queue::new(QUEUED_SPANS, telemetry.spans_dropped.clone()));
        let resource = otlp::resource(router_id, &settings.cluster);
        let exported = telemetry.spans_exported.clone();
        let exporter = Exporter::start(collector, Arc::clone(&queue), resource, exported);
        let share = Share::of(settings.otlp_share);
        Ok(Some((Self { queue, share }, exporter)))
    }

    /// Which traces are exported.
    pub(crate) fn share(&self) -> Share {
        self.share
    }

    /// Begins the span of a call, which goes on as the parent of what workers do. `resumes`:
    /// it goes on with a request, maybe in that one's trace. `None`: it is not among those
    /// that are exported.
    pub(crate) fn begin(
        &self,
        call: &mut CallMetadata,
        method: &'static str,
        resumes: bool,
    ) -> Option<RequestSpan> {
        let context = Context::of(&call.traceparent, call.has_parent)?;
        let exported = self.share.takes(&context);
        if exported {
            call.traceparent = context.traceparent();
            call.traced = true;
        } else if !resumes || call.has_parent {
            return None;
        }
        let queue = Arc::clone(&self.queue);
        Some(RequestSpan::new(queue, (context, exported), call, method))
    }
}
