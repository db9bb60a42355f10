//! A connection's bytes: what was read to know the protocol comes first, and
//! writes of many streams go out together.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Token streams that are open on one connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpenStreams(Arc<AtomicUsize>);

impl OpenStreams {
    /// Counts one until the returned guard is dropped.
    pub(crate) fn enter(&self) -> StreamGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        StreamGuard(self.clone())
    }

    fn several(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 1
    }
}

/// One open token stream.
#[derive(Debug)]
pub(crate) struct StreamGuard(OpenStreams);

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection.
///
/// A worker's step wakes all its streams at once, each in a task of its own,
/// and the first that has something to send wakes the connection. If that wrote
/// at once, a step of 64 streams would be 64 system calls. So with several open
/// streams a write lets all tasks that are ready run first, once, and then
/// carries what they brought.
pub(crate) struct Socket<S> {
    inner: S,
    read_before: Bytes,
    streams: OpenStreams,
    gave_way: bool,
}

impl<S> Socket<S> {
    pub(crate) fn new(inner: S, read_before: Bytes, streams: OpenStreams) -> Self {
        Self {
            inner,
            read_before,
            streams,
            gave_way: false,
        }
    }

    /// Whether the others were let run before this write.
    fn give_way(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.gave_way || !self.streams.several() {
            return Poll::Ready(());
        }
        self.gave_way = true;
        // A task that wakes itself while it runs goes to the end of the queue.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read_before.has_remaining() {
            let take = self.read_before.remaining().min(buf.remaining());
            buf.put_slice(&self.read_before.split_to(take));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.give_way(cx));
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.give_way(cx));
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(Pin::new(&mut self.inner).poll_flush(cx));
        self.gave_way = false;
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
