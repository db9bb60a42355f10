//! The accept loop: connections, their protocol, their age, their end.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use http::{Request, Response};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use kvmesh_trust::Followed;
use rustls::ServerConfig;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    body::ResponseBody,
    calls::{CallEnd, Carrier},
    io::Prefixed,
    lazily::Lazily,
    one_call::{OneCall, Running},
    port::Port,
    resets::Resets,
    service::Shared,
};
use crate::settings::Settings;

/// First bytes of HTTP/2 with prior knowledge (RFC 9113, 3.4). No HTTP/1
/// request begins so.
const PREFACE: &[u8] = b"PRI ";
/// Pause after an accept that failed for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Probes of TCP that go unanswered before a peer is taken for gone.
const PROBES: u32 = 3;
/// Connections that wait to be accepted.
const BACKLOG: u32 = 4_096;

/// Binds the listening socket.
pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(i32::try_from(BACKLOG).unwrap_or(i32::MAX))?;
    TcpListener::from_std(socket.into())
}

/// What connections are held to.
#[derive(Clone, Debug)]
struct Limits {
    handshake: Duration,
    /// Between two calls over HTTP/1.1.
    idle: Duration,
    keep_alive: (Duration, Duration),
    slow_client: Duration,
    age: Duration,
    age_grace: Duration,
    streams: u32,
    resets: usize,
}

/// Accepts connections until it is stopped.
pub(crate) struct Acceptor {
    listener: TcpListener,
    port: Port,
    tls: Option<Arc<Followed<ServerConfig>>>,
    shared: Arc<Shared>,
    limits: Limits,
    connections: Arc<Semaphore>,
}

impl Acceptor {
    pub(crate) fn new(
        (listener, port): (TcpListener, Port),
        settings: &Settings,
        shared: Arc<Shared>,
        tls: Option<Arc<Followed<ServerConfig>>>,
    ) -> Self {
        let limits = Limits {
            handshake: settings.handshake_timeout,
            idle: settings.http1_idle_timeout,
            keep_alive: (settings.keep_alive_interval, settings.keep_alive_timeout),
            slow_client: settings.slow_client_timeout,
            age: settings.max_connection_age,
            age_grace: settings.max_connection_age_grace,
            streams: settings.max_streams_per_connection,
            resets: settings.max_reset_streams,
        };
        let connections = Arc::new(Semaphore::new(settings.max_connections));
        Self {
            listener,
            port,
            tls,
            shared,
            limits,
            connections,
        }
    }

    /// Accepts until `stop`; connections then get GOAWAY and end with their
    /// calls. `tasks` holds them all.
    pub(crate) async fn run(self, stop: CancellationToken, tasks: TaskTracker) {
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(event = "accept_failed", %error);
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else {
                self.shared.telemetry.connection_rejected();
                continue;
            };
            let connection = Connection {
                origin: (peer, self.port),
                shared: Arc::clone(&self.shared),
                limits: self.limits.clone(),
                stop: stop.clone(),
            };
            // What is in force now; connections that are open keep what they began with.
            let tls = self.tls.as_ref().map(|tls| TlsAcceptor::from(tls.now()));
            tasks.spawn(async move {
                let telemetry = Arc::clone(&connection.shared.telemetry);
                telemetry.connection_opened();
                if let Err(error) = connection.run(stream, tls).await {
                    tracing::debug!(event = "connection_ended", %peer, %error);
                }
                telemetry.connection_closed();
                drop(permit);
            });
        }
    }
}

pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;

struct Connection {
    origin: (SocketAddr, Port),
    shared: Arc<Shared>,
    limits: Limits,
    stop: CancellationToken,
}

impl Connection {
    async fn run(self, stream: TcpStream, tls: Option<TlsAcceptor>) -> Result<(), BoxError> {
        prepare(&stream, &self.limits)?;
        match tls {
            None => self.detect(stream, None).await,
            Some(acceptor) => {
                let stream = timeout(self.limits.handshake, acceptor.accept(stream)).await??;
                let http2 = stream.get_ref().1.alpn_protocol().map(|name| name == b"h2");
                self.detect(stream, http2).await
            }
        }
    }

    /// HTTP/2 or HTTP/1, told by ALPN or by the first bytes.
    async fn detect<S>(self, mut stream: S, told: Option<bool>) -> Result<(), BoxError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut first = BytesMut::with_capacity(256);
        let http2 = match told {
            Some(http2) => http2,
            None => {
                let read = async {
                    while first.len() < PREFACE.len() && PREFACE.starts_with(&first) {
                        if stream.read_buf(&mut first).await? == 0 {
                            break;
                        }
                    }
                    io::Result::Ok(())
                };
                tokio::select! {
                    read = timeout(self.limits.handshake, read) => read??,
                    () = self.stop.cancelled() => return Ok(()),
                }
                first.starts_with(PREFACE)
            }
        };
        let stream = Prefixed::new(stream, Bytes::from(first));
        if http2 {
            let resets = Resets::default();
            let socket = TokioIo::new(stream.watched(resets.clone()));
            self.http2(socket, resets).await
        } else {
            self.http1(TokioIo::new(stream)).await
        }
    }

    /// Answers requests; `begin` tells of each one and gives what can end it.
    fn service(
        &self,
        begin: impl Fn() -> CallEnd + Clone,
    ) -> impl Fn(Request<Incoming>) -> Answer + Clone {
        let (shared, origin) = (Arc::clone(&self.shared), self.origin);
        move |request| {
            let answer = Arc::clone(&shared).answer(request, origin, begin());
            Box::pin(answer.map(Ok))
        }
    }

    async fn http2<S>(&self, socket: S, resets: Resets) -> Result<(), BoxError>
    where
        S: hyper::rt::Read + hyper::rt::Write + Unpin + 'static,
    {
        let mut connection = Carrier::new(resets, |calls| {
            let begin = {
                let calls = calls.clone();
                move || calls.begin()
            };
            http2::Builder::new(calls)
                .timer(TokioTimer::new())
                // h2 answers every ping and holds none against a client, so
                // pings in a silent prefill are permitted at any rate.
                .keep_alive_interval(self.limits.keep_alive.0)
                .keep_alive_timeout(self.limits.keep_alive.1)
                .max_concurrent_streams(self.limits.streams)
                .max_pending_accept_reset_streams(self.limits.resets)
                // Resets that we cause: a client cannot raise them without
                // bound, since each needs a stream of its own within the limit
                // above.
                .max_local_error_reset_streams(self.limits.resets)
                .initial_stream_window_size(1 << 20)
                .initial_connection_window_size(4 << 20)
                .max_header_list_size(32 << 10)
                .serve_connection(socket, service_fn(self.service(begin)))
        });
        tokio::select! {
            biased;
            ended = &mut connection => return Ok(ended?),
            () = Lazily::new(self.time_to_go()) => connection.connection().graceful_shutdown(),
        }
        self.last_calls(connection).await
    }

    async fn http1<S>(&self, socket: S) -> Result<(), BoxError>
    where
        S: hyper::rt::Read + hyper::rt::Write + Unpin + 'static,
    {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            // hyper's clock runs from the end of a call to the last header of the next one.
            .header_read_timeout(self.limits.idle);
        let mut connection = OneCall::new(|call| {
            let service = service_fn(self.service(move || call.begin()));
            builder.serve_connection(socket, service)
        });
        let call = connection.call();
        let ends = async {
            tokio::select! {
                () = self.time_to_go() => Ok(()),
                () = self.silent(&call) => Err("no call came with the connection"),
            }
        };
        tokio::select! {
            biased;
            ended = &mut connection => return ended,
            ends = Lazily::new(ends) => ends?,
        }
        connection.connection().graceful_shutdown();
        self.last_calls(connection).await
    }

    /// The time that a new connection has for its first call has passed without one.
    async fn silent(&self, call: &Running) {
        tokio::time::sleep(self.limits.handshake).await;
        if call.has_begun() {
            std::future::pending::<()>().await;
        }
    }

    /// Shutdown, or age: jittered, so that clients do not come back at once.
    async fn time_to_go(&self) {
        if self.limits.age.is_zero() {
            return self.stop.cancelled().await;
        }
        let age = self.limits.age.mul_f64(rand::random_range(0.9..1.1));
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(age) => {}
        }
    }

    /// Lets the calls of a connection end. At shutdown the mesh bounds them,
    /// else the grace of an aged connection does.
    async fn last_calls<E>(
        &self,
        connection: impl Future<Output = Result<(), E>>,
    ) -> Result<(), BoxError>
    where
        BoxError: From<E>,
    {
        let grace = async {
            if self.stop.is_cancelled() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(self.limits.age_grace).await;
        };
        tokio::select! {
            ended = connection => Ok(ended?),
            () = grace => Err("calls outlived the connection's grace".into()),
        }
    }
}

/// HTTP/2 pings its peers; of HTTP/1.1 only TCP can tell that one has vanished without a
/// word. It asks as often and waits as long. What was sent and is not acknowledged, or what
/// a window of zero holds back, has the time of a client that takes nothing.
fn prepare(stream: &TcpStream, limits: &Limits) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (interval, answer) = limits.keep_alive;
    // Whole seconds for the kernel, and not 0.
    let second = Duration::from_secs(1);
    let probes = TcpKeepalive::new()
        .with_time(interval.max(second))
        .with_interval((answer / PROBES).max(second))
        .with_retries(PROBES);
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&probes)?;
    socket.set_tcp_user_timeout(Some(limits.slow_client.max(interval + answer)))
}

type Answer = std::pin::Pin<
    Box<dyn Future<Output = Result<Response<ResponseBody>, std::convert::Infallible>> + Send>,
>;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tcp_asks_after_peers_that_nothing_else_asks_after() -> io::Result<()> {
        let limits = Limits {
            handshake: Duration::ZERO,
            idle: Duration::ZERO,
            keep_alive: (Duration::from_secs(30), Duration::from_secs(20)),
            slow_client: Duration::from_secs(10),
            age: Duration::ZERO,
            age_grace: Duration::ZERO,
            streams: 1,
            resets: 1,
        };
        let listener = bind(([127, 0, 0, 1], 0).into())?;
        let _client = TcpStream::connect(listener.local_addr()?).await?;
        let (stream, _) = listener.accept().await?;
        prepare(&stream, &limits)?;
        assert!(stream.nodelay()?);
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive()?);
        assert_eq!(socket.tcp_keepalive_time()?, Duration::from_secs(30));
        assert_eq!(socket.tcp_keepalive_interval()?, Duration::from_secs(6));
        // The kernel goes by this where it is set.
        let gone = Some(Duration::from_secs(50));
        assert_eq!(socket.tcp_user_timeout()?, gone);
        Ok(())
    }
}
