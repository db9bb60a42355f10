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
//!
//! Memory is taken when blocks are first used, and then in huge pages where the
//! kernel gives them (see `huge_pages`).

use std::{
    ffi::CStr,
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use crate::{
    checksum,
    error::PoolError,
    huge_pages::{HugePages, HugeUse, Pager},
    mapping::{Mapping, PAGE, layout},
};

const MAGIC: u64 = u64::from_le_bytes(*b"kvmpool1");
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

/// A pool that this process owns.
pub struct KvPool {
    fd: OwnedFd,
    map: Arc<Mapping>,
    id: PoolId,
    huge: Arc<HugePages>,
    /// `None`: all of its memory is there, or none is to be huge.
    pager: Option<Pager>,
}

impl KvPool {
    /// Makes a pool of zeroes: `blocks` slots of `block_bytes` bytes.
    /// `populate` takes all memory now; else it is taken when blocks come into use.
    /// It comes in huge pages where the kernel gives them, soon after `raise`.
    ///
    /// # Errors
    ///
    /// Where the sizes make no sense or the kernel refuses.
    pub fn new(blocks: u64, block_bytes: u64, populate: bool) -> Result<Self, PoolError> {
        Self::with_pages(blocks, block_bytes, populate, true)
    }

    /// As `new`; with `huge` false in small pages.
    ///
    /// # Errors
    ///
    /// As `new`.
    pub fn with_pages(
        blocks: u64,
        block_bytes: u64,
        populate: bool,
        huge: bool,
    ) -> Result<Self, PoolError> {
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
        let map = Arc::new(map);
        let pages = Arc::new(HugePages::new(len, huge));
        if populate {
            pages.populate(&map, 0, len)?;
        } else {
            // The first range at once: it tells whether the kernel gives any.
            pages.take(&map, 0, 1);
        }
        // SAFETY: a plain call on our own descriptor. After mapping, since
        // FUTURE_WRITE would refuse the writable mapping.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } < 0 {
            return Err(PoolError::os("F_ADD_SEALS"));
        }
        let mut pool = Self {
            fd,
            map,
            id,
            huge: pages,
            pager: None,
        };
        if huge && !populate {
            let pager = Pager::start(Arc::clone(&pool.map), Arc::clone(&pool.huge));
            pool.pager = Some(pager.map_err(|source| PoolError::Os {
                what: "starting a thread",
                source,
            })?);
        }
        Ok(pool)
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

    /// How much of the pool lies in huge pages by now.
    #[must_use]
    pub fn huge(&self) -> HugeUse {
        self.huge.used()
    }

    /// Takes the memory of slots now, as huge as it gets: later their first use would take
    /// it. Of slots in use it changes nothing.
    ///
    /// # Errors
    ///
    /// Where one of the slots does not exist, or the kernel has no memory.
    pub fn populate(&self, slots: Range<u32>) -> Result<(), PoolError> {
        let Some(last) = slots.end.checked_sub(1).filter(|last| *last >= slots.start) else {
            return Ok(());
        };
        let first = self.map.place(slots.start);
        let last = self.map.place(last).ok_or_else(|| self.map.no_slot(last))?;
        let from = first.map_or(last.start, |place| place.start) / PAGE * PAGE;
        self.huge.populate(&self.map, from, last.end)
    }

    /// Waits until memory of all slots that came into use is as huge as it gets: for who
    /// times what lies in it.
    pub fn wait_for_pages(&self) {
        if let Some(pager) = &self.pager {
            pager.wait();
        }
    }

    /// Raises the version of slots before they are written anew. All or none.
    /// Memory of slots that were never in use is taken soon, or when they are written.
    ///
    /// # Errors
    ///
    /// Where one of the slots does not exist.
    pub fn raise(&self, slots: &[u32]) -> Result<(), PoolError> {
        if let Some(slot) = slots.iter().find(|slot| **slot >= self.map.blocks) {
            return Err(self.map.no_slot(*slot));
        }
        for place in slots.iter().filter_map(|slot| self.map.place(*slot)) {
            if let Some(pager) = &self.pager {
                pager.want(place.start, place.end);
            }
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
    use crate::huge_pages::HUGE;

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

    /// Slots of 300 KiB: most lie in one huge page, some in two.
    const SLOT: usize = 300 << 10;

    #[test]
    fn memory_is_taken_as_blocks_come_into_use() {
        let pool = KvPool::new(64, SLOT as u64, false).unwrap();
        let told = |pool: &KvPool| {
            pool.wait_for_pages();
            let used = pool.huge();
            assert_eq!(used.refused_bytes == 0, used.refusal.is_empty());
            used.bytes + used.refused_bytes
        };
        assert_eq!(told(&pool), HUGE, "the first range, as a trial");
        pool.raise(&[0, 1]).unwrap();
        assert_eq!(told(&pool), HUGE);
        // All of slot 21 lies in the fourth range.
        pool.raise(&[21]).unwrap();
        pool.raise(&[21]).unwrap();
        assert_eq!(told(&pool), 2 * HUGE);
        pool.raise(&(0..64).collect::<Vec<_>>()).unwrap();
        // What is left at the end is no whole huge page.
        assert_eq!(told(&pool), 64 * SLOT / HUGE * HUGE);
        let small = KvPool::with_pages(64, SLOT as u64, true, false).unwrap();
        assert_eq!(told(&small), 0);
    }

    #[test]
    fn content_and_readers_outlast_a_change_of_pages() {
        let pool = KvPool::new(64, SLOT as u64, false).unwrap();
        let peer = PeerPool::open(pool.file(), pool.id(), 64, SLOT as u64).unwrap();
        let own = KvPool::new(64, SLOT as u64, true).unwrap();
        let slots: Vec<u32> = (0..64).collect();
        for slot in &slots {
            // SAFETY: a slot of SLOT bytes.
            unsafe { pool.block(*slot).unwrap().write_bytes(*slot as u8, SLOT) };
            peer.copy(*slot, &own, *slot).unwrap();
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..3 {
                    for slot in &slots {
                        let (copied, _) = peer.copy(*slot, &own, *slot).unwrap();
                        assert_eq!(copied, pool.checksum(*slot).unwrap());
                    }
                }
            });
            for slot in &slots {
                pool.raise(&[*slot]).unwrap();
            }
        });
        // Written while its pages are being changed.
        let fresh = KvPool::new(64, SLOT as u64, false).unwrap();
        fresh.raise(&slots).unwrap();
        for slot in &slots {
            // SAFETY: a slot of SLOT bytes.
            unsafe { fresh.block(*slot).unwrap().write_bytes(*slot as u8, SLOT) };
        }
        fresh.wait_for_pages();
        pool.wait_for_pages();
        for slot in slots {
            let stored = vec![slot as u8; SLOT];
            // SAFETY: SLOT bytes on both sides.
            let same = unsafe { checksum::hash(stored.as_ptr(), SLOT) };
            assert_eq!(pool.checksum(slot).unwrap(), same);
            assert_eq!(own.checksum(slot).unwrap(), same);
            assert_eq!(fresh.checksum(slot).unwrap(), same);
        }
    }

    #[test]
    fn memory_can_be_taken_ahead_of_use() {
        let pool = KvPool::new(64, SLOT as u64, false).unwrap();
        // SAFETY: a slot of SLOT bytes.
        unsafe { pool.block(9).unwrap().write_bytes(9, SLOT) };
        pool.populate(3..3).unwrap();
        pool.populate(0..30).unwrap();
        pool.populate(30..64).unwrap();
        let used = pool.huge();
        assert_eq!(used.bytes + used.refused_bytes, 64 * SLOT / HUGE * HUGE);
        // SAFETY: the last byte of slots that are mapped.
        let bytes = [9, 63].map(|slot| unsafe { *pool.block(slot).unwrap().add(SLOT - 1) });
        assert_eq!(bytes, [9, 0]);
        assert!(matches!(
            pool.populate(60..65),
            Err(PoolError::Slot { slot: 64, .. })
        ));
    }

    #[test]
    fn a_pool_takes_its_thread_with_it() {
        let pool = KvPool::new(2_000, SLOT as u64, false).unwrap();
        pool.raise(&(0..2_000).collect::<Vec<_>>()).unwrap();
        let pages = Arc::clone(&pool.huge);
        drop(pool);
        assert_eq!(Arc::strong_count(&pages), 1, "nobody else has them");
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
