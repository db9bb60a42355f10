//! The KV pool: block slots in a sealed memfd, with a version for each slot.
//!
//! ```text
//! 0      header: magic, geometry, id of the pool
//! 4096   slot versions, one u64 a slot
//! data   slot 0 | slot 1 | ...      (page aligned, `block_bytes` each)
//! ```
//!
//! The owner maps the memory read-write and then seals the file against
//! growing, shrinking, *future* writers and further seals. A peer that gets the
//! descriptor can only map it read-only, and no one can cut the file short
//! under a reader. The memory goes with the last mapping: a kill -9 leaves
//! nothing behind.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering, fence},
};

use crate::{checksum, error::PoolError};

const MAGIC: u64 = u64::from_le_bytes(*b"kvmpool1");
const PAGE: usize = 4096;
const SEALS: libc::c_int =
    libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
const NAME: &CStr = c"kvmesh-kv";

/// Random name of a pool, known to who was told it in a handshake.
pub type PoolId = [u8; 16];

#[repr(C)]
struct Header {
    magic: u64,
    blocks: u64,
    block_bytes: u64,
    data: u64,
    id: PoolId,
}

/// A mapping and what lies where in it.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
    data: usize,
    blocks: u32,
    block_bytes: usize,
}

// SAFETY: the mapping is memory of no thread in particular; versions are
// atomics, and blocks are reached through raw pointers only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are what mmap returned, unmapped once.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

fn layout(blocks: u64, block_bytes: u64) -> Option<(usize, usize)> {
    let blocks = usize::try_from(blocks).ok().filter(|n| *n > 0)?;
    let block_bytes = usize::try_from(block_bytes).ok().filter(|n| *n > 0)?;
    u32::try_from(blocks).ok()?;
    let data = blocks
        .checked_mul(8)?
        .checked_add(PAGE)?
        .checked_next_multiple_of(PAGE)?;
    let len = blocks
        .checked_mul(block_bytes)?
        .checked_add(data)?
        .checked_next_multiple_of(PAGE)?;
    libc::off_t::try_from(len).ok()?;
    isize::try_from(len).ok()?;
    Some((data, len))
}

impl Mapping {
    fn new(
        fd: BorrowedFd<'_>,
        blocks: u64,
        block_bytes: u64,
        prot: libc::c_int,
    ) -> Result<Self, PoolError> {
        let size = PoolError::Size {
            blocks,
            block_bytes,
        };
        let Some((data, len)) = layout(blocks, block_bytes) else {
            return Err(size);
        };
        // SAFETY: a fresh shared mapping of an open descriptor.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                prot,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        let base = match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => base,
            _ => return Err(PoolError::os("mmap")),
        };
        // SAFETY: the range just mapped. Only advice: an error changes nothing.
        unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        Ok(Self {
            base,
            len,
            data,
            blocks: u32::try_from(blocks).map_err(|_| size)?,
            block_bytes: usize::try_from(block_bytes).unwrap_or(0),
        })
    }

    fn version(&self, slot: u32) -> Option<&AtomicU64> {
        (slot < self.blocks).then(|| {
            // SAFETY: `blocks` aligned u64 lie from PAGE on, inside the
            // mapping; they are only ever reached as atomics. (On a read-only
            // mapping only loads happen.)
            unsafe {
                &*self
                    .base
                    .as_ptr()
                    .add(PAGE + 8 * slot as usize)
                    .cast::<AtomicU64>()
            }
        })
    }

    fn block(&self, slot: u32) -> Option<*mut u8> {
        (slot < self.blocks).then(|| {
            // SAFETY: inside the mapping by its layout.
            unsafe {
                self.base
                    .as_ptr()
                    .add(self.data + slot as usize * self.block_bytes)
            }
        })
    }

    fn no_slot(&self, slot: u32) -> PoolError {
        PoolError::Slot {
            slot,
            blocks: self.blocks,
        }
    }
}

/// A pool that this process owns.
pub struct KvPool {
    fd: OwnedFd,
    map: Mapping,
    id: PoolId,
}

impl KvPool {
    /// Makes a pool of zeroes: `blocks` slots of `block_bytes` bytes.
    /// `populate` touches each page now.
    ///
    /// # Errors
    ///
    /// Where the sizes make no sense or the kernel refuses.
    pub fn new(blocks: u64, block_bytes: u64, populate: bool) -> Result<Self, PoolError> {
        let (data, len) = layout(blocks, block_bytes).ok_or(PoolError::Size {
            blocks,
            block_bytes,
        })?;
        // SAFETY: a plain call with a NUL-terminated name.
        let fd = unsafe {
            libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
        };
        if fd < 0 {
            return Err(PoolError::os("memfd_create"));
        }
        // SAFETY: a descriptor that was just made and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let size = libc::off_t::try_from(len).map_err(|_| PoolError::Size {
            blocks,
            block_bytes,
        })?;
        // SAFETY: plain calls on our own descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size) } < 0 {
            return Err(PoolError::os("ftruncate"));
        }
        let map = Mapping::new(
            fd.as_fd(),
            blocks,
            block_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
        )?;
        let mut id = PoolId::default();
        getrandom::fill(&mut id).map_err(|error| PoolError::Os {
            what: "getrandom",
            source: io::Error::other(error.to_string()),
        })?;
        // SAFETY: the first page of our own fresh mapping; nobody else has it.
        unsafe {
            map.base.as_ptr().cast::<Header>().write(Header {
                magic: MAGIC,
                blocks,
                block_bytes,
                data: data as u64,
                id,
            });
        }
        if populate {
            // SAFETY: our own mapping, writable.
            let rc =
                unsafe { libc::madvise(map.base.as_ptr().cast(), len, libc::MADV_POPULATE_WRITE) };
            if rc < 0 {
                return Err(PoolError::os("madvise(MADV_POPULATE_WRITE)"));
            }
        }
        // SAFETY: a plain call on our own descriptor. After mapping, since
        // FUTURE_WRITE would refuse the writable mapping.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } < 0 {
            return Err(PoolError::os("F_ADD_SEALS"));
        }
        Ok(Self { fd, map, id })
    }

    /// Slots.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.map.blocks
    }

    /// Bytes a slot.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.map.block_bytes
    }

    /// Bytes of all slots.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.map.blocks as usize * self.map.block_bytes
    }

    /// First byte of slot 0. Valid while the pool lives.
    #[must_use]
    pub fn data(&self) -> *mut u8 {
        // SAFETY: inside the mapping by its layout.
        unsafe { self.map.base.as_ptr().add(self.map.data) }
    }

    /// Random name, told in handshakes.
    #[must_use]
    pub fn id(&self) -> PoolId {
        self.id
    }

    /// First byte of a slot.
    ///
    /// # Errors
    ///
    /// Where there is no such slot.
    pub fn block(&self, slot: u32) -> Result<*mut u8, PoolError> {
        self.map.block(slot).ok_or_else(|| self.map.no_slot(slot))
    }

    /// Version of a slot: how often it was taken into use anew.
    ///
    /// # Errors
    ///
    /// Where there is no such slot.
    pub fn version(&self, slot: u32) -> Result<u64, PoolError> {
        let version = self
            .map
            .version(slot)
            .ok_or_else(|| self.map.no_slot(slot))?;
        Ok(version.load(Ordering::Acquire))
    }

    /// Raises the version of slots before they are written anew. All or none.
    ///
    /// # Errors
    ///
    /// Where one of the slots does not exist.
    pub fn raise(&self, slots: &[u32]) -> Result<(), PoolError> {
        if let Some(slot) = slots.iter().find(|slot| **slot >= self.map.blocks) {
            return Err(self.map.no_slot(*slot));
        }
        for version in slots.iter().filter_map(|slot| self.map.version(*slot)) {
            version.fetch_add(1, Ordering::AcqRel);
        }
        // Whoever sees a byte that is written after this sees the version too.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// XXH3-64 of a slot's bytes.
    ///
    /// # Errors
    ///
    /// Where there is no such slot.
    pub fn checksum(&self, slot: u32) -> Result<u64, PoolError> {
        let block = self.block(slot)?;
        // SAFETY: a slot of the mapping, which lives as long as self.
        Ok(unsafe { checksum::hash(block, self.map.block_bytes) })
    }

    /// The sealed file: what peers are given.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A peer's pool, mapped read-only.
pub struct PeerPool {
    map: Mapping,
}

impl PeerPool {
    /// Maps a descriptor that a peer gave, and proves that it is the pool that
    /// its handshake named.
    ///
    /// # Errors
    ///
    /// Where it is not, where a seal is missing, or where the kernel refuses.
    pub fn open(
        fd: BorrowedFd<'_>,
        id: PoolId,
        blocks: u64,
        block_bytes: u64,
    ) -> Result<Self, PoolError> {
        // SAFETY: plain calls on an open descriptor.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
            // Without it the peer could cut the file short under our reads.
            return Err(PoolError::Foreign("not sealed against shrinking"));
        }
        let (_, len) = layout(blocks, block_bytes).ok_or(PoolError::Size {
            blocks,
            block_bytes,
        })?;
        // SAFETY: all-zero is a valid stat, and fstat fills it.
        let size = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            if libc::fstat(fd.as_raw_fd(), &raw mut stat) < 0 {
                return Err(PoolError::os("fstat"));
            }
            stat.st_size
        };
        if usize::try_from(size).ok() != Some(len) {
            return Err(PoolError::Foreign("another size"));
        }
        let map = Mapping::new(fd, blocks, block_bytes, libc::PROT_READ)?;
        // SAFETY: the first page is there; foreign memory, so read by value.
        let header = unsafe { map.base.as_ptr().cast::<Header>().read_volatile() };
        let same = header.magic == MAGIC
            && header.blocks == blocks
            && header.block_bytes == block_bytes
            && header.data == map.data as u64
            && header.id == id;
        if !same {
            return Err(PoolError::Foreign("another header"));
        }
        Ok(Self { map })
    }

    /// Copies a slot of the peer into a slot of `own`. Returns the checksum of
    /// what was stored and the version of the peer's slot after the copy.
    ///
    /// # Errors
    ///
    /// Where one of the slots does not exist or the sizes differ.
    pub fn copy(&self, slot: u32, own: &KvPool, target: u32) -> Result<(u64, u64), PoolError> {
        let source = self.map.block(slot).ok_or_else(|| self.map.no_slot(slot))?;
        let version = self
            .map
            .version(slot)
            .ok_or_else(|| self.map.no_slot(slot))?;
        let target = own.block(target)?;
        if self.map.block_bytes != own.block_bytes() {
            return Err(PoolError::Foreign("another block size"));
        }
        // SAFETY: a slot of each mapping; two mappings do not overlap in
        // address, and a peer's pool is never our own file (its id differs)
        // but in tests of one process, where slots are distinct.
        let checksum = unsafe { checksum::copy(source, target, own.block_bytes()) };
        // The reads above come before this load: see `KvPool::raise`.
        fence(Ordering::SeqCst);
        Ok((checksum, version.load(Ordering::Acquire)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_peer_reads_and_cannot_write_grow_or_shrink() {
        let pool = KvPool::new(4, 5000, true).unwrap();
        // SAFETY: a slot of 5,000 bytes.
        unsafe { pool.block(2).unwrap().write_bytes(7, 5000) };
        let peer = PeerPool::open(pool.file(), pool.id(), 4, 5000).unwrap();
        let own = KvPool::new(1, 5000, false).unwrap();
        assert_eq!(
            peer.copy(2, &own, 0).unwrap(),
            (pool.checksum(2).unwrap(), 0)
        );
        assert_eq!(own.checksum(0).unwrap(), pool.checksum(2).unwrap());
        let fd = pool.file().as_raw_fd();
        // SAFETY: calls that must all be refused.
        unsafe {
            let map = libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            );
            assert_eq!(map, libc::MAP_FAILED);
            assert_eq!(libc::ftruncate(fd, 0), -1);
            assert_eq!(libc::ftruncate(fd, 1 << 30), -1);
            assert_eq!(libc::pwrite(fd, [0_u8; 8].as_ptr().cast(), 8, 0), -1);
            assert_eq!(libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_WRITE), -1);
        }
    }

    #[test]
    fn reuse_shows_in_the_version() {
        let pool = KvPool::new(3, 64, false).unwrap();
        let peer = PeerPool::open(pool.file(), pool.id(), 3, 64).unwrap();
        let own = KvPool::new(1, 64, false).unwrap();
        pool.raise(&[1, 1]).unwrap();
        assert!(matches!(
            pool.raise(&[0, 3]),
            Err(PoolError::Slot { slot: 3, .. })
        ));
        let versions: Vec<u64> = (0..3).map(|i| peer.copy(i, &own, 0).unwrap().1).collect();
        assert_eq!(versions, [0, 2, 0]);
    }

    #[test]
    fn another_pool_is_refused() {
        let pool = KvPool::new(4, 64, false).unwrap();
        assert!(PeerPool::open(pool.file(), [0; 16], 4, 64).is_err());
        assert!(PeerPool::open(pool.file(), pool.id(), 4000, 64).is_err());
        assert!(KvPool::new(0, 64, false).is_err());
        assert!(KvPool::new(u64::MAX, 64, false).is_err());
        assert!(KvPool::new(1 << 31, 1 << 40, false).is_err());
    }
}
