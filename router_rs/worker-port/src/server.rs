//! The gRPC server on the port's thread.

use std::{net::TcpListener, sync::Arc, time::Instant};

use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic_health::pb::health_server::HealthServer;

use crate::{
    guard::Guard,
    health::WorkerHealth,
    incoming::{accept, incoming},
    service::{SERVICE, WorkerService},
    settings::Settings,
    shared::Shared,
};

/// Window of one stream and of one connection, bytes: a Place may be long.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// Serves until it is stopped.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    listener: TcpListener,
    health: WorkerHealth,
    mut stop: watch::Receiver<bool>,
    settings: Settings,
) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
        return;
    };
    let (accepted, incoming) = incoming();
    // h2 answers pings at any rate and holds none against a router, so those of
    // a silent prefill are permitted.
    // A router that vanished without a word is found by our own.
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(settings.keep_alive_interval))
        .http2_keepalive_timeout(Some(settings.keep_alive_timeout))
        .initial_stream_window_size(Some(STREAM_WINDOW))
        .initial_connection_window_size(Some(CONNECTION_WINDOW))
        .add_service(WorkerService {
            shared: Arc::clone(&shared),
            guard: Guard::new(&settings),
        })
        .add_service(HealthServer::new(health));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(kvmesh_wire::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(SERVICE)
            .with_service_name("grpc.health.v1.Health")
    };
    if let (Ok(v1), Ok(alpha)) = (reflection().build_v1(), reflection().build_v1alpha()) {
        server = server.add_service(v1).add_service(alpha);
    }
    let server = server.serve_with_incoming(ReceiverStream::new(incoming));
    let accepting = accept(listener, settings.tls.clone(), accepted);
    let ticks = async {
        let mut ticks = tokio::time::interval(settings.load_interval);
        loop {
            ticks.tick().await;
            shared.with(|state| state.tick(Instant::now()));
            shared.snapshots.notify_all();
        }
    };
    let followed = async {
        if let Some(token) = settings.token.clone() {
            token.follow_and_log(|_| {}).await;
        }
        std::future::pending::<()>().await;
    };
    let tls_followed = async {
        if let Some(tls) = settings.tls.clone() {
            tls.follow().await;
        }
        std::future::pending::<()>().await;
    };
    // An error is the sender's end: the port was dropped.
    tokio::select! {
        _ = server => {}
        () = ticks => {}
        () = accepting => {}
        () = followed => {}
        () = tls_followed => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}
