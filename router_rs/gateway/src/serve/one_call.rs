//! An HTTP/1.1 connection: one call at a time, run by the connection's task.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use super::{accept::BoxError, calls::CallEnd};

/// The call that runs, as its connection knows it; `None` before the first one.
#[derive(Clone, Default)]
pub(super) struct Running(Arc<Mutex<Option<CallEnd>>>);

impl Running {
    /// A call begins; the one before has ended.
    pub(super) fn begin(&self) -> CallEnd {
        let end = CallEnd::default();
        *self.lock() = Some(end.clone());
        end
    }

    /// Whether there was any.
    pub(super) fn has_begun(&self) -> bool {
        self.lock().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Option<CallEnd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// The call that runs.
    pub(super) fn call(&self) -> Running {
        self.call.clone()
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
        let given_up = match &*self.call.lock() {
            Some(call) => call.given_up(cx.waker()),
            None => false,
        };
        match given_up {
            true => Poll::Ready(Err("the client read nothing for too long".into())),
            false => Poll::Pending,
        }
    }
}
