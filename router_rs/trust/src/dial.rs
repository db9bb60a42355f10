//! Calls to workers: what is shown with each one, and who has to be there.

use std::{
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Request, Status,
    codegen::http::Uri,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use tower::{ServiceExt as _, service_fn};

use crate::{
    followed::Followed,
    identity::Identity,
    tls::WorkerTls,
    token::{ClusterToken, TOKEN_HEADER},
};

/// What was sent to a worker and its machine has not acknowledged for so long ends the
/// connection. A way that is cut in this direction alone shows in nothing else: frames still
/// come, and who sends to such a peer resends less and less often, so that it would not be
/// reached for as long again once the way is whole. As long as a silent worker is waited for.
pub const UNACKNOWLEDGED: Duration = Duration::from_secs(3);

/// A connection over which calls show what they have to.
pub type Dialled = InterceptedService<Channel, Shown>;

/// What workers are shown, and what they have to show.
#[derive(Clone, Debug, Default)]
pub struct Dialer {
    /// The cluster's token.
    pub token: Option<Arc<Followed<ClusterToken>>>,
    /// TLS; `None`: calls go in plain text.
    pub tls: Option<WorkerTls>,
}

/// A connection to a worker.
#[derive(Clone, Debug)]
pub struct Connection {
    /// For clients of its services.
    pub calls: Dialled,
    /// The worker's id by its certificate; `None` without TLS.
    pub certified: Option<String>,
}

impl Dialer {
    /// Connects to a worker. `worker_id`: where another one answers there, there is
    /// no connection; only TLS tells.
    ///
    /// # Errors
    /// Where it cannot be reached, or its certificate does not do.
    pub async fn connect(
        &self,
        endpoint: Endpoint,
        worker_id: Option<&str>,
    ) -> Result<Connection, tonic::transport::Error> {
        let (channel, certified) = match &self.tls {
            None => {
                let mut connector = plain();
                connector.set_connect_timeout(endpoint.get_connect_timeout());
                (endpoint.connect_with_connector(connector).await?, None)
            }
            Some(tls) => {
                let answers = Answers {
                    config: tls.config(worker_id).map_err(|error| error.to_string()),
                    cluster: tls.cluster().to_owned(),
                    certified: OnceLock::new(),
                };
                let answers = Arc::new(answers);
                let dialled = Arc::clone(&answers);
                let connector = service_fn(move |uri: Uri| Arc::clone(&dialled).dial(uri));
                let channel = endpoint.connect_with_connector(connector).await?;
                (channel, answers.certified.get().cloned())
            }
        };
        Ok(Connection {
            calls: InterceptedService::new(channel, Shown(self.token.clone())),
            certified,
        })
    }

    /// Takes changed files, for as long as it is polled.
    pub async fn follow(self) {
        let token = async {
            if let Some(token) = self.token {
                token.follow_and_log(|_| {}).await;
            }
        };
        let tls = async {
            if let Some(tls) = self.tls {
                tls.follow().await;
            }
        };
        tokio::join!(token, tls);
    }
}

/// Dials TCP. Nagle's algorithm is off: a frame that waits for an acknowledgement costs 40 ms.
fn plain() -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    connector
}

/// A dial over TLS, and who answered.
struct Answers {
    config: Result<ClientConfig, String>,
    cluster: String,
    certified: OnceLock<String>,
}

impl Answers {
    async fn dial(self: Arc<Self>, uri: Uri) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
        let config = self.config.clone().map_err(io::Error::other)?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let host = host.to_owned();
        let stream = plain().oneshot(uri).await.map_err(io::Error::other)?;
        let stream = stream.into_inner();
        // Not sent and not compared: a worker is known by its id.
        let name = ServerName::try_from(host)
            .unwrap_or_else(|_| ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into()));
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, stream).await?;
        let shown = stream.get_ref().1.peer_certificates();
        if let Some(certificate) = shown.and_then(<[_]>::first) {
            let identity = Identity::read(certificate, &self.cluster).map_err(io::Error::other)?;
            // Again: of another connection in place of the first, which was to the
            // same worker.
            let _ = self.certified.set(identity.id);
        }
        Ok(TokioIo::new(stream))
    }
}

/// Adds the cluster's token to a call.
#[derive(Clone, Debug)]
pub struct Shown(Option<Arc<Followed<ClusterToken>>>);

impl Interceptor for Shown {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            let shown = token.now().shown().clone();
            request.metadata_mut().insert(TOKEN_HEADER, shown);
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use socket2::SockRef;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn what_nobody_acknowledges_ends_the_connection_in_time() -> Result<(), Box<dyn Error>> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let uri: Uri = format!("http://{}", listener.local_addr()?).parse()?;
        let stream = plain().oneshot(uri).await?.into_inner();
        assert!(stream.nodelay()?);
        let bound = SockRef::from(&stream).tcp_user_timeout()?;
        assert_eq!(bound, Some(UNACKNOWLEDGED));
        Ok(())
    }
}
