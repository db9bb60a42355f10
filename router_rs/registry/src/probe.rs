//! Does the worker behind a record still answer?

use std::{future::Future, io, pin::Pin, time::Duration};

use http::uri::PathAndQuery;
use kvmesh_trust::Dialer;
use kvmesh_wire::v1::{GetInfoRequest, GetInfoResponse, WorkerRecord};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tonic::{Request, transport::Endpoint};
use tonic_prost::ProstCodec;

/// What an HTTP/2 client says first (RFC 9113, 3.4), with no settings.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Says whether the worker behind a record is alive, so that its id may not be
/// taken by another.
pub trait Probe: Send + Sync + 'static {
    /// Whether the incarnation that the record names answers at its address.
    fn is_alive<'a>(
        &'a self,
        record: &'a WorkerRecord,
    ) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>>;
}

/// Asks the worker itself: `kvmesh.v1.Worker/GetInfo` at its address. Whoever is there and
/// does not say that it is another one counts as it: a worker that cannot speak with it,
/// for its certificates or the want of them, takes no id by that.
#[derive(Debug, Clone)]
pub struct GetInfoProbe {
    /// Longest wait for its answer, and for the connection.
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

    /// Whether somebody is there: says anything, be it that TLS was expected or another
    /// protocol, or keeps the connection. A proxy whose worker is gone closes it without a
    /// word.
    async fn is_there(&self, address: &str) -> bool {
        let connected = timeout(self.timeout, TcpStream::connect(address)).await;
        let Ok(Ok(mut stream)) = connected else {
            return false;
        };
        let said: Result<io::Result<usize>, _> = timeout(self.timeout, async {
            stream.write_all(PREFACE).await?;
            stream.read(&mut [0]).await
        })
        .await;
        said.map_or(true, |said| said.is_ok_and(|bytes| bytes > 0))
    }
}

impl Probe for GetInfoProbe {
    fn is_alive<'a>(
        &'a self,
        record: &'a WorkerRecord,
    ) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>> {
        Box::pin(async move {
            match timeout(self.timeout, self.ask(record)).await {
                Ok(Ok(info)) => info
                    .record
                    .is_some_and(|found| found.incarnation == record.incarnation),
                // It will not say who it is, or cannot be understood.
                Ok(Err(_)) | Err(_) => self.is_there(&record.address).await,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tokio::net::TcpListener;

    use super::*;

    /// What is said of an address at which each connection gets this answer; `None`: none.
    async fn told(answer: Option<&'static [u8]>) -> bool {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let record = WorkerRecord {
            worker_id: "d".to_owned(),
            incarnation: 1,
            address: listener.local_addr().unwrap().to_string(),
            ..WorkerRecord::default()
        };
        let there = tokio::spawn(async move {
            let mut held = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                match answer {
                    None => held.push(stream),
                    Some(answer) => {
                        let mut asked = [0; 64];
                        let _ = stream.read(&mut asked).await;
                        let _ = stream.write_all(answer).await;
                    }
                }
            }
        });
        let probe = GetInfoProbe {
            timeout: Duration::from_millis(200),
            ..GetInfoProbe::default()
        };
        let alive = probe.is_alive(&record).await;
        there.abort();
        alive
    }

    #[tokio::test]
    async fn whoever_answers_keeps_the_id_whatever_it_speaks() {
        // A TLS alert: an unexpected message.
        assert!(told(Some(&[21, 3, 3, 0, 2, 2, 10])).await);
        assert!(told(Some(b"HTTP/1.1 400 Bad Request\r\n\r\n")).await);
        // A process that stands still.
        assert!(told(None).await);
        // A proxy before nobody.
        assert!(!told(Some(b"")).await);
    }

    #[tokio::test]
    async fn where_nobody_listens_nobody_is() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let record = WorkerRecord {
            address: listener.local_addr().unwrap().to_string(),
            ..WorkerRecord::default()
        };
        drop(listener);
        assert!(!GetInfoProbe::default().is_alive(&record).await);
    }
}
