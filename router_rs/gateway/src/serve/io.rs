//! A connection's bytes: what was read to know the protocol comes first, and frames that
//! come in are looked at where that is wanted.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::resets::{Resets, Watch};

/// A connection of which something was read before.
pub(crate) struct Prefixed<S> {
    inner: S,
    read_before: Bytes,
    watch: Option<Watch>,
}

impl<S> Prefixed<S> {
    pub(crate) fn new(inner: S, read_before: Bytes) -> Self {
        Self {
            inner,
            read_before,
            watch: None,
        }
    }

    /// The same of HTTP/2, of which resets are told.
    pub(crate) fn watched(self, resets: Resets) -> Self {
        Self {
            watch: Some(Watch::new(resets)),
            ..self
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = if self.read_before.has_remaining() {
            let take = self.read_before.remaining().min(buf.remaining());
            buf.put_slice(&self.read_before.split_to(take));
            Poll::Ready(Ok(()))
        } else {
            Pin::new(&mut self.inner).poll_read(cx, buf)
        };
        if let Some(watch) = &mut self.watch {
            watch.saw(buf.filled().get(before..).unwrap_or_default());
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
