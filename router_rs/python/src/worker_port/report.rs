//! `contract.StepOutput` as the port takes it.

use bytes::Bytes;
use kvmesh_wire::v1::{ClassShare, KvRoom, LoadShare, StepSample};
use kvmesh_worker_port::{Change, EngineLoad, Part, Report, Rows};
use prost::Message;
use pyo3::{
    buffer::{Element, PyBuffer},
    conversion::FromPyObjectOwned,
    exceptions::PyValueError,
    intern,
    prelude::*,
    types::{PyBytes, PyDict, PyList, PyTuple},
};

/// Reads a `contract.StepOutput`.
pub(crate) fn report(output: &Bound<'_, PyAny>) -> PyResult<Report> {
    let py = output.py();
    let routers = output.getattr(intern!(py, "routers"))?;
    let routers: &Bound<'_, PyDict> = routers.cast()?;
    let mut parts = Vec::with_capacity(routers.len());
    for (key, step) in routers {
        parts.push((key.extract::<String>()?, part(&step)?));
    }
    let sample = output.getattr(intern!(py, "sample"))?;
    let cache = output.getattr(intern!(py, "cache"))?;
    Ok(Report {
        step: output.getattr(intern!(py, "step"))?.extract()?,
        parts,
        sample: if sample.is_none() {
            None
        } else {
            Some(step_sample(&sample)?)
        },
        load: engine_load(&output.getattr(intern!(py, "load"))?)?,
        cache: if cache.is_none() {
            None
        } else {
            let first = cache.getattr(intern!(py, "first_event"))?.extract()?;
            Some((
                first,
                cache_changes(&cache.getattr(intern!(py, "changes"))?)?,
            ))
        },
    })
}

fn part(step: &Bound<'_, PyAny>) -> PyResult<Part> {
    let py = step.py();
    let tokens = step.getattr(intern!(py, "tokens"))?;
    Ok(Part {
        openings: messages(&step.getattr(intern!(py, "openings"))?)?,
        tokens: if tokens.is_none() {
            None
        } else {
            Some(rows(&tokens)?)
        },
        ends: messages(&step.getattr(intern!(py, "ends"))?)?,
    })
}

fn rows(columns: &Bound<'_, PyAny>) -> PyResult<Rows> {
    let py = columns.py();
    let of = |name| column::<u32>(&columns.getattr(name)?);
    let generations = columns.getattr(intern!(py, "generations"))?;
    let offset: u32 = columns.getattr(intern!(py, "index_offset"))?.extract()?;
    let mut first_indices = of(intern!(py, "first_indices"))?;
    for index in &mut first_indices {
        *index = index
            .checked_add(offset)
            .ok_or_else(|| PyValueError::new_err("columns of a step: an index is too large"))?;
    }
    Ok(Rows {
        generations: generations.extract::<&[u8]>()?.to_vec(),
        owners: of(intern!(py, "owners"))?,
        attempts: of(intern!(py, "attempts"))?,
        first_indices,
        counts: of(intern!(py, "counts"))?,
        ids: of(intern!(py, "ids"))?,
        logprobs: messages(&columns.getattr(intern!(py, "logprobs"))?)?,
    })
}

/// An integer of a column.
trait Number: Element + for<'py> FromPyObjectOwned<'py> {
    /// From its bytes, in the machine's order.
    fn unpack(bytes: &[u8]) -> Vec<Self>;
}

macro_rules! number {
    ($($kind:ty),*) => {
        $(impl Number for $kind {
            fn unpack(bytes: &[u8]) -> Vec<Self> {
                let (whole, _) = bytes.as_chunks();
                whole.iter().map(|bytes| Self::from_ne_bytes(*bytes)).collect()
            }
        })*
    };
}

number!(u32, u64);

/// A column: packed bytes, an object with the buffer protocol, or any sequence
/// of integers.
fn column<T: Number>(values: &Bound<'_, PyAny>) -> PyResult<Vec<T>> {
    if let Ok(packed) = values.cast::<PyBytes>() {
        return Ok(T::unpack(packed.as_bytes()));
    }
    let list = values.is_instance_of::<PyList>() || values.is_instance_of::<PyTuple>();
    if !list && let Ok(buffer) = PyBuffer::<T>::get(values) {
        return buffer.to_vec(values.py());
    }
    values
        .try_iter()?
        .map(|value| value?.extract::<T>().map_err(Into::into))
        .collect()
}

/// Protobuf messages of Python as those of Rust. Rare: openings, ends.
fn messages<M: Message + Default>(list: &Bound<'_, PyAny>) -> PyResult<Vec<M>> {
    let py = list.py();
    if list.len()? == 0 {
        return Ok(Vec::new());
    }
    let mut read = Vec::new();
    for message in list.try_iter()? {
        let encoded = message?.call_method0(intern!(py, "SerializeToString"))?;
        let decoded = M::decode(Bytes::copy_from_slice(encoded.extract()?));
        read.push(decoded.map_err(|error| PyValueError::new_err(error.to_string()))?);
    }
    Ok(read)
}

fn step_sample(sample: &Bound<'_, PyAny>) -> PyResult<StepSample> {
    let (prefill_tokens, prefill_context, decode_batch, decode_context, duration_us) =
        sample.extract()?;
    Ok(StepSample {
        prefill_tokens,
        prefill_context,
        decode_batch,
        decode_context,
        duration_us,
    })
}

fn kv_room(room: &Bound<'_, PyAny>) -> PyResult<KvRoom> {
    let (free, evictable, running, pinned, reserved) = room.extract()?;
    Ok(KvRoom {
        free,
        evictable,
        running,
        pinned,
        reserved,
    })
}

fn engine_load(load: &Bound<'_, PyAny>) -> PyResult<EngineLoad> {
    let py = load.py();
    let shares = load.getattr(intern!(py, "shares"))?;
    let shares: &Bound<'_, PyDict> = shares.cast()?;
    let mut told = Vec::with_capacity(shares.len());
    for (key, share) in shares {
        told.push((key.extract::<String>()?, load_share(&share)?));
    }
    Ok(EngineLoad {
        kv: kv_room(&load.getattr(intern!(py, "kv"))?)?,
        shares: told,
        step: load.getattr(intern!(py, "step"))?.extract()?,
        step_age_ms: load.getattr(intern!(py, "step_age_ms"))?.extract()?,
        step_predicted_ms: load.getattr(intern!(py, "step_predicted_ms"))?.extract()?,
    })
}

fn load_share(share: &Bound<'_, PyAny>) -> PyResult<LoadShare> {
    let py = share.py();
    Ok(LoadShare {
        queued: share.getattr(intern!(py, "queued"))?.extract()?,
        queued_prefill_tokens: share
            .getattr(intern!(py, "queued_prefill_tokens"))?
            .extract()?,
        running_prefill_tokens: share
            .getattr(intern!(py, "running_prefill_tokens"))?
            .extract()?,
        decoding: share.getattr(intern!(py, "decoding"))?.extract()?,
        decode_context: share.getattr(intern!(py, "decode_context"))?.extract()?,
        receiving: share.getattr(intern!(py, "receiving"))?.extract()?,
        interactive: class_share(&share.getattr(intern!(py, "interactive"))?)?,
        standard: class_share(&share.getattr(intern!(py, "standard"))?)?,
        batch: class_share(&share.getattr(intern!(py, "batch"))?)?,
    })
}

fn class_share(share: &Bound<'_, PyAny>) -> PyResult<Option<ClassShare>> {
    let py = share.py();
    Ok(Some(ClassShare {
        waiting: share.getattr(intern!(py, "waiting"))?.extract()?,
        waiting_tokens: share.getattr(intern!(py, "waiting_tokens"))?.extract()?,
        decoding: share.getattr(intern!(py, "decoding"))?.extract()?,
    }))
}

/// Reads a sequence of `contract.CacheChange`: (kind, parent, chain).
pub(super) fn cache_changes(changes: &Bound<'_, PyAny>) -> PyResult<Vec<Change>> {
    let mut read = Vec::new();
    for change in changes.try_iter()? {
        let (kind, parent, chain): (u8, u64, Bound<'_, PyAny>) = change?.extract()?;
        read.push(match kind {
            0 => Change::Stored {
                parent,
                chain: column(&chain)?,
            },
            1 => Change::Removed(column(&chain)?),
            2 => Change::Cleared,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "a cache change of kind {kind}; allowed are 0 to 2"
                )));
            }
        });
    }
    Ok(read)
}
