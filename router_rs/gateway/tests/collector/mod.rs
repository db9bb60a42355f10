//! A collector of spans that keeps what it is told.
#![allow(clippy::unwrap_used)]

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use kvmesh_testkit::certificates::Issued;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::Span,
};
use prost::Message;
use tokio::{
    net::TcpListener,
    sync::{OwnedRwLockWriteGuard, RwLock, mpsc, oneshot},
    task::JoinHandle,
};
use tonic::{
    Request, Response, Status,
    metadata::MetadataMap,
    transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming},
};

/// A trace that a client gives, of which spans are wanted.
pub(crate) const SAMPLED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Batches that it keeps unread; none of these tests makes as many.
const BATCHES: usize = 256;

pub(crate) struct Collector {
    address: SocketAddr,
    told: mpsc::Receiver<ExportTraceServiceRequest>,
    gate: Arc<RwLock<()>>,
    headers: Arc<Mutex<MetadataMap>>,
    bytes: Vec<u8>,
}

/// The address of a collector that is not there yet: each connection ends at once.
pub(crate) struct Away {
    address: SocketAddr,
    come: oneshot::Sender<()>,
    turning_away: JoinHandle<TcpListener>,
}

impl Away {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (come, mut comes) = oneshot::channel();
        let turning_away = tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = &mut comes => return listener,
                    accepted = listener.accept() => drop(accepted.unwrap()),
                }
            }
        });
        Self {
            address,
            come,
            turning_away,
        }
    }

    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// Now it is there.
    pub(crate) async fn come(self) -> Collector {
        self.come.send(()).unwrap();
        Collector::serve(self.turning_away.await.unwrap(), None)
    }
}

struct Service {
    told: mpsc::Sender<ExportTraceServiceRequest>,
    gate: Arc<RwLock<()>>,
    headers: Arc<Mutex<MetadataMap>>,
}

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        *self.headers.lock().unwrap() = request.metadata().clone();
        self.told.try_send(request.into_inner()).unwrap();
        let _open = self.gate.read().await;
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    pub(crate) async fn start() -> Self {
        Self::serve(TcpListener::bind("127.0.0.1:0").await.unwrap(), None)
    }

    /// One that speaks TLS alone.
    pub(crate) async fn start_secured(shows: &Issued) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::serve(listener, Some(shows))
    }

    fn serve(listener: TcpListener, shows: Option<&Issued>) -> Self {
        let address = listener.local_addr().unwrap();
        let (sender, told) = mpsc::channel(BATCHES);
        let gate = Arc::new(RwLock::new(()));
        let headers = Arc::default();
        let service = TraceServiceServer::new(Service {
            told: sender,
            gate: Arc::clone(&gate),
            headers: Arc::clone(&headers),
        });
        let mut server = Server::builder();
        if let Some(shows) = shows {
            let identity = Identity::from_pem(&shows.certificate, &shows.key);
            let tls = ServerTlsConfig::new().identity(identity);
            server = server.tls_config(tls).unwrap();
        }
        let server = server.add_service(service);
        // Ends with the test's runtime.
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        Self {
            address,
            told,
            gate,
            headers,
            bytes: Vec::new(),
        }
    }

    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// While this is held, nothing is answered.
    pub(crate) fn hold(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.gate).try_write_owned().unwrap()
    }

    /// The spans of the next batch: those of one request where a test asks one after
    /// the other.
    pub(crate) async fn request(&mut self) -> Vec<Span> {
        let batch = self.told.recv().await.unwrap();
        self.keep(batch)
    }

    /// The spans that were told and not looked at yet.
    pub(crate) fn all(&mut self) -> Vec<Span> {
        let mut spans = Vec::new();
        while let Ok(batch) = self.told.try_recv() {
            spans.extend(self.keep(batch));
        }
        spans
    }

    fn keep(&mut self, batch: ExportTraceServiceRequest) -> Vec<Span> {
        self.bytes.extend(batch.encode_to_vec());
        let resources = batch.resource_spans.into_iter();
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        scopes.flat_map(|scope| scope.spans).collect()
    }

    /// A header of the last call.
    pub(crate) fn header(&self, name: &str) -> Option<String> {
        let headers = self.headers.lock().unwrap();
        Some(headers.get(name)?.to_str().unwrap().to_owned())
    }

    /// All that was looked at, as it came.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

fn value(span: &Span, key: &str) -> Value {
    let named = span.attributes.iter().find(|one| one.key == key);
    let value = named.and_then(|one| one.value.clone()?.value);
    value.unwrap_or_else(|| panic!("{} has no {key}", span.name))
}

/// An attribute that is a text, or a list of one.
pub(crate) fn text(span: &Span, key: &str) -> String {
    match value(span, key) {
        Value::StringValue(text) => text,
        Value::ArrayValue(mut array) => {
            assert_eq!(array.values.len(), 1);
            match array.values.remove(0).value {
                Some(Value::StringValue(text)) => text,
                other => panic!("{key} is {other:?}"),
            }
        }
        other => panic!("{key} is {other:?}"),
    }
}

/// An attribute that is a whole number.
pub(crate) fn int(span: &Span, key: &str) -> i64 {
    match value(span, key) {
        Value::IntValue(number) => number,
        other => panic!("{key} is {other:?}"),
    }
}

/// A call below a client's span.
pub(crate) fn below<T>(traceparent: &str, message: T) -> tonic::Request<T> {
    let mut call = tonic::Request::new(message);
    let value = traceparent.parse().unwrap();
    call.metadata_mut().insert("traceparent", value);
    call
}

/// An id of a trace or span, as a `traceparent` has it.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
