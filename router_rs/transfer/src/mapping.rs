//! A pool's file in memory, and what lies where in it.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::atomic::AtomicU64,
};

use crate::{error::PoolError, huge_pages::HUGE};

/// Bytes before the slot versions, and what the data begins at a multiple of.
pub(crate) const PAGE: usize = 4096;

/// A mapping and what lies where in it.
pub(crate) struct Mapping {
    pub(crate) base: NonNull<u8>,
    /// Where slot 0 begins.
    pub(crate) data: usize,
    pub(crate) blocks: u32,
    pub(crate) block_bytes: usize,
    /// Addresses that are held; the file lies inside, at a multiple of `HUGE`.
    reserved: NonNull<libc::c_void>,
    reserved_len: usize,
}

// SAFETY: the mapping is memory of no thread in particular; versions are
// atomics, and blocks are reached through raw pointers only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: what `reserve` held, the file's mapping in it included,
        // unmapped once.
        unsafe { libc::munmap(self.reserved.as_ptr(), self.reserved_len) };
    }
}

/// Where the data begins, and the file's length; `None`: no such pool.
pub(crate) fn layout(blocks: u64, block_bytes: u64) -> Option<(usize, usize)> {
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
    isize::try_from(len.checked_add(HUGE)?).ok()?;
    Some((data, len))
}

fn mapped(address: *mut libc::c_void) -> Result<NonNull<libc::c_void>, PoolError> {
    NonNull::new(address)
        .filter(|address| address.as_ptr() != libc::MAP_FAILED)
        .ok_or_else(|| PoolError::os("mmap"))
}

impl Mapping {
    /// Maps all of `fd`, at a multiple of `HUGE`: only there can the file's
    /// huge pages be mapped as such.
    pub(crate) fn new(
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
        let reserved_len = len + HUGE;
        // SAFETY: fresh addresses that nothing can be read from.
        let reserved = mapped(unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved_len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        })?;
        let start = reserved.cast::<u8>();
        let skipped = start.addr().get().next_multiple_of(HUGE) - start.addr().get();
        let this = Self {
            // SAFETY: less than HUGE is skipped, and so much more was reserved.
            base: unsafe { start.add(skipped) },
            data,
            blocks: u32::try_from(blocks).map_err(|_| size)?,
            block_bytes: usize::try_from(block_bytes).unwrap_or(0),
            reserved,
            reserved_len,
        };
        // SAFETY: over addresses that were reserved above and that nobody else
        // knows.
        let base = mapped(unsafe {
            libc::mmap(
                this.base.as_ptr().cast(),
                len,
                prot,
                libc::MAP_SHARED | libc::MAP_FIXED,
                fd.as_raw_fd(),
                0,
            )
        })?;
        // SAFETY: the range just mapped. Only advice: an error changes nothing.
        unsafe { libc::madvise(base.as_ptr(), len, libc::MADV_HUGEPAGE) };
        Ok(this)
    }

    pub(crate) fn version(&self, slot: u32) -> Option<&AtomicU64> {
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

    /// Where a slot lies in the file.
    pub(crate) fn place(&self, slot: u32) -> Option<std::ops::Range<usize>> {
        (slot < self.blocks).then(|| {
            let begin = self.data + slot as usize * self.block_bytes;
            begin..begin + self.block_bytes
        })
    }

    pub(crate) fn block(&self, slot: u32) -> Option<*mut u8> {
        let place = self.place(slot)?;
        // SAFETY: inside the mapping by its layout.
        Some(unsafe { self.base.as_ptr().add(place.start) })
    }

    pub(crate) fn no_slot(&self, slot: u32) -> PoolError {
        PoolError::Slot {
            slot,
            blocks: self.blocks,
        }
    }
}
