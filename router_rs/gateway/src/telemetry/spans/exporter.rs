//! The task that tells a collector.

use std::{sync::Arc, time::Duration};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, trace_service_client::TraceServiceClient},
    resource::v1::Resource,
};
use prometheus_client::metrics::counter::Counter;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::Status;

use super::{
    collector::{Collector, Reached},
    otlp,
    queue::Queue,
    request::Ended,
};

/// Spans of a batch, or a few more: a request is not torn apart.
const BATCH_SPANS: usize = 512;
/// Time that a batch has to fill.
const GATHER: Duration = Duration::from_millis(200);
/// First and longest pause after a batch that failed.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Time to tell what is left at the end.
const FLUSH: Duration = Duration::from_secs(2);

/// The exporter's task. Dropping it ends it at once.
pub(crate) struct Exporter {
    queue: Arc<Queue>,
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
    /// Of the collector's files.
    _follows: AbortOnDropHandle<()>,
}

impl Exporter {
    pub(super) fn start(
        collector: Collector,
        queue: Arc<Queue>,
        resource: Resource,
        exported: Counter,
    ) -> Self {
        let telling = Telling {
            client: TraceServiceClient::new(collector.reach()),
            queue: Arc::clone(&queue),
            resource,
            exported,
            pause: None,
        };
        let stop = CancellationToken::new();
        let task = AbortOnDropHandle::new(tokio::spawn(telling.run(stop.clone())));
        let follows = tokio::spawn(collector.follow());
        Self {
            queue,
            stop,
            task,
            _follows: AbortOnDropHandle::new(follows),
        }
    }

    /// Tells what is left, within [`FLUSH`], and ends.
    pub(crate) async fn close(self) {
        self.stop.cancel();
        match tokio::time::timeout(FLUSH, self.task).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(event = "otlp_exporter_failed", %error),
            Err(_) => {
                let spans = self.queue.len();
                tracing::warn!(event = "otlp_not_flushed", spans, "no answer in time");
            }
        }
    }
}

struct Telling {
    client: TraceServiceClient<Reached>,
    queue: Arc<Queue>,
    resource: Resource,
    exported: Counter,
    /// While batches fail: how long it waits before the next one.
    pause: Option<Duration>,
}

impl Telling {
    async fn run(mut self, stop: CancellationToken) {
        loop {
            let pause = self.pause.unwrap_or(GATHER);
            let gathered = async {
                self.queue.holds(1).await;
                tokio::select! {
                    // While the collector is away nothing is hurried.
                    () = self.queue.holds(BATCH_SPANS), if self.pause.is_none() => {}
                    () = tokio::time::sleep(pause) => {}
                }
            };
            tokio::select! {
                () = stop.cancelled() => break,
                () = gathered => {}
            }
            self.tell_batch().await;
        }
        while self.queue.len() > 0 && self.tell_batch().await {}
        let left = self.queue.take(usize::MAX);
        let spans = left.iter().map(Ended::spans).sum();
        self.queue.drop_spans(spans);
    }

    /// Sends a batch; whether the collector took it. One that it did not take is gone:
    /// memory is for what comes after it.
    async fn tell_batch(&mut self) -> bool {
        let mut spans = Vec::with_capacity(BATCH_SPANS);
        for ended in self.queue.take(BATCH_SPANS) {
            otlp::spans(&ended, &mut spans);
        }
        let count = spans.len();
        if count == 0 {
            return true;
        }
        let batch = otlp::request(self.resource.clone(), spans);
        match self.send(batch).await {
            Ok(refused) => {
                let refused = refused.min(count);
                self.queue.drop_spans(refused);
                self.exported.inc_by((count - refused) as u64);
                if self.pause.take().is_some() {
                    tracing::info!(event = "otlp_export_resumed");
                }
                true
            }
            Err(error) => {
                self.queue.drop_spans(count);
                let next = match self.pause {
                    None => {
                        let (code, error) = (error.code(), error.message());
                        tracing::warn!(
                            event = "otlp_export_failed",
                            ?code,
                            error,
                            "spans are dropped"
                        );
                        PAUSE.0
                    }
                    Some(pause) => (pause * 2).min(PAUSE.1),
                };
                self.pause = Some(next);
                false
            }
        }
    }

    /// Spans that the collector says it did not take.
    async fn send(&mut self, batch: ExportTraceServiceRequest) -> Result<usize, Status> {
        let answer = self.client.export(batch).await?.into_inner();
        let refused = answer.partial_success.map_or(0, |told| told.rejected_spans);
        Ok(usize::try_from(refused).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use opentelemetry_proto::tonic::collector::trace::v1::{
        ExportTracePartialSuccess, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    };
    use tokio::net::TcpListener;
    use tonic::{
        Request, Response,
        transport::{Server, server::TcpIncoming},
    };
    use tracing::Level;

    use super::{
        super::collector::{Address, Headers},
        *,
    };
    use crate::telemetry::log_lines::LogLines;

    /// Refuses one span of each batch.
    struct Picky;

    #[tonic::async_trait]
    impl TraceService for Picky {
        async fn export(
            &self,
            _: Request<ExportTraceServiceRequest>,
        ) -> Result<Response<ExportTraceServiceResponse>, Status> {
            let partial_success = Some(ExportTracePartialSuccess {
                rejected_spans: 1,
                error_message: String::new(),
            });
            Ok(Response::new(ExportTraceServiceResponse {
                partial_success,
            }))
        }
    }

    #[tokio::test]
    async fn an_outage_is_one_line_and_each_span_is_counted_once() {
        let (lines, _guard) = LogLines::at(Level::INFO);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // At first each connection is turned away.
        let (come, mut comes) = tokio::sync::oneshot::channel::<()>();
        let away = tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = &mut comes => return listener,
                    accepted = listener.accept() => drop(accepted.unwrap()),
                }
            }
        });
        let (exported, dropped) = (Counter::default(), Counter::default());
        let queue = Arc::new(Queue::new(100, dropped.clone()));
        let to = Address::read(&address.to_string()).unwrap();
        let to = Collector::new(to, None, Headers::default()).unwrap();
        let mut telling = Telling {
            client: TraceServiceClient::new(to.reach()),
            queue: Arc::clone(&queue),
            resource: Resource::default(),
            exported: exported.clone(),
            pause: None,
        };
        let mut pauses = Vec::new();
        for _ in 0..7 {
            queue.offer(Ended::default());
            assert!(!telling.tell_batch().await);
            pauses.push(telling.pause.unwrap().as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!((exported.get(), dropped.get()), (0, 7));
        come.send(()).unwrap();
        let listener = away.await.unwrap();
        let server = Server::builder().add_service(TraceServiceServer::new(Picky));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        for _ in 0..3 {
            queue.offer(Ended::default());
        }
        assert!(telling.tell_batch().await);
        assert_eq!(telling.pause, None);
        assert_eq!((exported.get(), dropped.get()), (2, 8));
        let ours = |line: &serde_json::Value| {
            let event = line["event"].as_str().unwrap_or_default().to_owned();
            event.starts_with("otlp").then_some(event)
        };
        let events: Vec<_> = lines.all().iter().filter_map(ours).collect();
        assert_eq!(events, ["otlp_export_failed", "otlp_export_resumed"]);
    }
}
