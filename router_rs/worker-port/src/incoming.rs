//! Connections of the port: plain ones, or those whose TLS handshake is done.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use kvmesh_trust::{Identity, PeerTls};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;

/// Connections that wait to be served.
const WAITING: usize = 64;
/// Handshakes at a time; later ones wait in the kernel.
const HANDSHAKES: usize = 256;
/// Longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Pause after an accept that failed, for want of descriptors say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub(crate) type Incoming = mpsc::Receiver<io::Result<Socket>>;

/// Where connections arrive; [`accept`] brings them there.
pub(crate) fn incoming() -> (mpsc::Sender<io::Result<Socket>>, Incoming) {
    mpsc::channel(WAITING)
}

/// Accepts for as long as it is polled and somebody takes what it accepts.
pub(crate) async fn accept(
    listener: TcpListener,
    tls: Option<Arc<PeerTls>>,
    to: mpsc::Sender<io::Result<Socket>>,
) {
    let mut handshakes = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept(), if handshakes.len() < HANDSHAKES => accepted,
            Some(_) = handshakes.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(event = "accept_failed", %error);
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Gone already, where it fails.
        if stream.set_nodelay(true).is_err() {
            continue;
        }
        let Some(tls) = tls.clone() else {
            if to.send(Ok(Socket::Plain(stream))).await.is_err() {
                return;
            }
            continue;
        };
        let to = to.clone();
        handshakes.spawn(async move {
            match tokio::time::timeout(HANDSHAKE, greet(stream, &tls)).await {
                // An error: the port is closed.
                Ok(Ok(socket)) => drop(to.send(Ok(socket)).await),
                Ok(Err(error)) => tracing::debug!(event = "handshake_failed", %error),
                Err(_) => tracing::debug!(event = "handshake_failed", error = "took too long"),
            }
        });
    }
}

async fn greet(stream: TcpStream, tls: &PeerTls) -> io::Result<Socket> {
    let stream = TlsAcceptor::from(tls.port()).accept(stream).await?;
    let shown = stream.get_ref().1.peer_certificates();
    let identity = match shown.and_then(<[_]>::first) {
        None => None,
        Some(certificate) => match tls.identity(certificate) {
            Ok(identity) => Some(identity),
            Err(error) => {
                tracing::info!(event = "stranger", %error, "a certificate of ours names nobody here");
                None
            }
        },
    };
    Ok(Socket::Tls(Box::new(stream), Caller(identity)))
}

/// Whom a connection is with, by certificate. Found among a request's extensions.
#[derive(Clone, Debug)]
pub(crate) struct Caller(pub(crate) Option<Identity>);

/// A connection.
pub(crate) enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>, Caller),
}

impl Connected for Socket {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        match self {
            Self::Plain(_) => Caller(None),
            Self::Tls(_, caller) => caller.clone(),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream, _) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream, _) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream, _) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream, _) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream, _) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
