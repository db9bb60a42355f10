//! `KvIndex`: which worker holds which prefix, as Python sees it.
//!
//! Arrays come and go through the buffer protocol. What comes is copied while
//! the GIL is held (4 KiB for a prompt of 512 blocks), since Python may change
//! it once the GIL is free. Work that may take long is done without the GIL.

use std::cell::RefCell;

use kvmesh_kv_index::{
    CacheChange, IndexSettings, Knowledge, KvIndex, Matches, SlotError, Tier, WorkerSlot,
    chain_values_into,
};
use pyo3::{
    buffer::{Element, PyBuffer, PyUntypedBuffer},
    exceptions::{PyKeyError, PyRuntimeError, PyTypeError, PyValueError},
    prelude::*,
};

/// Values that are stored without giving the GIL away, if nobody is waited for
/// and the table need not grow: some microseconds.
const SHORT: usize = 64;

thread_local! {
    /// Values, used again by every call of a thread. Taken out meanwhile: what
    /// converts them may be Python code that calls again.
    static VALUES: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    /// A look-up's answer, in the same way.
    static FOUND: RefCell<Matches> = RefCell::default();
}

/// kind (0 stored, 1 removed, 2 cleared), parent, chain, tier.
type Change<'py> = (u8, Option<u64>, Option<Bound<'py, PyAny>>, u8);

fn refused(error: SlotError) -> PyErr {
    let text = error.to_string();
    match error {
        SlotError::Unknown(_) => PyKeyError::new_err(text),
        SlotError::BlockSize(_) => PyValueError::new_err(text),
        SlotError::Full(_) => PyRuntimeError::new_err(text),
    }
}

fn tier(number: u8) -> PyResult<Tier> {
    match number {
        0 => Ok(Tier::Device),
        1 => Ok(Tier::Host),
        2 => Ok(Tier::Disk),
        _ => Err(PyValueError::new_err("a tier is 0, 1 or 2")),
    }
}

/// Does something with an array of one dimension.
fn with_array<T: Element, R>(
    object: &Bound<'_, PyAny>,
    act: impl FnOnce(&PyBuffer<T>) -> PyResult<R>,
) -> PyResult<R> {
    let buffer = PyUntypedBuffer::get(object)?;
    let done = match buffer.as_typed() {
        Ok(typed) if typed.dimensions() == 1 => act(typed),
        Ok(_) => Err(PyValueError::new_err(
            "an array with one dimension is needed",
        )),
        Err(error) => Err(error),
    };
    // Dropping it would ask for the GIL again, which is held.
    buffer.release(object.py());
    done
}

/// Copies an array.
fn read<T: Element + Default>(object: &Bound<'_, PyAny>, into: &mut Vec<T>) -> PyResult<()> {
    with_array(object, |buffer| {
        into.resize(buffer.item_count(), T::default());
        buffer.copy_to_slice(object.py(), into)
    })
}

/// Copies an array, or another sequence of integers.
fn read_values(object: &Bound<'_, PyAny>, into: &mut Vec<u64>) -> PyResult<()> {
    match read(object, into) {
        Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => {
            *into = object.extract()?;
            Ok(())
        }
        done => done,
    }
}

fn values(object: &Bound<'_, PyAny>) -> PyResult<Vec<u64>> {
    let mut values = Vec::new();
    read_values(object, &mut values)?;
    Ok(values)
}

/// Writes to the front of an array, and 0 to the rest of it.
fn write<T: Element + Default>(object: &Bound<'_, PyAny>, values: &[T]) -> PyResult<()> {
    let py = object.py();
    with_array(object, |buffer| {
        match buffer.item_count().checked_sub(values.len()) {
            Some(0) => buffer.copy_from_slice(py, values),
            Some(rest) => {
                let rest = std::iter::repeat_n(T::default(), rest);
                let whole: Vec<T> = values.iter().copied().chain(rest).collect();
                buffer.copy_from_slice(py, &whole)
            }
            None => {
                let text = format!("an array of at least {} is needed", values.len());
                Err(PyValueError::new_err(text))
            }
        }
    })
}

/// What `kvmesh.KvIndex` is made of. That one adds only what is better said in
/// Python, and inherits the rest: a method of its own around each of these would
/// cost as much as the call.
#[pyclass(name = "KvIndex", module = "kvmesh._router", frozen, subclass)]
struct PyKvIndex {
    index: KvIndex,
}

impl PyKvIndex {
    fn change(&self, py: Python<'_>, worker: u32, changes: &[CacheChange<'_>]) -> PyResult<()> {
        py.detach(|| self.index.apply(WorkerSlot(worker), changes))
            .map_err(refused)
    }
}

#[pymethods]
impl PyKvIndex {
    #[new]
    #[pyo3(signature = (*, max_bytes=1_073_741_824, max_workers=4096))]
    fn new(max_bytes: usize, max_workers: usize) -> Self {
        let index = KvIndex::new(IndexSettings {
            max_bytes,
            max_workers,
        });
        Self { index }
    }

    /// Takes a worker in and returns its number, the lowest that is free.
    #[pyo3(signature = (block_tokens=16, *, ttl_ms=None, max_units=1_048_576))]
    fn add_worker(
        &self,
        py: Python<'_>,
        block_tokens: u32,
        ttl_ms: Option<u64>,
        max_units: usize,
    ) -> PyResult<u32> {
        let knowledge = match ttl_ms {
            None => Knowledge::Events,
            Some(ttl_ms) => Knowledge::Approximate { ttl_ms, max_units },
        };
        py.detach(|| self.index.add_worker(block_tokens, knowledge))
            .map(|slot| slot.0)
            .map_err(refused)
    }

    /// Takes a worker and all its blocks out.
    fn remove_worker(&self, py: Python<'_>, worker: u32) -> PyResult<()> {
        py.detach(|| self.index.remove_worker(WorkerSlot(worker)))
            .map_err(refused)
    }

    /// Blocks of a worker can be shared now.
    #[pyo3(signature = (worker, chain, *, parent=None, tier=0))]
    fn stored(
        &self,
        worker: u32,
        chain: &Bound<'_, PyAny>,
        parent: Option<u64>,
        tier: u8,
    ) -> PyResult<()> {
        let tier = self::tier(tier)?;
        let mut values = VALUES.take();
        let done = read_values(chain, &mut values).and_then(|()| {
            let slot = WorkerSlot(worker);
            // An event of an engine is done sooner than the GIL changes hands.
            if values.len() <= SHORT
                && let Some(done) = self.index.try_store(slot, parent, &values, tier)
            {
                return done.map_err(refused);
            }
            self.change(chain.py(), worker, &[stored(parent, &values, tier)])
        });
        VALUES.set(values);
        done
    }

    /// Many `stored` in one call, also of several workers.
    ///
    /// Event i, of `workers[i]`, has the values from `offsets[i]` to
    /// `offsets[i + 1]` and comes after `parents[i]`.
    #[pyo3(signature = (workers, parents, offsets, chain, *, tier=0))]
    fn stored_many(
        &self,
        py: Python<'_>,
        workers: &Bound<'_, PyAny>,
        parents: &Bound<'_, PyAny>,
        offsets: &Bound<'_, PyAny>,
        chain: &Bound<'_, PyAny>,
        tier: u8,
    ) -> PyResult<()> {
        let (mut slots, tier) = (Vec::<u32>::new(), self::tier(tier)?);
        read(workers, &mut slots)?;
        let (parents, offsets, chain) = (values(parents)?, values(offsets)?, values(chain)?);
        if parents.len() != slots.len() || offsets.len() != slots.len() + 1 {
            return Err(PyValueError::new_err(
                "as many parents as workers are needed, and one offset more",
            ));
        }
        let mut changes = Vec::with_capacity(slots.len());
        for ((slot, parent), ends) in slots.iter().zip(&parents).zip(offsets.windows(2)) {
            let chain = chain
                .get(ends[0] as usize..ends[1] as usize)
                .ok_or_else(|| PyValueError::new_err("offsets do not fit the chain"))?;
            let change = stored(Some(*parent), chain, tier);
            changes.push((WorkerSlot(*slot), change));
        }
        py.detach(|| self.index.apply_many(&changes))
            .map_err(refused)
    }

    /// Blocks of a worker are gone. Values that it does not hold are ignored.
    #[pyo3(signature = (worker, chain, *, tier=0))]
    fn removed(&self, worker: u32, chain: &Bound<'_, PyAny>, tier: u8) -> PyResult<()> {
        let (values, tier) = (values(chain)?, self::tier(tier)?);
        let chain_of = CacheChange::Removed {
            chain: &values,
            tier,
        };
        self.change(chain.py(), worker, &[chain_of])
    }

    /// All blocks of a worker are gone.
    fn cleared(&self, py: Python<'_>, worker: u32) -> PyResult<()> {
        self.change(py, worker, &[CacheChange::Cleared])
    }

    fn apply_parts(&self, py: Python<'_>, worker: u32, changes: Vec<Change<'_>>) -> PyResult<()> {
        let (chains, kinds) = taken(&changes)?;
        self.change(py, worker, &made(&chains, &kinds))
    }

    fn snapshot_parts(
        &self,
        py: Python<'_>,
        worker: u32,
        changes: Vec<Change<'_>>,
        first: bool,
        last: bool,
    ) -> PyResult<()> {
        let (chains, kinds) = taken(&changes)?;
        let changes = made(&chains, &kinds);
        let worker = WorkerSlot(worker);
        py.detach(|| self.index.snapshot(worker, &changes, first, last))
            .map_err(refused)
    }

    /// Notes that a prompt was sent to a worker without cache events.
    fn record_sent(&self, worker: u32, chain: &Bound<'_, PyAny>, now_ms: u64) -> PyResult<()> {
        let values = values(chain)?;
        let worker = WorkerSlot(worker);
        chain
            .py()
            .detach(|| self.index.record_sent(worker, &values, now_ms))
            .map_err(refused)
    }

    /// Forgets what was sent too long ago. To be called from time to time.
    fn expire(&self, py: Python<'_>, now_ms: u64) {
        py.detach(|| self.index.expire(now_ms));
    }

    /// Writes tokens by worker to `tokens`, and where wanted how many of them
    /// lie on the host and on disk.
    #[pyo3(signature = (chain, tokens, host=None, disk=None))]
    fn lookup_to(
        &self,
        chain: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
        host: Option<&Bound<'_, PyAny>>,
        disk: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let mut prompt = VALUES.take();
        read_values(chain, &mut prompt)?;
        let mut found = FOUND.take();
        chain
            .py()
            .detach(|| self.index.lookup_into(&prompt, &mut found));
        let answer = (|| {
            write(tokens, found.by_slot())?;
            host.map_or(Ok(()), |host| write(host, found.host_by_slot()))?;
            disk.map_or(Ok(()), |disk| write(disk, found.disk_by_slot()))
        })();
        VALUES.set(prompt);
        FOUND.set(found);
        answer
    }

    /// Length of a look-up's answer: one more than the highest worker number so far.
    #[getter]
    fn slots(&self) -> usize {
        self.index.slots()
    }

    /// Blocks of a worker that are here, in any tier; 0 for one that is not there. Not fast.
    fn held(&self, py: Python<'_>, worker: u32) -> u64 {
        py.detach(|| self.index.held(WorkerSlot(worker)))
    }

    /// Workers, blocks, entries, holder sets, bytes, blocks evicted.
    fn counts(&self, py: Python<'_>) -> (usize, usize, u64, usize, usize, u64) {
        let stats = py.detach(|| self.index.stats());
        (
            stats.workers,
            stats.blocks,
            stats.entries,
            stats.holder_sets,
            stats.bytes,
            stats.evicted,
        )
    }
}

fn stored(parent: Option<u64>, chain: &[u64], tier: Tier) -> CacheChange<'_> {
    match parent {
        Some(parent) => CacheChange::StoredAfter {
            parent,
            chain,
            tier,
        },
        None => CacheChange::Stored { chain, tier },
    }
}

/// Copies of the chains, and what is with them.
#[expect(clippy::type_complexity)]
fn taken(changes: &[Change<'_>]) -> PyResult<(Vec<Vec<u64>>, Vec<(u8, Option<u64>, Tier)>)> {
    let mut chains = Vec::with_capacity(changes.len());
    let mut kinds = Vec::with_capacity(changes.len());
    for (kind, parent, chain, number) in changes {
        if *kind > 2 {
            return Err(PyValueError::new_err("a change is 0, 1 or 2"));
        }
        kinds.push((*kind, *parent, tier(*number)?));
        chains.push(chain.as_ref().map_or_else(|| Ok(Vec::new()), values)?);
    }
    Ok((chains, kinds))
}

fn made<'a>(chains: &'a [Vec<u64>], kinds: &[(u8, Option<u64>, Tier)]) -> Vec<CacheChange<'a>> {
    let pairs = chains.iter().zip(kinds);
    pairs
        .map(|(chain, &(kind, parent, tier))| match kind {
            0 => stored(parent, chain, tier),
            1 => CacheChange::Removed { chain, tier },
            _ => CacheChange::Cleared,
        })
        .collect()
}

/// Writes the chain value after each whole unit of 16 ids to `out`; an array of
/// u32 in, one of u64 out.
#[pyfunction]
fn chain_values_to(parent: u64, ids: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
    let mut taken = Vec::new();
    read::<u32>(ids, &mut taken)?;
    let values = ids.py().detach(|| {
        let mut values = Vec::new();
        chain_values_into(parent, &taken, &mut values);
        values
    });
    write(out, &values)
}

/// Adds what this module has.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyKvIndex>()?;
    module.add_function(wrap_pyfunction!(chain_values_to, module)?)
}
