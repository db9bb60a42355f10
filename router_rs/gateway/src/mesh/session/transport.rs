//! A worker's connection, from its dial to the two hellos.

use std::{error::Error as _, io, sync::Arc, time::Duration};

use kvmesh_rpc::v1::worker_client::WorkerClient;
use kvmesh_session::{
    PROTOCOL_VERSION, Violation,
    link::{self, Action, Event, State},
    parse,
};
use kvmesh_trust::Connection;
use kvmesh_wire::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use super::{OUTBOUND_QUEUE, REDIAL, Session, at};
use crate::mesh::{settings::MeshSettings, table::WorkerEntry};

// A worker that hears nothing is given up as soon as one that says nothing.
const _: () = assert!(kvmesh_trust::UNACKNOWLEDGED.as_millis() == link::LOST_MS as u128);

/// Why a session's transport ended.
pub(super) enum Ended {
    /// The router is shutting down or the worker was taken off the table.
    Stopped,
    /// The connection is gone.
    Transport(String),
    /// Nobody listens at the worker's address.
    Refused(String),
    /// The worker broke the protocol.
    Violation(Violation),
}

/// An open stream with a worker.
pub(super) struct Transport {
    pub(super) inbound: Streaming<v1::WorkerFrame>,
    pub(super) outbound: mpsc::Sender<v1::RouterFrame>,
    /// The worker's id by its certificate; `None` without TLS.
    certified: Option<String>,
}

impl Session {
    /// Opens connection and stream, and takes the worker's hello.
    pub(super) async fn greet(&mut self) -> Result<Transport, Ended> {
        self.feed(Event::Dial);
        let actions = self.link.apply(Event::Opened).map_err(Ended::Violation)?;
        let mut hello = None;
        for action in &actions {
            if let Action::SendHello {
                known_incarnation,
                known_event,
            } = action
            {
                hello = Some(self.hello_frame(*known_incarnation, *known_event));
            }
        }
        let hello = hello.ok_or_else(|| Ended::Transport("not to be dialled".to_owned()))?;
        let (core, worker) = (Arc::clone(&self.core), Arc::clone(&self.worker));
        let opened = open(&core.settings, &worker, hello);
        tokio::pin!(opened);
        let limit = tokio::time::sleep(Duration::from_millis(link::GREETING_MS));
        tokio::pin!(limit);
        let (transport, first) = loop {
            let grace = self.reattach_at;
            tokio::select! {
                opened = &mut opened => break opened?,
                () = &mut limit => {
                    return Err(Ended::Transport("no hello within its time".to_owned()));
                }
                () = at(grace) => self.grace_is_over(),
            }
        };
        let hello = parse::hello(first).map_err(Ended::Violation)?;
        let told = &hello.record.worker_id;
        if let Some(certified) = transport.certified.as_ref().filter(|id| *id != told) {
            let why = format!("its certificate is of worker {certified}, its hello of {told}");
            return Err(Ended::Transport(why));
        }
        let table = &self.core.table;
        if table.drop_double(&self.worker, &hello.record.worker_id) {
            // The entry of the registry keeps its session, or dials again.
            self.worker.stop.cancel();
            return Err(Ended::Stopped);
        }
        let before = self.link.incarnation();
        let actions = self
            .link
            .apply(Event::Hello(&hello))
            .map_err(Ended::Violation)?;
        if let State::Refused(mismatch) = self.link.state() {
            let why = mismatch.to_string();
            self.perform(actions);
            return Err(Ended::Transport(why));
        }
        self.kept.clone_from(&hello.reattached);
        self.worker.greeted(&hello);
        self.core.worker_greeted(&self.worker, &hello);
        if self.link.incarnation() != before {
            // It may have had another model before.
            self.core.forget_models();
        }
        self.perform(actions);
        self.redial = REDIAL.0;
        Ok(transport)
    }

    fn hello_frame(&mut self, known_incarnation: u64, known_event: u64) -> v1::RouterFrame {
        let reattach = self.name_what_runs();
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
            reattach,
        };
        v1::RouterFrame {
            number: 0,
            frame: Some(v1::router_frame::Frame::Hello(hello)),
        }
    }
}

/// Opens connection and stream, says hello and takes the first frame.
async fn open(
    settings: &MeshSettings,
    worker: &WorkerEntry,
    hello: v1::RouterFrame,
) -> Result<(Transport, v1::WorkerFrame), Ended> {
    let connection = connect(settings, worker).await.map_err(failed)?;
    let (outbound, frames) = mpsc::channel(OUTBOUND_QUEUE);
    // The queue is new and empty.
    let _ = outbound.try_send(hello);
    let mut inbound = WorkerClient::new(connection.calls)
        .attach(ReceiverStream::new(frames))
        .await
        .map_err(|status| Ended::Transport(status.message().to_owned()))?
        .into_inner();
    let first = next_frame(&mut inbound).await?;
    let transport = Transport {
        inbound,
        outbound,
        certified: connection.certified,
    };
    Ok((transport, first))
}

/// A connection that did not open, with its causes.
fn failed(error: tonic::transport::Error) -> Ended {
    let mut text = error.to_string();
    let mut refused = false;
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        refused |= cause
            .downcast_ref::<io::Error>()
            .is_some_and(|cause| cause.kind() == io::ErrorKind::ConnectionRefused);
        source = cause.source();
    }
    match refused {
        true => Ended::Refused(text),
        false => Ended::Transport(text),
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

/// Opens a connection to a worker, and to no other where TLS tells. What it does not acknowledge
/// in [`kvmesh_trust::UNACKNOWLEDGED`] ends it.
pub(in crate::mesh) async fn connect(
    settings: &MeshSettings,
    worker: &WorkerEntry,
) -> Result<Connection, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{}", worker.address()))?
        .connect_timeout(Duration::from_millis(link::GREETING_MS))
        .http2_keep_alive_interval(settings.keep_alive)
        .keep_alive_while_idle(true)
        .keep_alive_timeout(settings.keep_alive)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20);
    let worker_id = worker.expected_id.as_deref();
    settings.dialer.connect(endpoint, worker_id).await
}
