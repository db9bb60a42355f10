//! TLS over the socket of a connection.
//!
//! The threads that read and write share one state. It is locked while bytes are
//! encrypted or decrypted and while the kernel takes what it takes at once, never while
//! anybody waits for the peer: two peers that both wait to write would wait for ever.

use std::{
    io::{self, BufRead, IoSlice, Read, Write},
    net::TcpStream,
    os::fd::AsRawFd,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustls::{Connection as Tls, pki_types::CertificateDer};
use socket2::SockRef;

use crate::{
    error::Untrusted,
    socket::{Until, retry, wait_for},
};

/// Bytes encrypted at a time: four records, which lie in the cache meanwhile.
const BATCH: usize = 64 * 1024;

/// Bytes taken off the socket at a time.
const TAKEN: usize = 64 * 1024;

/// Bytes of a record that may lie in the state while the rest of it is on its way, or
/// more.
pub(crate) const RECORD: usize = 20 * 1024;

pub(crate) struct Secured {
    tls: Mutex<Tls>,
    /// Of the thread that reads.
    came: Mutex<Came>,
}

impl Secured {
    /// Shakes hands. `first`: what of the peer's words was read already.
    pub(crate) fn greet(
        mut tls: Tls,
        stream: &TcpStream,
        first: &[u8],
        limit: Duration,
    ) -> io::Result<Self> {
        // What is encrypted is sent at once; it never piles up.
        tls.set_buffer_limit(None);
        let mut came = Came::new(first);
        let until = Instant::now() + limit;
        loop {
            while tls.wants_write() {
                tls.write_tls(&mut &*stream)?;
            }
            if !tls.is_handshaking() {
                break;
            }
            if came.is_empty() {
                came.fill(Until { stream, until })?;
            }
            if let Err(error) = came.feed(&mut tls) {
                // The peer is told; where it is gone, there is nobody to tell.
                let _ = tls.write_tls(&mut &*stream);
                return Err(Untrusted::while_greeting(error));
            }
        }
        Ok(Self {
            tls: Mutex::new(tls),
            came: Mutex::new(came),
        })
    }

    fn tls(&self) -> MutexGuard<'_, Tls> {
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn came(&self) -> MutexGuard<'_, Came> {
        self.came.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the peer has shown.
    pub(crate) fn certificate(&self) -> Option<CertificateDer<'static>> {
        let tls = self.tls();
        Some(tls.peer_certificates()?.first()?.clone().into_owned())
    }

    pub(crate) fn read(&self, mut stream: impl Read, bytes: &mut [u8]) -> io::Result<usize> {
        let mut came = self.came();
        loop {
            let mut tls = self.tls();
            loop {
                match tls.reader().read(bytes) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    read => return read,
                }
                if !came.feed(&mut tls)? {
                    break;
                }
            }
            drop(tls);
            came.fill(&mut stream)?;
        }
    }

    /// What has come, in pieces, as long as `take` is to have more: at most `most` bytes,
    /// and without waiting. The sum of it; 0: nothing is there yet.
    pub(crate) fn read_at_once(
        &self,
        stream: &TcpStream,
        most: usize,
        mut take: impl FnMut(usize, &[u8]),
    ) -> io::Result<usize> {
        let mut came = self.came();
        let mut taken = 0;
        loop {
            let mut tls = self.tls();
            while taken < most {
                let mut reader = tls.reader();
                let n = match reader.fill_buf() {
                    Ok([]) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(piece) => {
                        let piece = &piece[..piece.len().min(most - taken)];
                        take(taken, piece);
                        piece.len()
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                    Err(error) => return Err(error),
                };
                reader.consume(n);
                taken += n;
                if n == 0 && !came.feed(&mut tls)? {
                    break;
                }
            }
            drop(tls);
            if taken == most {
                return Ok(taken);
            }
            match came.fill(AtOnce(stream)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(taken),
                Err(error) => return Err(error),
            }
        }
    }

    pub(crate) fn write_all(&self, stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
        for batch in bytes.chunks(BATCH) {
            self.tls().writer().write_all(batch)?;
            self.flush(stream)?;
        }
        Ok(())
    }

    /// Sends memory that others may change meanwhile: what is sent is what was read of it.
    ///
    /// # Safety
    ///
    /// The parts must be readable.
    pub(crate) unsafe fn write_parts(
        &self,
        stream: &TcpStream,
        parts: &[libc::iovec],
    ) -> io::Result<()> {
        let mut batch: Vec<u8> = Vec::with_capacity(BATCH);
        for part in parts {
            let (from, mut done) = (part.iov_base.cast::<u8>(), 0);
            while done < part.iov_len {
                let n = (part.iov_len - done).min(BATCH - batch.len());
                // SAFETY: `n` bytes are left of the part, which the caller keeps
                // readable, and free in the batch, which is a memory of its own.
                unsafe {
                    let to = batch.as_mut_ptr().add(batch.len());
                    from.add(done).copy_to_nonoverlapping(to, n);
                    batch.set_len(batch.len() + n);
                }
                done += n;
                if batch.len() == BATCH {
                    self.write_all(stream, &batch)?;
                    batch.clear();
                }
            }
        }
        self.write_all(stream, &batch)
    }

    /// Sends what is encrypted.
    fn flush(&self, stream: &TcpStream) -> io::Result<()> {
        loop {
            let mut tls = self.tls();
            loop {
                if !tls.wants_write() {
                    return Ok(());
                }
                match tls.write_tls(&mut AtOnce(stream)) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(_) => {}
                    Err(error) => match error.kind() {
                        io::ErrorKind::WouldBlock => break,
                        io::ErrorKind::Interrupted => {}
                        _ => return Err(error),
                    },
                }
            }
            drop(tls);
            wait_for(stream, libc::POLLOUT)?;
        }
    }
}

/// Bytes off the socket that are not decrypted yet.
struct Came {
    bytes: Box<[u8]>,
    at: usize,
    end: usize,
}

impl Came {
    /// `first` is shorter than what is taken at a time.
    fn new(first: &[u8]) -> Self {
        let mut bytes = vec![0; TAKEN].into_boxed_slice();
        bytes[..first.len()].copy_from_slice(first);
        Self {
            bytes,
            at: 0,
            end: first.len(),
        }
    }

    fn is_empty(&self) -> bool {
        self.at == self.end
    }

    /// Takes what is there, once all that came before is used up.
    fn fill(&mut self, mut from: impl Read) -> io::Result<()> {
        loop {
            match from.read(&mut self.bytes) {
                Ok(0) => {
                    let closed = "the peer has closed the connection";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, closed));
                }
                Ok(n) => {
                    (self.at, self.end) = (0, n);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Decrypts a step further; false: nothing is left to decrypt. To be called where
    /// no decrypted bytes are left, for the state keeps few of them.
    fn feed(&mut self, tls: &mut Tls) -> io::Result<bool> {
        let mut rest = &self.bytes[self.at..self.end];
        if rest.is_empty() {
            return Ok(false);
        }
        // 0: the peer has said that it will say no more.
        if tls.read_tls(&mut rest)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at = self.end - rest.len();
        tls.process_new_packets()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(true)
    }
}

/// The socket, without waiting for it.
struct AtOnce<'a>(&'a TcpStream);

impl Read for AtOnce<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let (to, len) = (bytes.as_mut_ptr().cast(), bytes.len());
        // SAFETY: the kernel writes at most `len` bytes to the borrowed buffer.
        let n = unsafe { libc::recv(self.0.as_raw_fd(), to, len, libc::MSG_DONTWAIT) };
        match usize::try_from(n) {
            Ok(n) => Ok(n),
            Err(_) => Err(retry().err().unwrap_or(io::ErrorKind::Interrupted.into())),
        }
    }
}

impl Write for AtOnce<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        SockRef::from(self.0).send_vectored_with_flags(parts, flags)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
