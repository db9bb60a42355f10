//! A future that is polled only when it was woken.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::task::AtomicWaker;

/// Shares a task with others that wake it far more often: a connection's age
/// beside its tokens. Polling a timer and a lock of its own a token would cost
/// as much as encoding one.
pub(crate) struct Lazily<F> {
    inner: Pin<Box<F>>,
    news: Arc<News>,
    waker: Waker,
}

struct News {
    woken: AtomicBool,
    task: AtomicWaker,
}

impl Wake for News {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl<F: Future> Lazily<F> {
    pub(crate) fn new(inner: F) -> Self {
        let news = Arc::new(News {
            woken: AtomicBool::new(true),
            task: AtomicWaker::new(),
        });
        Self {
            inner: Box::pin(inner),
            waker: Waker::from(Arc::clone(&news)),
            news,
        }
    }
}

impl<F: Future> Future for Lazily<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let me = &mut *self;
        // Listens before it looks: no wake can pass between the two.
        me.news.task.register(cx.waker());
        if !me.news.woken.swap(false, Ordering::AcqRel) {
            return Poll::Pending;
        }
        me.inner.as_mut().poll(&mut Context::from_waker(&me.waker))
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, sync::atomic::AtomicU32};

    use futures_util::task::noop_waker;

    use super::*;

    #[test]
    fn it_is_polled_once_a_wake_and_not_once_a_poll() {
        let polls = Arc::new(AtomicU32::new(0));
        let inner_waker = Arc::new(AtomicWaker::new());
        let (counted, registered) = (Arc::clone(&polls), Arc::clone(&inner_waker));
        let mut lazily = Lazily::new(poll_fn(move |cx| {
            registered.register(cx.waker());
            if counted.fetch_add(1, Ordering::Relaxed) == 2 {
                return Poll::Ready(());
            }
            Poll::Pending
        }));
        let noop = noop_waker();
        let mut cx = Context::from_waker(&noop);
        let mut poll = || Pin::new(&mut lazily).poll(&mut cx);
        for _ in 0..5 {
            assert!(poll().is_pending());
        }
        assert_eq!(polls.load(Ordering::Relaxed), 1);
        inner_waker.wake();
        assert!(poll().is_pending() && poll().is_pending());
        assert_eq!(polls.load(Ordering::Relaxed), 2);
        inner_waker.wake();
        assert!(poll().is_ready());
    }
}
