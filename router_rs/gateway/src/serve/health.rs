//! `grpc.health.v1`: whether this router takes calls. Nothing here waits for a
//! model, a worker or etcd.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use http_body::Frame;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic_health::pb::{HealthCheckResponse, health_check_response::ServingStatus};

use super::grpc;
use crate::vllm;

/// Services that can be asked for; the empty name is the whole server.
const SERVICES: [&str; 6] = [
    "",
    "kvmesh.v1.Inference",
    "kvmesh.v1.Admin",
    vllm::ENGINE,
    vllm::INFERENCE,
    vllm::CONTROL,
];

/// Whether this router serves.
#[derive(Debug)]
pub(crate) struct Health(watch::Sender<bool>);

impl Default for Health {
    fn default() -> Self {
        Self(watch::Sender::new(true))
    }
}

impl Health {
    /// From now on: NOT_SERVING.
    pub(crate) fn stop_serving(&self) {
        self.0.send_replace(false);
    }

    pub(crate) fn serves(&self) -> bool {
        *self.0.borrow()
    }

    /// The answer of Check; `None` for a service that is not known.
    pub(crate) fn check(&self, service: &str) -> Option<HealthCheckResponse> {
        SERVICES
            .contains(&service)
            .then(|| response(status(self.serves())))
    }

    /// The answer of Watch, for an unknown service too: it could come.
    pub(crate) fn watch(&self, service: &str) -> Watch {
        Watch {
            known: SERVICES.contains(&service),
            changes: WatchStream::new(self.0.subscribe()),
            told: false,
        }
    }
}

fn status(serves: bool) -> ServingStatus {
    if serves {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status.into(),
    }
}

/// A watch: the state now and every change of it, until the client goes.
pub(crate) struct Watch {
    known: bool,
    changes: WatchStream<bool>,
    told: bool,
}

impl Watch {
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        let status = if self.known {
            match Pin::new(&mut self.changes).poll_next(cx) {
                Poll::Ready(Some(serves)) => status(serves),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        } else {
            // Told once; the stream then stays open, silent.
            loop {
                match self.changes.poll_next_unpin(cx) {
                    Poll::Ready(Some(_)) if !self.told => break,
                    Poll::Ready(Some(_)) => {}
                    Poll::Ready(None) => return Poll::Ready(None),
                    Poll::Pending => return Poll::Pending,
                }
            }
            self.told = true;
            ServingStatus::ServiceUnknown
        };
        let mut data = BytesMut::new();
        grpc::encode_into(&response(status), &mut data);
        Poll::Ready(Some(Frame::data(data.freeze())))
    }
}
