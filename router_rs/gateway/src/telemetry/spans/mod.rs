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

mod context;
mod exporter;
mod otlp;
mod queue;
mod request;

use std::sync::Arc;

use tonic::transport::Endpoint;

pub(crate) use exporter::Exporter;
pub(crate) use request::RequestSpan;

use self::{context::Context, queue::Queue};
use super::Telemetry;
use crate::{door::CallMetadata, settings::Settings};

/// Spans that wait for the collector at most, of all requests together: some 10 MiB.
const QUEUED_SPANS: usize = 16_384;

/// Begins spans of requests.
pub(crate) struct Spans {
    queue: Arc<Queue>,
    /// Of trace ids, by their last 56 bits, those below it are exported.
    below: u64,
}

impl Spans {
    /// `None` where the settings name no collector. Must be called within a tokio
    /// runtime.
    pub(crate) fn start(
        settings: &Settings,
        router_id: &str,
        telemetry: &Telemetry,
    ) -> Option<(Self, Exporter)> {
        let collector = endpoint(&settings.otlp_endpoint)?;
        let queue = Arc::new(Queue::new(QUEUED_SPANS, telemetry.spans_dropped.clone()));
        let resource = otlp::resource(router_id, &settings.cluster);
        let exported = telemetry.spans_exported.clone();
        let exporter = Exporter::start(&collector, Arc::clone(&queue), resource, exported);
        let below = context::below(settings.otlp_share);
        Some((Self { queue, below }, exporter))
    }

    /// Begins the span of a call, which goes on as the parent of what workers do.
    /// `None`: it is not among those that are exported.
    pub(crate) fn begin(&self, call: &mut CallMetadata) -> Option<RequestSpan> {
        let context = Context::of(&call.traceparent, call.has_parent)?;
        if !context.exported(self.below) {
            return None;
        }
        call.traceparent = context.traceparent();
        call.traced = true;
        Some(RequestSpan::new(Arc::clone(&self.queue), context, call))
    }
}

/// Where a collector is, by `host:port` or `http://host:port`. `None` where the text
/// is neither, or empty.
pub(crate) fn endpoint(text: &str) -> Option<Endpoint> {
    let authority = text.strip_prefix("http://").unwrap_or(text);
    let authority: http::uri::Authority = authority.trim_end_matches('/').parse().ok()?;
    authority.port_u16()?;
    Endpoint::from_shared(format!("http://{authority}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_is_named_by_host_and_port() {
        for good in ["127.0.0.1:4317", "http://collector:4317", "http://[::1]:1/"] {
            assert!(endpoint(good).is_some(), "{good}");
        }
        for bad in [
            "",
            "collector",
            "https://collector:4317",
            "http://a:1/v1/traces",
            "a b:1",
        ] {
            assert!(endpoint(bad).is_none(), "{bad}");
        }
    }
}
