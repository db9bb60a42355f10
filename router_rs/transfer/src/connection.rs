//! One connection of a pair of nodes: what goes out, and the raw bytes of
//! blocks in both directions.

use std::{
    collections::VecDeque,
    io::{self, Write},
    net::{Shutdown, TcpStream},
    os::fd::{AsRawFd, RawFd},
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
};

/// Frames that may wait for a peer that does not read. Beyond it the
/// connection is closed.
const MAX_WAITING: usize = 16 * 1024;

/// Bytes taken from the socket at a time: what was just received is hashed
/// while it still lies in the second-level cache.
const PIECE: usize = 256 * 1024;

/// Bytes that wake the reader of a block, or what is left of it.
const WAKE_BYTES: usize = 128 * 1024;

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
    stream: OnceLock<TcpStream>,
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
            stream: OnceLock::new(),
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
    pub(crate) fn attach(&self, stream: TcpStream) -> Option<&TcpStream> {
        let out = self.out();
        (!out.closed).then(|| self.stream.get_or_init(|| stream))
    }

    pub(crate) fn stream(&self) -> Option<&TcpStream> {
        self.stream.get()
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
        if let Some(stream) = self.stream.get() {
            // An error means that it is down already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(out);
        self.ready.notify_all();
    }

    /// Sends what is queued until the connection closes.
    pub(crate) fn write_loop(&self, pool: &KvPool, sent: &AtomicU64) {
        let Some(stream) = self.stream() else { return };
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
            let mut writer = stream;
            let written = match data {
                Some(fetched) => write_blocks(stream, pool, &fetched, sent),
                None => writer.write_all(&control),
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
    mut stream: &TcpStream,
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
        return stream.write_all(&head);
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
    send_parts(stream.as_raw_fd(), &mut parts)?;
    sent.fetch_add(
        u64::from(count) * pool.block_bytes() as u64,
        Ordering::Relaxed,
    );
    Ok(())
}

/// Sends memory of the pool in one gathered write, as far as the socket takes.
fn send_parts(socket: RawFd, parts: &mut [libc::iovec]) -> io::Result<()> {
    let mut parts = parts;
    while let Some(first) = parts.first() {
        if first.iov_len == 0 {
            parts = &mut parts[1..];
            continue;
        }
        // SAFETY: all-zero is a valid msghdr.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = parts.as_mut_ptr();
        header.msg_iovlen = parts.len().min(1024) as _;
        // SAFETY: the parts lie in memory that the caller holds.
        let n = unsafe { libc::sendmsg(socket, &raw const header, libc::MSG_NOSIGNAL) };
        match usize::try_from(n) {
            Ok(n) => consume(parts, n),
            Err(_) => retry()?,
        }
    }
    Ok(())
}

/// Takes `n` bytes off the front of the parts.
fn consume(parts: &mut [libc::iovec], mut n: usize) {
    for part in parts {
        let step = n.min(part.iov_len);
        // SAFETY: at most to the end of the part.
        part.iov_base = unsafe { part.iov_base.cast::<u8>().add(step) }.cast();
        part.iov_len -= step;
        n -= step;
    }
}

/// Passes over interruptions.
fn retry() -> io::Result<()> {
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted {
        Ok(())
    } else {
        Err(error)
    }
}

/// Reads the bytes of `targets.len()` blocks from the socket straight into
/// them, hashing each piece while it is warm. Once the gate is closed the rest
/// is read and dropped: the connection serves other transfers too. `quiet` is
/// called when the last write behind a closed gate has ended. Returns the
/// checksums of the blocks that were stored whole, from the first on.
pub(crate) fn receive_blocks(
    stream: &TcpStream,
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
        // The kernel writes only during the call below, which does not block:
        // so a write is under way for moments, however slow the peer is.
        if !gate.enter() {
            discard(stream, total - at)?;
            break;
        }
        let n = receive_piece(stream, targets, block_bytes, at);
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
            0 => wait_readable(stream, total - at)?,
            n => at += n,
        }
    }
    Ok(checksums)
}

/// One read of at most `PIECE` bytes, without waiting. 0: nothing there yet.
fn receive_piece(
    stream: &TcpStream,
    targets: &[*mut u8],
    block_bytes: usize,
    at: usize,
) -> io::Result<usize> {
    let mut parts = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; 64];
    let (mut used, mut room, mut offset) = (0, PIECE, at % block_bytes);
    for (part, target) in parts.iter_mut().zip(&targets[at / block_bytes..]) {
        let len = (block_bytes - offset).min(room);
        // SAFETY: `offset` lies inside the block.
        part.iov_base = unsafe { target.add(offset) }.cast();
        part.iov_len = len;
        (used, room, offset) = (used + 1, room - len, 0);
        if room == 0 {
            break;
        }
    }
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = parts.as_mut_ptr();
    header.msg_iovlen = used as _;
    // SAFETY: the parts lie in blocks that the caller's gate keeps ours.
    let n = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
    match usize::try_from(n) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(n) => Ok(n),
        Err(_) => {
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error),
            }
        }
    }
}

/// Bytes that must be there before a reader is woken (socket(7), SO_RCVLOWAT).
fn wake_at(stream: &TcpStream, bytes: usize) -> io::Result<()> {
    let mark = bytes as libc::c_int;
    // SAFETY: an int that lives through the call.
    let rc = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const mark).cast(),
            size_of_val(&mark) as _,
        )
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Waits until a good part of `left` bytes is there: a reader that wakes for
/// each packet costs more than what it copies.
fn wait_readable(stream: &TcpStream, left: usize) -> io::Result<()> {
    wake_at(stream, left.min(WAKE_BYTES))?;
    let mut wanted = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        // SAFETY: one pollfd, which is ours. A closed connection is readable.
        if unsafe { libc::poll(&raw mut wanted, 1, -1) } > 0 {
            // A blocking read of a short frame would sleep below the mark.
            return wake_at(stream, 1);
        }
        retry()?;
    }
}

/// Reads and drops bytes.
pub(crate) fn discard(stream: &TcpStream, len: usize) -> io::Result<()> {
    let mut rest = io::Read::take(stream, len as u64);
    if io::copy(&mut rest, &mut io::sink())? == len as u64 {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
