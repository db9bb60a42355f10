//! The index as its users see it: many readers, none of which waits.

use crate::absence::Absence;
use crate::approximate::Approximate;
use crate::chain::UNIT_TOKENS;
use crate::core::Core;
use crate::edit::{Batch, Edit, KeptEdit};
use crate::left_right::LeftRight;
use crate::settings::{IndexSettings, IndexStats};
use crate::worker::{CacheChange, Knowledge, Matches, SlotError, Tier, WorkerSlot};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// Values that wait in the log for a reader to leave, at most, and one light
/// change: what is applied in the few milliseconds that a thread can be without
/// its processor. In memory about 10 bytes a value, 1.3 MiB in all; where values
/// that are removed lie each for itself up to 72, which is 9 MiB. No part of
/// [`IndexStats::bytes`].
const LOG_VALUES: usize = 1 << 17;

/// What a block of a snapshot takes while the snapshot is not whole.
const STAGED_BYTES: usize = size_of::<(u64, Tier)>();

/// Which worker holds which prefix. Share it by `Arc`.
///
/// The content is there twice: one copy is read while the other one is changed.
/// So a look-up never waits for a change, and sees each call's changes whole or
/// not at all. It sees them when the call has returned; where another look-up is
/// held up in the middle, at the latest when that one ends. Those who change the
/// index take turns; a snapshot, a worker that goes, a cleared cache and more than
/// 2,048 values at once wait for such a look-up.
#[derive(Debug)]
pub struct KvIndex {
    copies: LeftRight<Core, KeptEdit>,
    absence: Arc<Absence>,
    writer: Mutex<Writer>,
    settings: IndexSettings,
}

#[derive(Debug, Default)]
struct Writer {
    workers: BTreeMap<usize, Member>,
    evicted: u64,
    /// Where the search for cold blocks goes on.
    hand: usize,
    /// Whether what is said of absent blocks has to learn of workers.
    reshaped: bool,
    /// Values that can be stored before the table has to grow, at least.
    room: usize,
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
        let (copies, absence) = Core::pair();
        Self {
            copies: LeftRight::new(copies, LOG_VALUES),
            absence,
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
        self.reshape(&mut writer, Edit::Add(slot, units));
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
        self.reshape(&mut writer, Edit::Drop(worker.at()));
        Ok(())
    }

    /// Makes changes of a worker's cache, in order; look-ups see all of them
    /// or none.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn apply(&self, worker: WorkerSlot, changes: &[CacheChange<'_>]) -> Result<(), SlotError> {
        self.apply_as(&mut self.writer(), worker, changes)
    }

    /// As [`KvIndex::apply`] for blocks that one worker stored, if that is a
    /// matter of microseconds; else nothing is done and this says `None`:
    /// others change the index, a reader is held up, or the table has to grow.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn try_store(
        &self,
        worker: WorkerSlot,
        parent: Option<u64>,
        chain: &[u64],
        tier: Tier,
    ) -> Option<Result<(), SlotError>> {
        let mut writer = match self.writer.try_lock() {
            Ok(writer) => writer,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        if chain.len() > writer.room || self.copies.is_behind() {
            return None;
        }
        let change = match parent {
            Some(parent) => CacheChange::StoredAfter {
                parent,
                chain,
                tier,
            },
            None => CacheChange::Stored { chain, tier },
        };
        Some(self.apply_as(&mut writer, worker, &[change]))
    }

    fn apply_as(
        &self,
        writer: &mut Writer,
        worker: WorkerSlot,
        changes: &[CacheChange<'_>],
    ) -> Result<(), SlotError> {
        let member = member(writer, worker)?;
        if let Some(approximate) = &mut member.approximate
            && changes.contains(&CacheChange::Cleared)
        {
            approximate.clear();
        }
        self.write(writer, Edit::apply(Batch::One(worker.at(), changes)));
        Ok(())
    }

    /// Makes changes of several workers' caches, in order; look-ups see all of
    /// them or none. Faster than one by one.
    ///
    /// # Errors
    /// [`SlotError::Unknown`]; nothing is changed then.
    pub fn apply_many(&self, changes: &[(WorkerSlot, CacheChange<'_>)]) -> Result<(), SlotError> {
        let mut writer = self.writer();
        for (worker, _) in changes {
            member(&mut writer, *worker)?;
        }
        for (worker, change) in changes {
            if let CacheChange::Cleared = change
                && let Some(approximate) = &mut member(&mut writer, *worker)?.approximate
            {
                approximate.clear();
            }
        }
        self.write(&mut writer, Edit::apply(Batch::Many(changes)));
        Ok(())
    }

    /// Takes a part of a worker's snapshot. The old view stays in use until
    /// the last part is here, then what the worker holds is exactly what the
    /// parts stored. `first` begins anew. Parts that wait for their last one are
    /// held within the bound of memory, all workers' together.
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
        let mut writer = self.writer();
        let own = member(&mut writer, worker)?;
        if first {
            own.staged = Some(Vec::new());
        }
        let own = own.staged.as_ref().map_or(0, Vec::len);
        let of_others = staged(&writer) - own;
        let room = (self.settings.max_bytes / STAGED_BYTES).saturating_sub(of_others);
        let member = member(&mut writer, worker)?;
        let staged = member.staged.get_or_insert_default();
        for change in stored {
            match *change {
                // Hottest come first: what is above the bound is the coldest.
                CacheChange::Stored { chain, tier }
                | CacheChange::StoredAfter { chain, tier, .. } => {
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
            self.write(&mut writer, Edit::Replace(worker.at(), &blocks));
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
        self.write(&mut writer, Edit::apply(Batch::One(worker.at(), &changes)));
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
        for (slot, chain) in gone {
            let tier = Tier::Device;
            let changes = [CacheChange::Removed {
                chain: &chain,
                tier,
            }];
            self.write(&mut writer, Edit::apply(Batch::One(slot, &changes)));
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
        match self.absence.slots(chain, &mut found.seen) {
            Some(slots) => found.reset(slots),
            None => self.copies.read(|core| core.lookup(chain, found)),
        }
    }

    /// Worker slots in use so far, free ones included: the length of
    /// [`Matches::by_slot`].
    pub fn slots(&self) -> usize {
        self.copies.read(Core::slots)
    }

    /// Blocks of a worker that are here, in any tier; 0 for a slot without a
    /// worker. Walks over the sets of holders: not for every request.
    pub fn held(&self, worker: WorkerSlot) -> u64 {
        self.copies.read(|core| core.held(worker.at()))
    }

    /// How full it is. Walks over the sets of holders: not for every request.
    pub fn stats(&self) -> IndexStats {
        let writer = self.writer();
        let staged = staged(&writer) * STAGED_BYTES;
        let approximate: usize = writer
            .workers
            .values()
            .filter_map(|member| member.approximate.as_ref())
            .map(Approximate::bytes)
            .sum();
        self.copies.read_both(|core, other| IndexStats {
            workers: writer.workers.len(),
            blocks: core.blocks(),
            entries: core.entries(),
            holder_sets: core.holder_sets(),
            // A copy that is in use now is as large as the other one.
            bytes: core.bytes()
                + other.unwrap_or(core).bytes()
                + core.table_bytes()
                + approximate
                + staged,
            evicted: writer.evicted,
        })
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker comes or goes. Until both copies and all readers agree on that,
    /// nothing is said of absent blocks.
    fn reshape(&self, writer: &mut Writer, edit: Edit<'_>) {
        self.absence.set_shape(0, 0);
        writer.reshaped = true;
        self.write(writer, edit);
    }

    /// Makes a change, then brings the content under the bound.
    fn write(&self, writer: &mut Writer, edit: Edit<'_>) {
        // Looked at on the way: taking a copy once more would cost four locked
        // instructions with each event.
        let gauges = Cell::new(None);
        let make = |core: &mut Core, pass| {
            edit.make(core, pass);
            gauges.set(Some(core.gauges()));
        };
        self.copies.write(make, || edit.keep());
        // What waits for a reader is not counted yet: the next call does.
        while !self.copies.is_behind() {
            let now = gauges.take();
            let now = now.unwrap_or_else(|| self.copies.read_both(|core, _| core.gauges()));
            writer.room = now.room;
            if std::mem::take(&mut writer.reshaped) {
                self.absence.set_shape(now.only_units, now.slots);
            }
            if now.charge <= self.settings.max_bytes {
                break;
            }
            let hand = &mut writer.hand;
            let tails = self
                .copies
                .read_both(|core, other| core.coldest(hand, other));
            if tails.is_empty() {
                break;
            }
            let before = self.copies.read(Core::blocks);
            let edit = Edit::Forget(&tails);
            self.copies
                .write(|core, pass| edit.make(core, pass), || edit.keep());
            let after = self.copies.read(Core::blocks);
            writer.evicted += before.saturating_sub(after) as u64;
        }
    }
}

/// Blocks of all snapshots that are not whole yet.
fn staged(writer: &Writer) -> usize {
    let parts = writer.workers.values().filter_map(|w| w.staged.as_ref());
    parts.map(Vec::len).sum()
}

fn member(writer: &mut Writer, worker: WorkerSlot) -> Result<&mut Member, SlotError> {
    writer
        .workers
        .get_mut(&worker.at())
        .ok_or(SlotError::Unknown(worker.0))
}

#[cfg(test)]
impl KvIndex {
    pub(crate) fn is_behind(&self) -> bool {
        self.copies.is_behind()
    }

    /// Looks at both copies.
    pub(crate) fn both(&self, look: impl FnOnce(&Core, Option<&Core>)) {
        self.copies.read_both(look);
    }

    /// Does something while a look-up goes on.
    pub(crate) fn held_up(&self, act: impl FnOnce()) {
        self.copies.read(|_| act());
    }
}
