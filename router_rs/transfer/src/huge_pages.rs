//! Huge pages under a pool.
//!
//! Attention and copies that walk a pool in 4 KiB pages reach a third of what
//! memory gives: the processor's prefetchers stop at each page's end, and every
//! page costs a look-up. Kernels give shared memory huge pages only where the
//! administrator says so (`/sys/kernel/mm/transparent_hugepage/shmem_enabled`,
//! on most machines `never`), but a process may ask for them by range:
//! `madvise(MADV_COLLAPSE)`, Linux 6.1, madvise(2). It needs no privilege, works
//! on a sealed file, and wants each range to have been touched.
//!
//! A range is collapsed when one of its blocks is first taken into use, so that
//! a pool takes no more memory than it needs. What the kernel refuses stays in
//! small pages and is counted; after many refusals in a row nobody asks again.

use std::{
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
};

use crate::mapping::Mapping;

/// Bytes of a huge page: of a PMD on x86-64, and on Arm with 4 KiB pages. Where
/// the kernel's are larger, it refuses.
pub(crate) const HUGE: usize = 2 << 20;

/// Refusals in a row after which the kernel is not asked again: each costs a
/// search for free memory.
const PATIENCE: u32 = 16;

/// How much of a pool lies in huge pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugeUse {
    /// Bytes in huge pages.
    pub bytes: usize,
    /// Bytes that the kernel refused to make huge.
    pub refused_bytes: usize,
    /// Why the kernel refused last; empty: it never did.
    pub refusal: String,
}

/// Which ranges of a pool were made huge. From any thread.
pub(crate) struct HugePages {
    /// One a whole range of `HUGE` bytes of the file: whether it was asked for.
    asked: Vec<AtomicBool>,
    made: AtomicUsize,
    refused: AtomicUsize,
    in_a_row: AtomicU32,
    refusal: Mutex<String>,
}

impl HugePages {
    /// For a file of `len` bytes; `wanted` false: none.
    pub(crate) fn new(len: usize, wanted: bool) -> Self {
        let ranges = if wanted { len / HUGE } else { 0 };
        Self {
            asked: (0..ranges).map(|_| AtomicBool::new(false)).collect(),
            made: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            in_a_row: AtomicU32::new(0),
            refusal: Mutex::new(String::new()),
        }
    }

    /// Asks for huge pages under bytes `from` to `upto` of the file where nobody
    /// has before. `map` is the owner's writable mapping.
    pub(crate) fn take(&self, map: &Mapping, from: usize, upto: usize) {
        for range in from / HUGE..upto.div_ceil(HUGE).min(self.asked.len()) {
            let asked = &self.asked[range];
            // The load alone, for a range is asked for once and met often.
            if !asked.load(Ordering::Relaxed) && !asked.swap(true, Ordering::Relaxed) {
                self.collapse(map, range);
            }
        }
    }

    fn collapse(&self, map: &Mapping, range: usize) {
        if self.in_a_row.load(Ordering::Relaxed) >= PATIENCE {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let wanted = [libc::MADV_POPULATE_WRITE, libc::MADV_COLLAPSE];
        let touched = [super::mapping::PAGE, HUGE];
        for (advice, len) in wanted.into_iter().zip(touched) {
            // SAFETY: a whole range of the writable mapping (`asked` has no
            // others). The first touches one page; the second changes what
            // pages the content lies in, not the content, also under readers.
            let rc =
                unsafe { libc::madvise(map.base.as_ptr().add(range * HUGE).cast(), len, advice) };
            if rc < 0 {
                let error = io::Error::last_os_error();
                self.refused.fetch_add(1, Ordering::Relaxed);
                self.in_a_row.fetch_add(1, Ordering::Relaxed);
                *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = error.to_string();
                return;
            }
        }
        self.made.fetch_add(1, Ordering::Relaxed);
        self.in_a_row.store(0, Ordering::Relaxed);
    }

    /// What came of it so far.
    pub(crate) fn used(&self) -> HugeUse {
        HugeUse {
            bytes: self.made.load(Ordering::Relaxed) * HUGE,
            refused_bytes: self.refused.load(Ordering::Relaxed) * HUGE,
            refusal: self
                .refusal
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }
}
