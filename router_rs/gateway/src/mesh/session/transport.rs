//! A worker's connection, from its dial to the two hellos.

use std::time::Duration;

use kvmesh_rpc::v1::worker_client::WorkerClient;
use kvmesh_session::{
    PROTOCOL_VERSION, Violation,
    link::{self, Action, Event, State},
    parse,
};
use kvmesh_wire::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

use super::{COMMAND_QUEUE, REDIAL, Session};

/// Why a session's transport ended.
pub(super) enum Ended {
    /// The router is shutting down or the worker was taken off the table.
    Stopped,
    /// The connection is gone.
    Transport(String),
    /// The worker broke the protocol.
    Violation(Violation),
}

/// An open stream with a worker.
pub(super) struct Transport {
    pub(super) inbound: Streaming<v1::WorkerFrame>,
    pub(super) outbound: mpsc::Sender<v1::RouterFrame>,
}

impl Session {
    /// Opens connection and stream, and takes the worker's hello.
    pub(super) async fn greet(&mut self) -> Result<Transport, Ended> {
        let transport_error = |error: &dyn std::error::Error| {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            Ended::Transport(text)
        };
        let channel = connect(&self.worker.address(), self.core.settings.keep_alive)
            .await
            .map_err(|error| transport_error(&error))?;
        let (outbound, frames) = mpsc::channel(COMMAND_QUEUE);
        let actions = self.link.apply(Event::Opened).map_err(Ended::Violation)?;
        for action in &actions {
            if let Action::SendHello {
                known_incarnation,
                known_event,
            } = action
            {
                let hello = self.hello_frame(*known_incarnation, *known_event);
                // The queue is new and empty.
                let _ = outbound.try_send(hello);
            }
        }
        let mut inbound = WorkerClient::new(channel)
            .attach(ReceiverStream::new(frames))
            .await
            .map_err(|status| Ended::Transport(status.message().to_owned()))?
            .into_inner();
        let first = next_frame(&mut inbound).await?;
        let hello = parse::hello(first).map_err(Ended::Violation)?;
        let table = &self.core.table;
        if table.drop_double(&self.worker, &hello.record.worker_id) {
            // The entry of the registry keeps its session, or dials again.
            self.worker.stop.cancel();
            return Err(Ended::Stopped);
        }
        let actions = self
            .link
            .apply(Event::Hello(&hello))
            .map_err(Ended::Violation)?;
        if let State::Refused(mismatch) = self.link.state() {
            let why = mismatch.to_string();
            self.perform(actions);
            return Err(Ended::Transport(why));
        }
        self.worker.greeted(&hello);
        self.core.worker_greeted(&self.worker, &hello);
        self.perform(actions);
        self.redial = REDIAL.0;
        Ok(Transport { inbound, outbound })
    }

    fn hello_frame(&self, known_incarnation: u64, known_event: u64) -> v1::RouterFrame {
        let settings = &self.core.settings;
        let hello = v1::RouterHello {
            version: Some(v1::ProtocolVersion {
                major: PROTOCOL_VERSION.0,
                minor: PROTOCOL_VERSION.1,
            }),
            router_id: settings.router_id.clone(),
            router_incarnation: settings.incarnation,
            known_worker_incarnation: known_incarnation,
            known_event,
            // A lost session ends its streams: nothing is reattached yet.
            reattach: Vec::new(),
        };
        v1::RouterFrame {
            number: 0,
            frame: Some(v1::router_frame::Frame::Hello(hello)),
        }
    }
}

pub(super) async fn next_frame(
    inbound: &mut Streaming<v1::WorkerFrame>,
) -> Result<v1::WorkerFrame, Ended> {
    match inbound.message().await {
        Ok(Some(frame)) => Ok(frame),
        Ok(None) => Err(Ended::Transport("closed by the worker".to_owned())),
        Err(status) => Err(Ended::Transport(status.message().to_owned())),
    }
}

/// Opens a connection to a worker. Nagle's algorithm is off: a frame that
/// waits for an acknowledgement costs 40 ms.
pub(in crate::mesh) async fn connect(
    address: &str,
    keep_alive: Duration,
) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from_shared(format!("http://{address}"))?
        .tcp_nodelay(true)
        .connect_timeout(Duration::from_millis(link::GREETING_MS))
        .http2_keep_alive_interval(keep_alive)
        .keep_alive_while_idle(true)
        .keep_alive_timeout(keep_alive)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .connect()
        .await
}
