//! The index as its users see it: many readers, none of which waits.

use crate::approximate::Approximate;
use crate::chain::UNIT_TOKENS;
use crate::core::Core;
use crate::worker::{CacheChange, Knowledge, Matches, SlotError, Tier, WorkerSlot};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

/// Tries of a reader before it waits in line. A try fails only if both copies
/// changed roles between two instructions of the reader.
const TRIES: usize = 64;

/// Bounds of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexSettings {
    /// Most bytes that blocks and their holders may take, both copies
    /// together. Above it the blocks that were longest not asked for go.
    pub max_bytes: usize,
    /// Most workers at a time.
    pub max_workers: usize,
}

impl Default for IndexSettings {
    /// 1 GiB: some 25 million blocks.
    fn default() -> Self {
        Self {
            max_bytes: 1 << 30,
            max_workers: 4096,
        }
    }
}

/// How full an index is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IndexStats {
    /// Workers.
    pub workers: usize,
    /// Distinct blocks.
    pub blocks: usize,
    /// (worker, block, tier) triples.
    pub entries: u64,
    /// Distinct sets of holders.
    pub holder_sets: usize,
    /// Bytes taken, both copies and what approximate workers need.
    pub bytes: usize,
    /// Blocks that went because of the bound, since the start.
    pub evicted: u64,
}

/// Which worker holds which prefix. Share it by `Arc`.
///
/// Two copies of the content (left-right, P. Ramalhete and A. Correia): a
/// change is made in the copy that nobody reads, the copies change roles, and
/// it is made in the other one once its last reader has left. So a look-up
/// never waits for a change, and sees each call's changes whole or not at
/// all. Those who change the index take turns.
#[derive(Debug)]
pub struct KvIndex {
    copies: [RwLock<Core>; 2],
    /// Copy that readers take.
    active: AtomicUsize,
    writer: Mutex<Writer>,
    settings: IndexSettings,
}

#[derive(Debug, Default)]
struct Writer {
    workers: BTreeMap<usize, Member>,
    evicted: u64,
}

#[derive(Debug)]
struct Member {
    units: usize,
    approximate: Option<Approximate>,
    /// Blocks of a snapshot that is not whole yet.
    staged: Option<Vec<(u64, Tier)>>,
}

impl KvIndex {
    /// An empty index.
    pub fn new(settings: IndexSettings) -> Self {
        Self {
            copies: [RwLock::new(Core::new()), RwLock::new(Core::new())],
            active: AtomicUsize::new(0),
            writer: Mutex::new(Writer::default()),
            settings,
        }
    }

    /// Takes a worker in; its slot is the lowest free one.
    ///
    /// # Errors
    /// [`SlotError`] for a block size that is no multiple of 16 tokens, and
    /// where all slots are in use.
    pub fn add_worker(
        &self,
        block_tokens: u32,
        knowledge: Knowledge,
    ) -> Result<WorkerSlot, SlotError> {
        let units = block_tokens as usize / UNIT_TOKENS;
        if units == 0 || !(block_tokens as usize).is_multiple_of(UNIT_TOKENS) {
            return Err(SlotError::BlockSize(block_tokens));
        }
        let mut writer = self.writer();
        let slot = (0..self.settings.max_workers)
            .find(|slot| !writer.workers.contains_key(slot))
            .ok_or(SlotError::Full(self.settings.max_workers))?;
        let approximate = match knowledge {
            Knowledge::Events => None,
            Knowledge::Approximate { ttl_ms, max_units } => {
                Some(Approximate::new(ttl_ms, max_units))
            }
        };
        writer.workers.insert(
            slot,
            Member {
                units,
                approximate,
                staged: None,
            },
        );
        self.write(&mut writer, |core| core.add_worker(slot, units));
        Ok(WorkerSlot(slot as u32))
    }

    /// Takes a worker and all its blocks out.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn remove_worker(&self, worker: WorkerSlot) -> Result<(), SlotError> {
        let mut writer = self.writer();
        writer
            .workers
            .remove(&worker.at())
            .ok_or(SlotError::Unknown(worker.0))?;
        self.write(&mut writer, |core| core.remove_worker(worker.at()));
        Ok(())
    }

    /// Makes changes of a worker's cache, in order; look-ups see all of them
    /// or none.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn apply(&self, worker: WorkerSlot, changes: &[CacheChange<'_>]) -> Result<(), SlotError> {
        let mut writer = self.writer();
        let member = member(&mut writer, worker)?;
        if let Some(approximate) = &mut member.approximate
            && changes.contains(&CacheChange::Cleared)
        {
            approximate.clear();
        }
        self.write(&mut writer, |core| core.apply(worker.at(), changes));
        Ok(())
    }

    /// Takes a part of a worker's snapshot. The old view stays in use until
    /// the last part is here, then what the worker holds is exactly what the
    /// parts stored. `first` begins anew.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn snapshot(
        &self,
        worker: WorkerSlot,
        stored: &[CacheChange<'_>],
        first: bool,
        last: bool,
    ) -> Result<(), SlotError> {
        let room = self.settings.max_bytes / size_of::<(u64, Tier)>();
        let mut writer = self.writer();
        let member = member(&mut writer, worker)?;
        if first {
            member.staged = Some(Vec::new());
        }
        let staged = member.staged.get_or_insert_default();
        for change in stored {
            match *change {
                // Hottest come first: what is above the bound is the coldest.
                CacheChange::Stored { chain, tier } => {
                    let take = chain.len().min(room.saturating_sub(staged.len()));
                    staged.extend(chain[..take].iter().map(|value| (*value, tier)));
                }
                CacheChange::Removed { chain, tier } => {
                    let gone: std::collections::HashSet<u64> = chain.iter().copied().collect();
                    staged.retain(|(value, t)| *t != tier || !gone.contains(value));
                }
                CacheChange::Cleared => staged.clear(),
            }
        }
        if last {
            let blocks = member.staged.take().unwrap_or_default();
            self.write(&mut writer, |core| core.replace(worker.at(), &blocks));
        }
        Ok(())
    }

    /// Notes that a prompt with these chain values was sent to a worker that
    /// is known approximately. Nothing for a worker with events.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn record_sent(
        &self,
        worker: WorkerSlot,
        chain: &[u64],
        now_ms: u64,
    ) -> Result<(), SlotError> {
        let mut writer = self.writer();
        let member = member(&mut writer, worker)?;
        let Some(approximate) = &mut member.approximate else {
            return Ok(());
        };
        let units = member.units;
        let ends: Vec<u64> = chain
            .iter()
            .skip(units - 1)
            .step_by(units)
            .copied()
            .collect();
        let (mut expired, mut over) = (Vec::new(), Vec::new());
        approximate.expire(now_ms, &mut expired);
        approximate.sent(&ends, now_ms, &mut over);
        let tier = Tier::Device;
        let changes = [
            CacheChange::Removed {
                chain: &expired,
                tier,
            },
            CacheChange::Stored { chain: &ends, tier },
            CacheChange::Removed { chain: &over, tier },
        ];
        self.write(&mut writer, |core| core.apply(worker.at(), &changes));
        Ok(())
    }

    /// Forgets what approximate workers were sent too long ago. To be called
    /// from time to time; a look-up does not look at the clock.
    pub fn expire(&self, now_ms: u64) {
        let mut writer = self.writer();
        let mut gone: Vec<(usize, Vec<u64>)> = Vec::new();
        for (slot, member) in &mut writer.workers {
            if let Some(approximate) = &mut member.approximate {
                let mut forgotten = Vec::new();
                approximate.expire(now_ms, &mut forgotten);
                if !forgotten.is_empty() {
                    gone.push((*slot, forgotten));
                }
            }
        }
        if !gone.is_empty() {
            self.write(&mut writer, |core| {
                for (slot, chain) in &gone {
                    core.apply(
                        *slot,
                        &[CacheChange::Removed {
                            chain,
                            tier: Tier::Device,
                        }],
                    );
                }
            });
        }
    }

    /// For every worker the longest prefix of a prompt that it holds without
    /// a hole. `chain` is the prompt's, from [`crate::chain_values`].
    pub fn lookup(&self, chain: &[u64]) -> Matches {
        let mut found = Matches::default();
        self.lookup_into(chain, &mut found);
        found
    }

    /// As [`KvIndex::lookup`], into a result that is used again.
    pub fn lookup_into(&self, chain: &[u64], found: &mut Matches) {
        self.reader().lookup(chain, found);
    }

    /// Blocks of a worker that are here, in any tier; 0 for a slot without a
    /// worker. Walks over the sets of holders: not for every request.
    pub fn held(&self, worker: WorkerSlot) -> u64 {
        self.reader().held(worker.at())
    }

    /// How full it is. Walks over the sets of holders: not for every request.
    pub fn stats(&self) -> IndexStats {
        let writer = self.writer();
        let approximate: usize = writer
            .workers
            .values()
            .filter_map(|member| member.approximate.as_ref())
            .map(Approximate::bytes)
            .sum();
        let bytes: usize = (0..2).map(|copy| self.read(copy).bytes()).sum();
        let core = self.reader();
        IndexStats {
            workers: writer.workers.len(),
            blocks: core.blocks(),
            entries: core.entries(),
            holder_sets: core.holder_sets(),
            bytes: bytes + approximate,
            evicted: writer.evicted,
        }
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, copy: usize) -> RwLockReadGuard<'_, Core> {
        self.copies[copy]
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn reader(&self) -> RwLockReadGuard<'_, Core> {
        for _ in 0..TRIES {
            if let Ok(core) = self.copies[self.active.load(Ordering::Acquire)].try_read() {
                return core;
            }
        }
        self.read(self.active.load(Ordering::Acquire))
    }

    /// Makes a change in both copies, then brings them under the bound.
    fn write(&self, writer: &mut Writer, mut change: impl FnMut(&mut Core)) {
        self.write_both(&mut change);
        while 2 * self.reader().charge() > self.settings.max_bytes {
            let active = self.active.load(Ordering::Acquire);
            let victims = {
                let other = self.read(active);
                let mut idle = self.copies[1 - active]
                    .write()
                    .unwrap_or_else(PoisonError::into_inner);
                idle.coldest(Some(&other))
            };
            if victims.is_empty() {
                break;
            }
            writer.evicted += victims.len() as u64;
            self.write_both(&mut |core: &mut Core| core.forget(&victims));
        }
    }

    fn write_both(&self, change: &mut impl FnMut(&mut Core)) {
        let idle = 1 - self.active.load(Ordering::Acquire);
        change(
            &mut self.copies[idle]
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.active.store(idle, Ordering::Release);
        change(
            &mut self.copies[1 - idle]
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

fn member(writer: &mut Writer, worker: WorkerSlot) -> Result<&mut Member, SlotError> {
    writer
        .workers
        .get_mut(&worker.at())
        .ok_or(SlotError::Unknown(worker.0))
}
