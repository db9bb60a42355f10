//! One connection of a pair of nodes: what goes out, and the raw bytes of
//! blocks in both directions.

use std::{
    collections::VecDeque,
    io::{self, Write},
    net::{Shutdown, TcpStream},
    sync::{
        Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use kvmesh_wire::v1::{BlockData, TransferHello, transfer_frame::Frame};

use crate::{
    checksum::Pass,
    frame,
    gate::Gate,
    id::TransferId,
    pool::{KvPool, PeerPool},
    socket::Socket,
};

/// Frames that may wait for a peer that does not read. Beyond it the
/// connection is closed.
const MAX_WAITING: usize = 16 * 1024;

/// Blocks that a receiver asked for by TCP.
pub(crate) struct Fetched {
    pub(crate) id: TransferId,
    pub(crate) first: u32,
    /// (slot, version as announced).
    pub(crate) blocks: Vec<(u32, u64)>,
}

#[derive(Default)]
struct Out {
    control: VecDeque<Vec<u8>>,
    data: VecDeque<Fetched>,
    closed: bool,
}

/// A connection, its peer, and what waits to be sent.
pub(crate) struct Connection {
    pub(crate) number: u64,
    /// The peer made it: it is the receiver.
    pub(crate) inbound: bool,
    socket: OnceLock<Socket>,
    /// What the peer said first.
    pub(crate) hello: OnceLock<TransferHello>,
    /// Why the pair does not fit, once the hello is there.
    pub(crate) misfit: OnceLock<String>,
    /// The sender's pool, where it can be mapped.
    pub(crate) pool: OnceLock<PeerPool>,
    out: Mutex<Out>,
    ready: Condvar,
}

impl Connection {
    pub(crate) fn new(number: u64, inbound: bool) -> Self {
        Self {
            number,
            inbound,
            socket: OnceLock::new(),
            hello: OnceLock::new(),
            misfit: OnceLock::new(),
            pool: OnceLock::new(),
            out: Mutex::default(),
            ready: Condvar::new(),
        }
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the socket; `None`: the connection was closed meanwhile.
    pub(crate) fn attach(&self, stream: TcpStream) -> Option<&Socket> {
        let out = self.out();
        (!out.closed).then(|| self.socket.get_or_init(|| Socket::new(stream)))
    }

    /// Whether the peer has said who it is.
    pub(crate) fn greeted(&self) -> bool {
        self.hello.get().is_some()
    }

    pub(crate) fn peer_worker(&self) -> String {
        self.hello
            .get()
            .map(|hello| hello.worker_id.clone())
            .unwrap_or_default()
    }

    /// Queues a frame.
    pub(crate) fn send(&self, frame: Frame) {
        let mut out = self.out();
        if out.closed {
            return;
        }
        if out.control.len() >= MAX_WAITING {
            drop(out);
            self.close();
            return;
        }
        out.control.push_back(frame::encode(frame));
        drop(out);
        self.ready.notify_one();
    }

    /// Queues block bytes, behind all frames.
    pub(crate) fn send_blocks(&self, fetched: Fetched) {
        let mut out = self.out();
        if out.closed {
            return;
        }
        if out.data.len() >= MAX_WAITING {
            drop(out);
            self.close();
            return;
        }
        out.data.push_back(fetched);
        drop(out);
        self.ready.notify_one();
    }

    /// Ends both threads of the connection. Idempotent.
    pub(crate) fn close(&self) {
        let mut out = self.out();
        out.closed = true;
        out.control.clear();
        out.data.clear();
        if let Some(socket) = self.socket.get() {
            socket.shutdown(Shutdown::Both);
        }
        drop(out);
        self.ready.notify_all();
    }

    /// Sends what is queued until the connection closes.
    pub(crate) fn write_loop(&self, pool: &KvPool, sent: &AtomicU64) {
        let Some(mut socket) = self.socket.get() else {
            return;
        };
        loop {
            let mut out = self.out();
            while out.control.is_empty() && out.data.is_empty() && !out.closed {
                out = self.ready.wait(out).unwrap_or_else(PoisonError::into_inner);
            }
            if out.closed {
                return;
            }
            let control: Vec<u8> = out.control.drain(..).flatten().collect();
            let data = if control.is_empty() {
                out.data.pop_front()
            } else {
                None
            };
            drop(out);
            let written = match data {
                Some(fetched) => write_blocks(socket, pool, &fetched, sent),
                None => socket.write_all(&control),
            };
            if let Err(error) = written {
                tracing::debug!(%error, connection = self.number, "transfer connection lost");
                self.close();
                return;
            }
        }
    }
}

/// Sends a `data` frame and the bytes of its blocks.
fn write_blocks(
    mut socket: &Socket,
    pool: &KvPool,
    fetched: &Fetched,
    sent: &AtomicU64,
) -> io::Result<()> {
    let current = |(slot, version): &(u32, u64)| pool.version(*slot).ok() == Some(*version);
    let count = if fetched.blocks.iter().all(current) {
        fetched.blocks.len() as u32
    } else {
        0
    };
    let mut head = frame::encode(Frame::Data(BlockData {
        transfer_id: fetched.id.0.to_vec().into(),
        first_block: fetched.first,
        count,
    }));
    if count == 0 {
        return socket.write_all(&head);
    }
    // In one write with the blocks: a packet of its own would wake the reader
    // for a few bytes.
    let mut parts = Vec::with_capacity(1 + fetched.blocks.len());
    parts.push(libc::iovec {
        iov_base: head.as_mut_ptr().cast(),
        iov_len: head.len(),
    });
    for (slot, _) in &fetched.blocks {
        let block = pool.block(*slot).map_err(io::Error::other)?;
        parts.push(libc::iovec {
            iov_base: block.cast(),
            iov_len: pool.block_bytes(),
        });
    }
    // Copied into the kernel: pages of the file given to `sendfile` were no
    // faster over loopback, and would go out torn long after they were checked.
    // SAFETY: the head and blocks of the pool, which both live through the call.
    unsafe { socket.send_parts(&mut parts) }?;
    sent.fetch_add(
        u64::from(count) * pool.block_bytes() as u64,
        Ordering::Relaxed,
    );
    Ok(())
}

/// Reads the bytes of `targets.len()` blocks from the socket straight into
/// them, hashing each piece while it is warm. Once the gate is closed the rest
/// is read and dropped: the connection serves other transfers too. `quiet` is
/// called when the last write behind a closed gate has ended. Returns the
/// checksums of the blocks that were stored whole, from the first on.
pub(crate) fn receive_blocks(
    socket: &Socket,
    targets: &[*mut u8],
    block_bytes: usize,
    gate: &Gate,
    quiet: impl Fn(),
) -> io::Result<Vec<u64>> {
    let mut checksums = Vec::with_capacity(targets.len());
    let total = targets.len() * block_bytes;
    let mut at = 0;
    let mut pass = Pass::new(block_bytes);
    while at < total {
        // Only the call below writes, and it does not block: so a write is under
        // way for moments, however slow the peer is.
        if !gate.enter() {
            discard(socket, total - at)?;
            break;
        }
        // SAFETY: the blocks are ours while the gate is entered.
        let n = unsafe { socket.receive_piece(targets, block_bytes, at) };
        if let Ok(n) = n {
            for (index, target) in targets
                .iter()
                .enumerate()
                .take((at + n).div_ceil(block_bytes))
                .skip(at / block_bytes)
            {
                let have = (at + n - index * block_bytes).min(block_bytes);
                // SAFETY: the block is ours while the gate is entered.
                unsafe { pass.advance(*target, have) };
                if have == block_bytes {
                    let whole = std::mem::replace(&mut pass, Pass::new(block_bytes));
                    // SAFETY: as above.
                    checksums.push(unsafe { whole.end(*target) });
                }
            }
        }
        if gate.leave() {
            quiet();
        }
        match n? {
            0 => socket.wait_readable(total - at)?,
            n => at += n,
        }
    }
    Ok(checksums)
}

/// Reads and drops bytes.
pub(crate) fn discard(socket: &Socket, len: usize) -> io::Result<()> {
    let mut rest = io::Read::take(socket, len as u64);
    if io::copy(&mut rest, &mut io::sink())? == len as u64 {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
