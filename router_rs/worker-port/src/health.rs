//! `grpc.health.v1` of a worker.

use std::pin::Pin;

use futures_util::{Stream, StreamExt};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_server::Health,
};

use crate::service::SERVICE;

/// Whether the worker serves: of the whole server and of its service alike.
#[derive(Clone, Debug)]
pub(crate) struct WorkerHealth(pub(crate) watch::Receiver<bool>);

fn is_known(service: &str) -> bool {
    service.is_empty() || service == SERVICE
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status.into(),
    }
}

fn told(serves: bool) -> HealthCheckResponse {
    answer(if serves {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    })
}

type Answers = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Health for WorkerHealth {
    type WatchStream = Answers;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        if !is_known(&request.get_ref().service) {
            return Err(Status::not_found("unknown service"));
        }
        let serves = *self.0.borrow();
        Ok(Response::new(told(serves)))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Answers>, Status> {
        let changes = WatchStream::new(self.0.clone());
        let answers: Answers = if is_known(&request.get_ref().service) {
            Box::pin(changes.map(|serves| Ok(told(serves))))
        } else {
            // It could come: told once, and then the stream stays open, silent.
            let unknown = answer(ServingStatus::ServiceUnknown);
            let first = tokio_stream::once(Ok(unknown));
            Box::pin(first.chain(tokio_stream::pending()))
        };
        Ok(Response::new(answers))
    }
}
