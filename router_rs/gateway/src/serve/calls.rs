//! The calls of one HTTP/2 connection.
//!
//! A call runs in a task of its own until its answer streams; from then on its
//! connection's task carries it. A worker's step then wakes one task a
//! connection and not one a stream, what all its streams have to say is encoded
//! in one pass, and goes out in one write.
//!
//! ```text
//!  request ─▶ own task ─▶ answer without a stream: ends there
//!                 └─────▶ streams: the connection's task ─▶ ends, or is given up
//! ```

use std::{
    cell::Cell,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use smallvec::SmallVec;

use super::resets::Resets;
use crate::mesh::GivenUp;

/// Streams polled before others of the thread have their turn: half a
/// millisecond of work.
const MOST_AT_ONCE: usize = 256;

thread_local! {
    /// The stream that this thread polls.
    static POLLED: Polled = const { Polled::nobody() };
}

/// What happens to a stream during its poll.
struct Polled {
    /// Address of its place; 0: none is polled.
    place: Cell<usize>,
    /// It woke itself.
    woken: Cell<bool>,
    /// The last thing asked of its body was answered by "later".
    body_waits: Cell<bool>,
}

impl Polled {
    const fn nobody() -> Self {
        Self {
            place: Cell::new(0),
            woken: Cell::new(false),
            body_waits: Cell::new(false),
        }
    }
}

/// The body of the stream that is polled was asked for more; `waits`: there is
/// nothing yet.
pub(crate) fn body_was_polled(waits: bool) {
    POLLED.with(|polled| polled.body_waits.set(waits));
}

/// A running call, as hyper gives it.
type Running = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Known once a call streams, with what can end it from outside.
#[derive(Clone, Debug, Default)]
pub(crate) struct CallEnd {
    words: Arc<OnceLock<Words>>,
    /// Of an HTTP/2 connection.
    resets: Option<Resets>,
}

/// Said when the client of a call reads nothing for too long, by one of its
/// generations.
type Words = SmallVec<[GivenUp; 1]>;

impl CallEnd {
    /// The call streams generations, each of which may be given up.
    pub(crate) fn follow(&self, given_up: impl IntoIterator<Item = GivenUp>) {
        // A call answers once.
        let _ = self.words.set(given_up.into_iter().collect());
    }

    /// Whether the call streams and was given up. `waker` is told when it is.
    pub(crate) fn given_up(&self, waker: &Waker) -> bool {
        self.words.get().is_some_and(|words| said(words, waker))
    }

    /// Whether a stream of it that ends early now was cut off: its client did not reset it.
    pub(crate) fn was_cut(&self) -> bool {
        self.resets
            .as_ref()
            .is_some_and(|resets| !resets.are_pending())
    }
}

/// Whether one was said. Until then each knows whom to tell.
fn said(words: &Words, waker: &Waker) -> bool {
    words.iter().any(|word| word.said(waker))
}

/// Starts a connection's calls: hyper's executor.
#[derive(Clone)]
pub(crate) struct Calls {
    /// hyper asks the service for a call and then, before anything else, for
    /// somebody to run it.
    next: Arc<Mutex<CallEnd>>,
    streams: Arc<Shared>,
}

impl Calls {
    /// A call begins; what is run next is its.
    pub(crate) fn begin(&self) -> CallEnd {
        let end = CallEnd {
            resets: Some(self.streams.resets.clone()),
            ..CallEnd::default()
        };
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = end.clone();
        end
    }
}

impl<F> hyper::rt::Executor<F> for Calls
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, call: F) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.streams.starting.fetch_add(1, Ordering::AcqRel);
        // Ends with its call; the connection's end makes every call fail.
        tokio::spawn(Starting {
            call: Some(Box::pin(call)),
            end: std::mem::take(&mut *next),
            streams: Arc::clone(&self.streams),
        });
    }
}

/// A call that does not stream yet.
struct Starting {
    call: Option<Running>,
    end: CallEnd,
    streams: Arc<Shared>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.call = None;
        self.streams.starting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Future for Starting {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(call) = &mut self.call else {
            return Poll::Ready(());
        };
        if call.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let Some(given_up) = self.end.words.get().cloned() else {
            return Poll::Pending;
        };
        if let Some(call) = self.call.take() {
            self.streams.adopt(Stream { call, given_up });
        }
        Poll::Ready(())
    }
}

/// A call that streams.
struct Stream {
    call: Running,
    given_up: Words,
}

impl Stream {
    /// Whether it is over.
    ///
    /// hyper waits for the client's window before it asks a body for more, so a
    /// client that never reads would hold its stream for as long as its
    /// connection stands. A call that was given up and cannot say so is dropped
    /// instead; h2 then resets the stream.
    fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        // First the call itself: where the client has room it gets a status.
        self.call.as_mut().poll(cx).is_ready() || said(&self.given_up, cx.waker())
    }
}

/// What the wakers of a connection and its streams reach.
#[derive(Default)]
struct Shared {
    ready: Mutex<Ready>,
    resets: Resets,
    /// Calls that do not stream yet.
    starting: AtomicUsize,
}

#[derive(Default)]
struct Ready {
    /// Numbers of the streams to be polled, in the order of their wakes.
    queue: Vec<usize>,
    arrived: Vec<Stream>,
    connection: bool,
    /// The connection is gone: nobody looks any more.
    closed: bool,
    /// The task of them all; `None` while it runs, for then it will look.
    task: Option<Waker>,
}

impl Shared {
    // Vectors are whole after each operation.
    fn lock(&self) -> MutexGuard<'_, Ready> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn adopt(&self, stream: Stream) {
        let mut stream = Some(stream);
        self.tell(|ready| {
            if !ready.closed {
                ready.arrived.extend(stream.take());
            }
        });
        // What was not taken ends here, without the lock.
    }

    fn tell(&self, news: impl FnOnce(&mut Ready)) {
        let task = {
            let mut ready = self.lock();
            news(&mut ready);
            ready.task.take()
        };
        if let Some(task) = task {
            task.wake();
        }
    }
}

/// Wakes the connection.
impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.tell(|ready| ready.connection = true);
    }
}

/// Where a stream is kept; wakes it.
struct Place {
    number: usize,
    queued: AtomicBool,
    shared: Arc<Shared>,
}

impl Wake for Place {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let own = POLLED.with(|polled| {
            let own = polled.place.get() == self.address();
            if own {
                polled.woken.set(true);
            }
            own
        });
        if !own && !self.queued.swap(true, Ordering::AcqRel) {
            self.shared.tell(|ready| ready.queue.push(self.number));
        }
    }
}

impl Place {
    fn address(self: &Arc<Self>) -> usize {
        Arc::as_ptr(self).addr()
    }
}

struct Slot {
    place: Arc<Place>,
    waker: Waker,
    stream: Option<Stream>,
}

/// A connection and its streams, as one task.
///
/// Both wake by way of a list, and the task only where it sleeps: a stream that
/// hands a frame to the connection does not wake the task that it runs in.
pub(crate) struct Carrier<C> {
    connection: Pin<Box<C>>,
    /// Wakes the connection.
    waker: Waker,
    shared: Arc<Shared>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Memory of the queue, between two looks.
    queue: Vec<usize>,
}

impl<C> Carrier<C> {
    /// Carries the connection that `open` makes with this executor.
    pub(crate) fn new(resets: Resets, open: impl FnOnce(Calls) -> C) -> Self {
        let shared = Arc::new(Shared {
            resets,
            ..Shared::default()
        });
        let calls = Calls {
            next: Arc::default(),
            streams: Arc::clone(&shared),
        };
        Self {
            connection: Box::pin(open(calls)),
            waker: Waker::from(Arc::clone(&shared)),
            shared,
            slots: Vec::new(),
            free: Vec::new(),
            queue: Vec::new(),
        }
    }

    /// The connection itself.
    pub(crate) fn connection(&mut self) -> Pin<&mut C> {
        self.connection.as_mut()
    }

    /// Polls the streams that were woken, each once, as many as may be at once.
    fn poll_streams(&mut self) {
        let arrived = {
            let mut ready = self.shared.lock();
            ready.task = None;
            std::mem::swap(&mut ready.queue, &mut self.queue);
            let now = self.queue.len().min(MOST_AT_ONCE);
            ready.queue.extend(self.queue.drain(now..));
            std::mem::take(&mut ready.arrived)
        };
        for stream in arrived {
            let number = self.settle(stream);
            self.poll_stream(number);
        }
        let mut queue = std::mem::take(&mut self.queue);
        for number in queue.drain(..) {
            self.poll_stream(number);
        }
        self.queue = queue;
    }

    fn settle(&mut self, stream: Stream) -> usize {
        if let Some(number) = self.free.pop() {
            self.slots[number].stream = Some(stream);
            return number;
        }
        let number = self.slots.len();
        let place = Arc::new(Place {
            number,
            queued: AtomicBool::new(false),
            shared: Arc::clone(&self.shared),
        });
        self.slots.push(Slot {
            waker: Waker::from(Arc::clone(&place)),
            place,
            stream: Some(stream),
        });
        number
    }

    fn poll_stream(&mut self, number: usize) {
        let slot = &mut self.slots[number];
        // Before the poll: a wake during it is one for the next.
        slot.place.queued.store(false, Ordering::Release);
        let Some(stream) = &mut slot.stream else {
            return;
        };
        let mut cx = Context::from_waker(&slot.waker);
        POLLED.with(|polled| {
            polled.place.set(slot.place.address());
            polled.woken.set(false);
            polled.body_waits.set(false);
        });
        // A bug in one stream ends that stream.
        let over = catch_unwind(AssertUnwindSafe(|| stream.poll(&mut cx)));
        // h2 wakes a stream that asks for window and gets it at once, and so
        // each that sends. Where its body was asked after that there is nothing
        // to be polled for again.
        let again = POLLED.with(|polled| {
            polled.place.set(0);
            polled.woken.get() && !polled.body_waits.get()
        });
        if over.unwrap_or(true) {
            slot.stream = None;
            self.free.push(number);
        } else if again {
            slot.place.wake_by_ref();
        }
    }
}

impl<C> Drop for Carrier<C> {
    fn drop(&mut self) {
        let arrived = {
            let mut ready = self.shared.lock();
            ready.closed = true;
            ready.task = None;
            std::mem::take(&mut ready.arrived)
        };
        drop(arrived);
    }
}

impl<C: Future> Future for Carrier<C> {
    type Output = C::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let me = &mut *self;
        me.poll_streams();
        {
            let mut ready = me.shared.lock();
            ready.connection = false;
            // Whoever was reset has been dropped by now.
            if ready.queue.is_empty()
                && ready.arrived.is_empty()
                && me.shared.starting.load(Ordering::Acquire) == 0
            {
                me.shared.resets.seen_to();
            }
        }
        let mut for_connection = Context::from_waker(&me.waker);
        if let Poll::Ready(ended) = me.connection.as_mut().poll(&mut for_connection) {
            return Poll::Ready(ended);
        }
        let mut ready = me.shared.lock();
        if ready.connection || !ready.queue.is_empty() || !ready.arrived.is_empty() {
            drop(ready);
            // Others of this thread have their turn first.
            cx.waker().wake_by_ref();
        } else {
            ready.task = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}
