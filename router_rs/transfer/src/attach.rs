//! Giving a pool's descriptor to a peer on the same host.
//!
//! Over a unix socket in the abstract namespace: it has no file, so a kill -9
//! leaves none, and another network namespace does not see it and falls back
//! to TCP. The name is random and told in the handshake alone; besides, each
//! side checks that the other has its own uid.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    time::Duration,
};

use crate::{
    error::PoolError,
    pool::{KvPool, PeerPool, PoolId},
};

/// Longest wait on this socket: the message is tiny and the peer is near.
const PATIENCE: Duration = Duration::from_secs(1);

fn failed(what: &'static str) -> impl Fn(io::Error) -> PoolError {
    move |source| PoolError::Os { what, source }
}

/// A listener under a fresh random name.
pub(crate) fn listen() -> Result<(UnixListener, String), PoolError> {
    let mut random = [0_u8; 16];
    getrandom::fill(&mut random).map_err(|error| PoolError::Os {
        what: "getrandom",
        source: io::Error::other(error.to_string()),
    })?;
    let name = format!("kvmesh-{}", crate::id::TransferId(random));
    let address = SocketAddr::from_abstract_name(&name).map_err(failed("unix address"))?;
    let listener = UnixListener::bind_addr(&address).map_err(failed("bind(unix)"))?;
    Ok((listener, name))
}

/// Gives the pool to one who connected, if it is of our user.
pub(crate) fn give(stream: &UnixStream, pool: &KvPool) -> Result<(), PoolError> {
    same_user(stream.as_fd())?;
    stream
        .set_write_timeout(Some(PATIENCE))
        .map_err(failed("setsockopt"))?;
    send_descriptor(stream.as_fd(), pool.file(), &pool.id())
}

/// Fetches a peer's pool by the name of its socket and maps it.
///
/// # Errors
///
/// Where it cannot be reached, is another user's, or is not as described:
/// reasons to fall back to TCP.
pub(crate) fn take(name: &str, blocks: u64, block_bytes: u64) -> Result<PeerPool, PoolError> {
    let address = SocketAddr::from_abstract_name(name).map_err(failed("unix address"))?;
    let stream = UnixStream::connect_addr(&address).map_err(failed("connect(unix)"))?;
    same_user(stream.as_fd())?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .map_err(failed("setsockopt"))?;
    let (fd, id) = receive_descriptor(stream.as_fd())?;
    PeerPool::open(fd.as_fd(), id, blocks, block_bytes)
}

fn same_user(socket: BorrowedFd<'_>) -> Result<(), PoolError> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel fills at most `len` bytes of `peer`.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    if rc < 0 {
        return Err(PoolError::os("SO_PEERCRED"));
    }
    // SAFETY: a plain call that cannot fail.
    if peer.uid == unsafe { libc::geteuid() } {
        Ok(())
    } else {
        Err(PoolError::Uid(peer.uid))
    }
}

/// Room for one descriptor as ancillary data, aligned as its header asks.
#[repr(align(8))]
struct Ancillary([u8; 64]);

/// A message of 16 bytes with room for a descriptor.
///
/// Both borrowed parts must outlive the header.
fn message(part: &mut libc::iovec, room: &mut Ancillary, len: usize) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr (null pointers, no lengths).
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = part;
    header.msg_iovlen = 1;
    header.msg_control = room.0.as_mut_ptr().cast();
    header.msg_controllen = len as _;
    header
}

fn send_descriptor(
    socket: BorrowedFd<'_>,
    fd: BorrowedFd<'_>,
    id: &PoolId,
) -> Result<(), PoolError> {
    let mut id = *id;
    let mut room = Ancillary([0; 64]);
    let mut part = libc::iovec {
        iov_base: id.as_mut_ptr().cast(),
        iov_len: id.len(),
    };
    // SAFETY: a computation on a length.
    let space = unsafe { libc::CMSG_SPACE(size_of::<libc::c_int>() as u32) } as usize;
    let header = message(&mut part, &mut room, space);
    // SAFETY: `room` is larger than CMSG_SPACE of one descriptor, so the first
    // header and its data lie inside it.
    let sent = unsafe {
        let first = libc::CMSG_FIRSTHDR(&raw const header);
        (*first).cmsg_level = libc::SOL_SOCKET;
        (*first).cmsg_type = libc::SCM_RIGHTS;
        (*first).cmsg_len = libc::CMSG_LEN(size_of::<libc::c_int>() as u32) as _;
        libc::CMSG_DATA(first)
            .cast::<libc::c_int>()
            .write_unaligned(fd.as_raw_fd());
        libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL)
    };
    if sent == id.len() as isize {
        Ok(())
    } else {
        Err(PoolError::os("sendmsg"))
    }
}

fn receive_descriptor(socket: BorrowedFd<'_>) -> Result<(OwnedFd, PoolId), PoolError> {
    let mut id = PoolId::default();
    let mut room = Ancillary([0; 64]);
    let mut part = libc::iovec {
        iov_base: id.as_mut_ptr().cast(),
        iov_len: id.len(),
    };
    // Room for exactly one: the kernel closes what does not fit.
    // SAFETY: a computation on a length.
    let space = unsafe { libc::CMSG_SPACE(size_of::<libc::c_int>() as u32) } as usize;
    let mut header = message(&mut part, &mut room, space);
    // SAFETY: the header points to live memory of the stated lengths.
    let got = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &raw mut header,
            libc::MSG_CMSG_CLOEXEC | libc::MSG_WAITALL,
        )
    };
    if got < 0 {
        return Err(PoolError::os("recvmsg"));
    }
    // SAFETY: the kernel wrote what msg_controllen says; CMSG_FIRSTHDR checks
    // it against a header's size, and the length below is that of one int.
    let fd = unsafe {
        let first = libc::CMSG_FIRSTHDR(&raw const header);
        if first.is_null()
            || (*first).cmsg_level != libc::SOL_SOCKET
            || (*first).cmsg_type != libc::SCM_RIGHTS
            || (*first).cmsg_len as usize
                != libc::CMSG_LEN(size_of::<libc::c_int>() as u32) as usize
        {
            return Err(PoolError::Foreign("no descriptor came"));
        }
        OwnedFd::from_raw_fd(
            libc::CMSG_DATA(first)
                .cast::<libc::c_int>()
                .read_unaligned(),
        )
    };
    if got == id.len() as isize {
        Ok((fd, id))
    } else {
        Err(PoolError::Foreign("a short message"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_pool_passes_over_the_socket() {
        let pool = KvPool::new(3, 8192, false).unwrap();
        // SAFETY: a slot of 8,192 bytes.
        unsafe { pool.block(1).unwrap().write_bytes(9, 8192) };
        let (listener, name) = listen().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| give(&listener.accept().unwrap().0, &pool).unwrap());
            let peer = take(&name, 3, 8192).unwrap();
            let own = KvPool::new(3, 8192, false).unwrap();
            assert_eq!(
                peer.copy(1, &own, 2).unwrap(),
                (own.checksum(2).unwrap(), 0)
            );
            assert_eq!(own.checksum(2).unwrap(), pool.checksum(1).unwrap());
        });
        drop(listener);
        assert!(take(&name, 3, 8192).is_err());
    }

    #[test]
    fn what_is_no_pool_is_refused() {
        let (listener, name) = listen().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (stream, _) = listener.accept().unwrap();
                let file = std::fs::File::open("/proc/self/exe").unwrap();
                send_descriptor(stream.as_fd(), file.as_fd(), &[1; 16]).unwrap();
                // Then one who says nothing.
                drop(listener.accept().unwrap());
            });
            assert!(matches!(take(&name, 3, 8192), Err(PoolError::Foreign(_))));
            assert!(take(&name, 3, 8192).is_err());
        });
    }
}
