//! A transfer node: one worker's end of all its transfers.
//!
//! Threads: one accepts peers by TCP, one gives the pool's descriptor away,
//! one fires timers, some copy and hash, and each connection has one that
//! reads and one that writes. What they know in common lies in `Core`, under
//! one lock that is held for moments only: never while bytes move. The rules
//! are in `sender` and `receiver`; this room does what they say.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::unix::net::UnixListener,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvmesh_wire::v1::PrefixKey;

use crate::{
    attach,
    error::{PoolError, Refused},
    event::Event,
    id::{Reason, TransferId},
    jobs::Jobs,
    pool::KvPool,
    receiver,
    sender::{self, Tail},
    settings::Settings,
    state::{Core, Figures, Residue},
};

/// What all threads of a node share.
pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) pool: Arc<KvPool>,
    /// Name of the unix socket; empty: none.
    pub(crate) unix_name: String,
    pub(crate) core: Mutex<Core>,
    /// An event or a wake has come.
    pub(crate) told: Condvar,
    /// The next timer has changed.
    pub(crate) rearmed: Condvar,
    pub(crate) jobs: Jobs,
    pub(crate) closed: AtomicBool,
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) copied_bytes: AtomicU64,
    pub(crate) threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that `close` waits for.
    pub(crate) fn spawn(
        self: &Arc<Self>,
        name: &str,
        run: impl FnOnce(Arc<Self>) + Send + 'static,
    ) -> io::Result<()> {
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name(format!("kv-{name}"))
            .spawn(move || run(shared))?;
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// What a receiver asks for.
#[derive(Debug, Clone)]
pub struct PullRequest {
    /// The transfer.
    pub id: TransferId,
    /// The sender's address, "host:port".
    pub address: String,
    /// The sender's worker id; another one that answers there is refused.
    pub worker: String,
    /// The sender's incarnation, likewise.
    pub incarnation: u64,
    /// First token wanted, a multiple of the block size.
    pub from_token: u32,
    /// Destination slots, from that token on.
    pub slots: Vec<u32>,
    /// Set where a prefix is wanted.
    pub prefix: Option<PrefixKey>,
    /// W3C trace context.
    pub traceparent: String,
    /// The request's x-request-id.
    pub request_id: String,
}

/// Moves KV blocks between a pool and its peers' pools.
pub struct TransferNode {
    shared: Arc<Shared>,
    address: String,
    listener: TcpListener,
    unix: Option<UnixListener>,
}

impl TransferNode {
    /// Binds and starts.
    ///
    /// # Errors
    ///
    /// Where an address cannot be bound or a thread not be started.
    pub fn start(pool: Arc<KvPool>, settings: Settings) -> io::Result<Self> {
        if settings.block_tokens == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "blocks of 0 tokens",
            ));
        }
        let listener = TcpListener::bind(&settings.listen)?;
        let address = advertised(listener.local_addr()?, &settings.advertise);
        let (unix, unix_name) = if settings.shared_memory {
            let (unix, name) = attach::listen().map_err(|error| match error {
                PoolError::Os { source, .. } => source,
                other => io::Error::other(other),
            })?;
            (Some(unix), name)
        } else {
            (None, String::new())
        };
        let copy_threads = settings.copy_threads();
        let shared = Arc::new(Shared {
            settings,
            pool,
            unix_name,
            core: Mutex::default(),
            told: Condvar::new(),
            rearmed: Condvar::new(),
            jobs: Jobs::default(),
            closed: AtomicBool::new(false),
            sent_bytes: AtomicU64::new(0),
            copied_bytes: AtomicU64::new(0),
            threads: Mutex::default(),
        });
        let node = Self {
            shared,
            address,
            listener,
            unix,
        };
        // From here on a failure closes what was started, by Drop.
        let tcp = node.listener.try_clone()?;
        node.shared
            .spawn("accept", move |shared| shared.accept_loop(&tcp))?;
        if let Some(unix) = &node.unix {
            let unix = unix.try_clone()?;
            node.shared
                .spawn("attach", move |shared| shared.attach_loop(&unix))?;
        }
        node.shared.spawn("timers", |shared| shared.timer_loop())?;
        for _ in 0..copy_threads {
            node.shared.spawn("copy", |shared| shared.job_loop())?;
        }
        Ok(node)
    }

    /// "host:port" for peers.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    fn sender_event(&self, id: TransferId, event: sender::Event) -> Result<(), Refused> {
        self.shared.sender_event(&mut self.shared.lock(), id, event)
    }

    /// (slot, version now) of each slot.
    fn versions(&self, slots: &[u32]) -> Result<Vec<(u32, u64)>, Refused> {
        slots
            .iter()
            .map(|slot| match self.shared.pool.version(*slot) {
                Ok(version) => Ok((*slot, version)),
                Err(error) => Err(Refused::new(Reason::Failed, error.to_string())),
            })
            .collect()
    }

    /// Opens a transfer. `pins` counts in the residue.
    ///
    /// # Errors
    ///
    /// The id is known or was aborted, or there are too many.
    pub fn offer(&self, id: TransferId, pins: u64) -> Result<(), Refused> {
        let mut core = self.shared.lock();
        self.shared
            .sender_event(&mut core, id, sender::Event::Offer)?;
        core.set_pins(id, pins);
        Ok(())
    }

    /// As [`TransferNode::offer`], for a sequence that grows while it goes: each time
    /// that the receiver has all it was told of, [`Event::Reached`] says so.
    ///
    /// # Errors
    ///
    /// As [`TransferNode::offer`].
    pub fn offer_growing(&self, id: TransferId, pins: u64) -> Result<(), Refused> {
        let mut core = self.shared.lock();
        self.shared
            .sender_event(&mut core, id, sender::Event::Offer)?;
        core.set_pins(id, pins);
        core.follow(id);
        Ok(())
    }

    /// Announces full blocks, in order and without holes.
    ///
    /// # Errors
    ///
    /// No such transfer now, a hole, or no such slot.
    pub fn ready(&self, id: TransferId, first: u32, slots: &[u32]) -> Result<(), Refused> {
        let blocks = self.versions(slots)?;
        self.sender_event(id, sender::Event::Ready { first, blocks })
    }

    /// The last word. `partial`: (block of the sequence, slot).
    ///
    /// # Errors
    ///
    /// No such transfer now, a hole, no such slot, or too much to say.
    pub fn commit(
        &self,
        id: TransferId,
        tail: Tail,
        partial: Option<(u32, u32)>,
    ) -> Result<(), Refused> {
        let block_tokens = self.shared.settings.block_tokens;
        let full = tail.kv_tokens / block_tokens;
        let rest = !tail.kv_tokens.is_multiple_of(block_tokens);
        if partial.is_some() != rest || partial.is_some_and(|(block, _)| block != full) {
            let message = format!("{} tokens and partial block {partial:?}", tail.kv_tokens);
            return Err(Refused::new(Reason::Failed, message));
        }
        let said =
            5 * tail.output_ids.len() + tail.logprobs.iter().map(|p| 8 + p.len()).sum::<usize>();
        if said > crate::frame::MAX_FRAME - 1024 {
            return Err(Refused::new(Reason::Failed, "a commit of more than 1 MiB"));
        }
        let partial = match partial {
            Some((block, slot)) => self
                .versions(&[slot])?
                .first()
                .map(|(slot, version)| (block, *slot, *version)),
            None => None,
        };
        self.sender_event(id, sender::Event::Commit { tail, partial })
    }

    /// Answers a pull by prefix: `tokens` in `slots`, from block 0 on.
    ///
    /// # Errors
    ///
    /// The peer has gone, or there is no such slot.
    pub fn offer_prefix(&self, id: TransferId, tokens: u32, slots: &[u32]) -> Result<(), Refused> {
        let count = tokens / self.shared.settings.block_tokens;
        let Some(slots) = slots.get(..count as usize) else {
            return Err(Refused::new(Reason::Failed, "fewer slots than blocks"));
        };
        let blocks = self.versions(slots)?;
        let kv_tokens = count * self.shared.settings.block_tokens;
        self.shared
            .offer_prefix(&mut self.shared.lock(), id, kv_tokens, blocks)
    }

    /// Pulls a transfer or a prefix into this pool.
    ///
    /// # Errors
    ///
    /// The id is pulled already, there are too many, or a number does not fit.
    pub fn pull(&self, request: PullRequest) -> Result<(), Refused> {
        self.shared.pull(request)
    }

    /// Ends a transfer on whichever side it is. False: none is known.
    pub fn abort(&self, id: TransferId, reason: Reason, message: &str) -> bool {
        let mut core = self.shared.lock();
        core.say(id, message);
        let sending = core.sends(id);
        let receiving = core.receives(id);
        if sending {
            // A cancel is never refused.
            let _ = self
                .shared
                .sender_event(&mut core, id, sender::Event::Cancel(reason));
        }
        if receiving {
            self.shared
                .receiver_event(&mut core, id, receiver::Event::Cancel(reason));
        }
        sending || receiving
    }

    /// All events that have come, in order.
    #[must_use]
    pub fn poll(&self) -> Vec<Event> {
        self.shared.lock().take_events()
    }

    /// Waits for an event or a `wake`. False: timed out, or closed.
    #[must_use]
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut core = self.shared.lock();
        loop {
            if core.told() {
                return true;
            }
            if self.shared.is_closed() {
                return false;
            }
            let Some(deadline) = deadline else {
                core = self
                    .shared
                    .told
                    .wait(core)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.told.wait_timeout(core, left);
            core = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends a `wait`, or the next one.
    pub fn wake(&self) {
        self.shared.lock().wake();
        self.shared.told.notify_all();
    }

    /// What is held.
    #[must_use]
    pub fn residue(&self) -> Residue {
        let jobs = self.shared.jobs.len();
        self.shared.lock().residue(jobs)
    }

    /// Totals since the start.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let mut figures = self.shared.lock().figures;
        figures.sent_tcp_bytes = self.shared.sent_bytes.load(Ordering::Relaxed);
        figures.copied_bytes = self.shared.copied_bytes.load(Ordering::Relaxed);
        figures
    }

    /// Ends all transfers, connections and threads. Idempotent.
    pub fn close(&self) {
        if self.shared.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        use std::os::fd::AsRawFd;
        // SAFETY: plain calls on our own listeners: their accept returns.
        unsafe {
            libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RDWR);
            if let Some(unix) = &self.unix {
                libc::shutdown(unix.as_raw_fd(), libc::SHUT_RDWR);
            }
        }
        self.shared.lock().close();
        self.shared.told.notify_all();
        self.shared.rearmed.notify_all();
        self.shared.jobs.close();
        loop {
            let threads = {
                let mut threads = self
                    .shared
                    .threads
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                std::mem::take(&mut *threads)
            };
            if threads.is_empty() {
                return;
            }
            for thread in threads {
                // A panic was printed by its thread; the others still end.
                let _ = thread.join();
            }
            // One that was just being accepted.
            self.shared.lock().close();
        }
    }
}

impl Drop for TransferNode {
    fn drop(&mut self) {
        self.close();
    }
}

/// What peers are told: the bound address, with another host for wildcards.
fn advertised(bound: SocketAddr, host: &str) -> String {
    match host {
        "" => bound.to_string(),
        host if host.contains(':') && !host.starts_with('[') => {
            format!("[{host}]:{}", bound.port())
        }
        host => format!("{host}:{}", bound.port()),
    }
}

/// Encoded log-probabilities, checked.
///
/// # Errors
///
/// Where one is no `TokenLogprobs`.
pub fn check_logprobs(logprobs: &[Bytes]) -> Result<(), Refused> {
    use prost::Message;
    for bytes in logprobs {
        kvmesh_wire::v1::TokenLogprobs::decode(bytes.clone())
            .map_err(|error| Refused::new(Reason::Failed, format!("logprobs: {error}")))?;
    }
    Ok(())
}
