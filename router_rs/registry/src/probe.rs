//! Does the worker behind a record still answer?

use std::{future::Future, pin::Pin, time::Duration};

use http::uri::PathAndQuery;
use kvmesh_trust::Dialer;
use kvmesh_wire::v1::{GetInfoRequest, GetInfoResponse, WorkerRecord};
use tonic::{Code, Request, transport::Endpoint};
use tonic_prost::ProstCodec;

/// Says whether the worker behind a record is alive, so that its id may not be
/// taken by another.
pub trait Probe: Send + Sync + 'static {
    /// Whether the incarnation that the record names answers at its address.
    fn is_alive<'a>(
        &'a self,
        record: &'a WorkerRecord,
    ) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>>;
}

/// Asks the worker itself: `kvmesh.v1.Worker/GetInfo` at its address.
#[derive(Debug, Clone)]
pub struct GetInfoProbe {
    /// Longest wait for its answer.
    pub timeout: Duration,
    /// What it is shown.
    pub dialer: Dialer,
}

impl Default for GetInfoProbe {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(2),
            dialer: Dialer::default(),
        }
    }
}

impl GetInfoProbe {
    async fn ask(&self, record: &WorkerRecord) -> Result<GetInfoResponse, tonic::Status> {
        let endpoint = Endpoint::from_shared(format!("http://{}", record.address))
            .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let connection = self
            .dialer
            .connect(endpoint, Some(&record.worker_id))
            .await
            .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let mut client = tonic::client::Grpc::new(connection.calls);
        client
            .ready()
            .await
            .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let path = PathAndQuery::from_static("/kvmesh.v1.Worker/GetInfo");
        let codec = ProstCodec::<GetInfoRequest, GetInfoResponse>::default();
        let request = Request::new(GetInfoRequest::default());
        Ok(client.unary(request, path, codec).await?.into_inner())
    }
}

impl Probe for GetInfoProbe {
    fn is_alive<'a>(
        &'a self,
        record: &'a WorkerRecord,
    ) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>> {
        Box::pin(async move {
            match tokio::time::timeout(self.timeout, self.ask(record)).await {
                Err(_) => false,
                Ok(Ok(info)) => info
                    .record
                    .is_some_and(|found| found.incarnation == record.incarnation),
                // Something answers but will not say who it is: its id is not
                // taken from it.
                Ok(Err(status)) => !matches!(
                    status.code(),
                    Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
                ),
            }
        })
    }
}
