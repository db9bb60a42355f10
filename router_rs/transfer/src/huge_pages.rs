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
//! a pool takes no more memory than it needs. It takes some 4 ms, and the room
//! of a long prompt has a hundred of them: half a second during which an engine
//! that waited would make no token. So a thread of the pool's own does it, at low
//! priority, and nobody waits: until it is done, and while it is being done, the
//! range is there in small pages. What the kernel refuses stays in them and is
//! counted; after many refusals in a row nobody asks again.

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use crate::{
    error::PoolError,
    mapping::{Mapping, PAGE},
};

/// Bytes of a huge page: of a PMD on x86-64, and on Arm with 4 KiB pages. Where
/// the kernel's are larger, it refuses.
pub(crate) const HUGE: usize = 2 << 20;

/// Refusals in a row after which the kernel is not asked again: each costs a
/// search for free memory.
const PATIENCE: u32 = 16;

/// Times that a range is tried whose pages are in use just then.
const TRIES: u32 = 4;

/// Of the thread, as nice(2) counts: it gets a tenth of a core that others want.
const NICE: libc::c_int = 10;

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

    /// Makes huge pages under bytes `from` to `upto` of the file where nobody
    /// has asked for them before. `map` is the owner's writable mapping.
    pub(crate) fn take(&self, map: &Mapping, from: usize, upto: usize) {
        self.new_ranges(from, upto)
            .for_each(|range| self.collapse(map, range));
    }

    /// Takes the memory of bytes `from`, at a page's begin, to `upto` of the file: what is not
    /// huge then is there in small pages.
    pub(crate) fn populate(
        &self,
        map: &Mapping,
        from: usize,
        upto: usize,
    ) -> Result<(), PoolError> {
        self.take(map, from, upto);
        let len = upto.next_multiple_of(PAGE) - from;
        // SAFETY: whole pages of the owner's mapping, which is writable: the file ends at a
        // multiple of them.
        let rc = unsafe {
            libc::madvise(
                map.base.as_ptr().add(from).cast(),
                len,
                libc::MADV_POPULATE_WRITE,
            )
        };
        if rc < 0 {
            return Err(PoolError::os("madvise(MADV_POPULATE_WRITE)"));
        }
        Ok(())
    }

    /// Ranges under these bytes that nobody has asked for; from then on somebody has.
    fn new_ranges(&self, from: usize, upto: usize) -> impl Iterator<Item = usize> {
        (from / HUGE..upto.div_ceil(HUGE).min(self.asked.len())).filter(|range| {
            let asked = &self.asked[*range];
            // The load alone, for a range is asked for once and met often.
            !asked.load(Ordering::Relaxed) && !asked.swap(true, Ordering::Relaxed)
        })
    }

    fn collapse(&self, map: &Mapping, range: usize) {
        if self.in_a_row.load(Ordering::Relaxed) >= PATIENCE {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut tried = Self::try_collapse(map, range);
        for _ in 1..TRIES {
            match &tried {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::yield_now();
                    tried = Self::try_collapse(map, range);
                }
                _ => break,
            }
        }
        if let Err(error) = tried {
            self.refused.fetch_add(1, Ordering::Relaxed);
            self.in_a_row.fetch_add(1, Ordering::Relaxed);
            *lock(&self.refusal) = error.to_string();
            return;
        }
        self.made.fetch_add(1, Ordering::Relaxed);
        self.in_a_row.store(0, Ordering::Relaxed);
    }

    fn try_collapse(map: &Mapping, range: usize) -> io::Result<()> {
        let wanted = [libc::MADV_POPULATE_WRITE, libc::MADV_COLLAPSE];
        let touched = [PAGE, HUGE];
        for (advice, len) in wanted.into_iter().zip(touched) {
            // SAFETY: a whole range of the writable mapping (`asked` has no
            // others). The first touches one page; the second changes what
            // pages the content lies in, not the content, also under readers
            // and writers.
            let rc =
                unsafe { libc::madvise(map.base.as_ptr().add(range * HUGE).cast(), len, advice) };
            if rc < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// What came of it so far.
    pub(crate) fn used(&self) -> HugeUse {
        HugeUse {
            bytes: self.made.load(Ordering::Relaxed) * HUGE,
            refused_bytes: self.refused.load(Ordering::Relaxed) * HUGE,
            refusal: lock(&self.refusal).clone(),
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // No panic leaves what these hold half changed.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread that makes a pool's pages huge. Dropping it ends the thread, whatever is left.
pub(crate) struct Pager {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// All that both sides write is atomic, so that ThreadSanitizer can follow it: it sees
/// nothing of what mutexes of the standard library order.
struct Shared {
    map: Arc<Mapping>,
    pages: Arc<HugePages>,
    stop: AtomicBool,
    /// As `HugePages::asked`: those that the thread has not begun.
    wanted: Vec<AtomicBool>,
    /// Ranges that were asked for and are not done.
    left: AtomicUsize,
    waits: Mutex<()>,
    done: Condvar,
}

impl Pager {
    /// `map` is the owner's writable mapping.
    ///
    /// # Errors
    ///
    /// Where there can be no more threads.
    pub(crate) fn start(map: Arc<Mapping>, pages: Arc<HugePages>) -> io::Result<Self> {
        let wanted = pages.asked.iter().map(|_| AtomicBool::new(false)).collect();
        let shared = Arc::new(Shared {
            map,
            pages,
            stop: AtomicBool::new(false),
            wanted,
            left: AtomicUsize::new(0),
            waits: Mutex::new(()),
            done: Condvar::new(),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("kv-pages".into())
            .spawn(move || of_thread.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Has huge pages made under bytes `from` to `upto` of the file where nobody has asked
    /// for them before. Waits for nothing.
    pub(crate) fn want(&self, from: usize, upto: usize) {
        let mut more = false;
        for range in self.shared.pages.new_ranges(from, upto) {
            self.shared.left.fetch_add(1, Ordering::AcqRel);
            self.shared.wanted[range].store(true, Ordering::Release);
            more = true;
        }
        if more && let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Until all that was asked for is done.
    pub(crate) fn wait(&self) {
        let mut waits = lock(&self.shared.waits);
        while self.shared.left.load(Ordering::Acquire) > 0 {
            let woken = self.shared.done.wait(waits);
            waits = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It has no way to panic; if it did, the pages would stay small.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        // SAFETY: plain calls; 0 is the calling thread. Where the kernel refuses, it runs as
        // urgently as others.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
        while !self.stop.load(Ordering::Acquire) {
            if !self.pass() {
                // An unpark since the pass began ends it at once.
                std::thread::park();
            }
        }
    }

    /// Does what is wanted; whether there was anything.
    fn pass(&self) -> bool {
        let mut some = false;
        for (range, wanted) in self.wanted.iter().enumerate() {
            if self.stop.load(Ordering::Acquire) {
                break;
            }
            if wanted.load(Ordering::Relaxed) && wanted.swap(false, Ordering::AcqRel) {
                self.pages.collapse(&self.map, range);
                self.is_done();
                some = true;
            }
        }
        some
    }

    fn is_done(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Whoever looks at the number does so under this.
            drop(lock(&self.waits));
            self.done.notify_all();
        }
    }
}
