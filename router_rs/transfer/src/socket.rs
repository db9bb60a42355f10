//! The socket of a connection: plain, or under TLS.
//!
//! ```text
//!  plain  pool ── sendmsg ─────────────▶ kernel ── recvmsg ───────────────▶ pool
//!  TLS    pool ── copy, encrypt, send ─▶ kernel ── take, decrypt, copy ───▶ pool
//! ```

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::AsRawFd,
    sync::OnceLock,
    time::{Duration, Instant},
};

use rustls::pki_types::CertificateDer;

use crate::secured::{RECORD, Secured};

/// Bytes taken from the socket at a time: what was just received is hashed
/// while it still lies in the second-level cache.
const PIECE: usize = 256 * 1024;

/// Bytes that wake the reader of a block, or what is left of it.
const WAKE_BYTES: usize = 128 * 1024;

pub(crate) struct Socket {
    stream: TcpStream,
    /// Set where both have shaken hands.
    secured: OnceLock<Secured>,
}

impl Socket {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            secured: OnceLock::new(),
        }
    }

    /// Goes on under TLS. `first`: what of the peer's words was read already.
    pub(crate) fn secure(
        &self,
        tls: rustls::Connection,
        first: &[u8],
        limit: Duration,
    ) -> io::Result<()> {
        let secured = Secured::greet(tls, &self.stream, first, limit)?;
        self.secured.get_or_init(|| secured);
        Ok(())
    }

    /// What the peer has shown, under TLS.
    pub(crate) fn certificate(&self) -> Option<CertificateDer<'static>> {
        self.secured.get()?.certificate()
    }

    /// What comes until then, under TLS where there is some.
    pub(crate) fn until(&self, until: Instant) -> impl Read {
        Greeting {
            socket: self,
            until,
        }
    }

    /// From now on a read waits for as long as it takes.
    pub(crate) fn unlimited(&self) -> io::Result<()> {
        self.stream.set_read_timeout(None)
    }

    /// Reads what comes beside any TLS, for as long as that.
    pub(crate) fn read_plain(&self, bytes: &mut [u8], until: Instant) -> io::Result<usize> {
        let stream = &self.stream;
        Until { stream, until }.read(bytes)
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        // An error means that it is down already.
        let _ = self.stream.shutdown(how);
    }

    /// Sends memory of the pool in one gathered write, as far as the socket takes.
    ///
    /// # Safety
    ///
    /// The parts must be readable; others may change them meanwhile.
    pub(crate) unsafe fn send_parts(&self, parts: &mut [libc::iovec]) -> io::Result<()> {
        if let Some(secured) = self.secured.get() {
            // SAFETY: as promised by the caller.
            return unsafe { secured.write_parts(&self.stream, parts) };
        }
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
            let (socket, flags) = (self.stream.as_raw_fd(), libc::MSG_NOSIGNAL);
            // SAFETY: the parts are readable, as promised by the caller.
            let n = unsafe { libc::sendmsg(socket, &raw const header, flags) };
            match usize::try_from(n) {
                Ok(n) => consume(parts, n),
                Err(_) => retry()?,
            }
        }
        Ok(())
    }

    /// Reads into a row of blocks, `at` bytes of which are there: one read of at most
    /// `PIECE` bytes, without waiting. 0: nothing there yet.
    ///
    /// # Safety
    ///
    /// The blocks must be writable, and nobody else's meanwhile.
    pub(crate) unsafe fn receive_piece(
        &self,
        targets: &[*mut u8],
        block_bytes: usize,
        at: usize,
    ) -> io::Result<usize> {
        if let Some(secured) = self.secured.get() {
            let most = (targets.len() * block_bytes - at).min(PIECE);
            return secured.read_at_once(&self.stream, most, |done, piece| {
                // SAFETY: behind `at` and before the end of the last block, which the
                // caller keeps writable and ours.
                unsafe { scatter(piece, targets, block_bytes, at + done) };
            });
        }
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
        let (socket, flags) = (self.stream.as_raw_fd(), libc::MSG_DONTWAIT);
        // SAFETY: the parts lie in blocks that are ours, as promised by the caller.
        let n = unsafe { libc::recvmsg(socket, &raw mut header, flags) };
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

    /// Waits until a good part of `left` bytes is there: a reader that wakes for
    /// each packet costs more than what it copies.
    pub(crate) fn wait_readable(&self, left: usize) -> io::Result<()> {
        let to_come = match self.secured.get() {
            None => left,
            // The beginning of a record may be here already.
            Some(_) => left.saturating_sub(RECORD).max(1),
        };
        self.wake_at(to_come.min(WAKE_BYTES))?;
        wait_for(&self.stream, libc::POLLIN)?;
        // A blocking read of a short frame would sleep below the mark.
        self.wake_at(1)
    }

    /// Bytes that must be there before a reader is woken (socket(7), SO_RCVLOWAT).
    fn wake_at(&self, bytes: usize) -> io::Result<()> {
        let mark = bytes as libc::c_int;
        // SAFETY: an int that lives through the call.
        let rc = unsafe {
            libc::setsockopt(
                self.stream.as_raw_fd(),
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
}

/// A stream until a moment. The kernel's limit alone is one of each wait: it would begin
/// anew with each byte that comes, and with each signal.
pub(crate) struct Until<'a> {
    pub(crate) stream: &'a TcpStream,
    pub(crate) until: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut stream = self.stream;
        stream.read(bytes)
    }
}

/// A socket until a moment.
struct Greeting<'a> {
    socket: &'a Socket,
    until: Instant,
}

impl Read for Greeting<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let (stream, until) = (&self.socket.stream, self.until);
        let mut stream = Until { stream, until };
        match self.socket.secured.get() {
            None => stream.read(bytes),
            Some(secured) => secured.read(stream, bytes),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self.secured.get() {
            None => (&self.stream).read(bytes),
            Some(secured) => secured.read(&self.stream, bytes),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.secured.get() {
            None => (&self.stream).write(bytes),
            Some(secured) => secured.write_all(&self.stream, bytes).map(|()| bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until the socket is readable or writable. One that is closed is both.
pub(crate) fn wait_for(stream: &TcpStream, what: libc::c_short) -> io::Result<()> {
    let mut wanted = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: what,
        revents: 0,
    };
    // SAFETY: one pollfd, which is ours.
    while unsafe { libc::poll(&raw mut wanted, 1, -1) } <= 0 {
        retry()?;
    }
    Ok(())
}

/// Copies bytes into a row of blocks, from the byte `at` of the row on.
///
/// # Safety
///
/// The blocks must have room for all of them, and be writable and nobody else's.
unsafe fn scatter(mut bytes: &[u8], targets: &[*mut u8], block_bytes: usize, mut at: usize) {
    while !bytes.is_empty() {
        let (block, offset) = (at / block_bytes, at % block_bytes);
        let n = bytes.len().min(block_bytes - offset);
        // SAFETY: inside the block, as promised by the caller; a pool is foreign to
        // what was decrypted.
        unsafe {
            let to = targets[block].add(offset);
            bytes.as_ptr().copy_to_nonoverlapping(to, n);
        }
        (bytes, at) = (&bytes[n..], at + n);
    }
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
pub(crate) fn retry() -> io::Result<()> {
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted {
        Ok(())
    } else {
        Err(error)
    }
}
