//! An HTTP/1.1 connection: one call at a time, run by the connection's task.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use super::{accept::BoxError, calls::CallEnd};

/// The call that runs, as its connection knows it.
#[derive(Clone, Default)]
pub(super) struct Running(Arc<Mutex<CallEnd>>);

impl Running {
    /// A call begins; the one before has ended.
    pub(super) fn begin(&self) -> CallEnd {
        let end = CallEnd::default();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = end.clone();
        end
    }
}

/// A connection that ends with a call that was given up.
///
/// hyper waits for room in the socket before it asks a body for more, so a client
/// that never reads would hold its connection for as long as it likes. Where
/// there is room it gets the error first.
pub(super) struct OneCall<C> {
    connection: Pin<Box<C>>,
    call: Running,
}

impl<C> OneCall<C> {
    /// Watches the connection that `open` makes.
    pub(super) fn new(open: impl FnOnce(Running) -> C) -> Self {
        let call = Running::default();
        Self {
            connection: Box::pin(open(call.clone())),
            call,
        }
    }

    /// The connection itself.
    pub(super) fn connection(&mut self) -> Pin<&mut C> {
        self.connection.as_mut()
    }
}

impl<C, E> Future for OneCall<C>
where
    C: Future<Output = Result<(), E>>,
    BoxError: From<E>,
{
    type Output = Result<(), BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(ended) = self.connection.as_mut().poll(cx) {
            return Poll::Ready(ended.map_err(BoxError::from));
        }
        let call = self.call.0.lock().unwrap_or_else(PoisonError::into_inner);
        match call.given_up(cx.waker()) {
            true => Poll::Ready(Err("the client read nothing for too long".into())),
            false => Poll::Pending,
        }
    }
}
