//! `WorkerPort` and its events as Python sees them.

use std::{mem, time::Duration};

use bytes::Bytes;
use kvmesh_wire::v1::{ClassShare, KvRoom, LoadShare, Residue, StepSample, WorkerRecord};
use kvmesh_worker_port::{
    AttemptEnd, AttemptId, Change, EngineLoad, Event, Part, Port, PortError, Report, Rows,
    Settings, TokenizerFiles,
};
use prost::Message;
use pyo3::{
    buffer::{Element, PyBuffer},
    conversion::FromPyObjectOwned,
    exceptions::{PyOSError, PyRuntimeError, PyValueError},
    intern,
    prelude::*,
    types::{PyBytes, PyDict, PyList, PyTuple},
};

use crate::router::guarded;

/// Longest wait of Rust between two looks for signals.
const LONGEST_WAIT: Duration = Duration::from_secs(86_400);

/// Adds what this module has.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyWorkerPort>()?;
    module.add_class::<Placed>()?;
    module.add_class::<Ended>()?;
    module.add_class::<HandOverAsked>()?;
    module.add_class::<SnapshotWanted>()?;
    module.add_class::<InfoWanted>()?;
    module.add_class::<StopAsked>()?;
    module.add_class::<RoleChanged>()?;
    module.add_class::<EndsTold>()?;
    module.add_class::<EngineEnded>()
}

macro_rules! event_class {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? }) => {
        $(#[$doc])*
        #[pyclass(module = "kvmesh._router", frozen, get_all)]
        struct $name {
            $($field: $kind),*
        }
    };
}

event_class!(
    /// A placement that the engine answers.
    Placed { session: String, place: Py<PyBytes>, prompt_ids: Py<PyBytes>, age_s: f64 }
);
event_class!(
    /// Attempts to end, each (generation, owner, attempt).
    Ended { attempts: Vec<(Py<PyBytes>, u32, u32)> }
);
event_class!(
    /// A running attempt is to pass to another worker.
    HandOverAsked { command: Py<PyBytes> }
);
event_class!(
    /// A router needs the cache's content.
    SnapshotWanted { session: String }
);
event_class!(
    /// GetInfo waits for the engine's residue.
    InfoWanted { call: u64 }
);
event_class!(
    /// Drain with `stop`.
    StopAsked { grace_s: Option<f64> }
);
event_class!(
    /// SetRole was called.
    RoleChanged { role: i32 }
);
event_class!(
    /// Attempts have ended, each (session, generation, owner, attempt, stage, end, why).
    EndsTold { ends: Vec<ToldEnd> }
);
event_class!(
    /// The engine says nothing more.
    EngineEnded {}
);

type ToldEnd = (
    String,
    Py<PyBytes>,
    u32,
    u32,
    &'static str,
    &'static str,
    String,
);

fn to_python(py: Python<'_>, event: Event) -> PyResult<Py<PyAny>> {
    let bytes = |bytes: &[u8]| PyBytes::new(py, bytes).unbind();
    let object = match event {
        Event::Placed {
            session,
            mut place,
            received,
        } => {
            let age_s = received.elapsed().as_secs_f64();
            // Python reads a column many times faster than a repeated field.
            let asked = place.continuation.as_mut();
            let prompt_ids = asked.map(|asked| mem::take(&mut asked.prompt_ids));
            let prompt_ids = packed(py, &prompt_ids.unwrap_or_default())?;
            let place = encoded(py, &*place)?;
            Py::new(
                py,
                Placed {
                    session,
                    place,
                    prompt_ids,
                    age_s,
                },
            )?
            .into_any()
        }
        Event::Cancelled(attempts) => {
            let named = |id: AttemptId| (bytes(&id.generation), id.owner, id.attempt);
            let attempts = attempts.into_iter().map(named).collect();
            Py::new(py, Ended { attempts })?.into_any()
        }
        Event::HandOver(command) => {
            let command = encoded(py, &command)?;
            Py::new(py, HandOverAsked { command })?.into_any()
        }
        Event::SnapshotWanted { session } => Py::new(py, SnapshotWanted { session })?.into_any(),
        Event::InfoWanted { call } => Py::new(py, InfoWanted { call })?.into_any(),
        Event::Stop { grace } => {
            let grace_s = grace.map(|grace| grace.as_secs_f64());
            Py::new(py, StopAsked { grace_s })?.into_any()
        }
        Event::RoleChanged(role) => Py::new(py, RoleChanged { role })?.into_any(),
        Event::Ends(ends) => {
            let told = |end: AttemptEnd| {
                let id = end.attempt;
                let generation = bytes(&id.generation);
                (
                    end.session,
                    generation,
                    id.owner,
                    id.attempt,
                    end.stage,
                    end.end,
                    end.why,
                )
            };
            let ends = ends.into_iter().map(told).collect();
            Py::new(py, EndsTold { ends })?.into_any()
        }
        Event::EngineEnded => Py::new(py, EngineEnded {})?.into_any(),
    };
    Ok(object)
}

/// A message as Python reads it: encoded where its bytes stay.
fn encoded(py: Python<'_>, message: &impl Message) -> PyResult<Py<PyBytes>> {
    let bytes = PyBytes::new_with(py, message.encoded_len(), |mut bytes| {
        let fits = message.encode(&mut bytes);
        fits.map_err(|error| PyRuntimeError::new_err(error.to_string()))
    })?;
    Ok(bytes.unbind())
}

/// Numbers as the bytes of a column, in the machine's order.
fn packed(py: Python<'_>, numbers: &[u32]) -> PyResult<Py<PyBytes>> {
    let bytes = PyBytes::new_with(py, 4 * numbers.len(), |bytes| {
        let (places, _) = bytes.as_chunks_mut();
        for (place, number) in places.iter_mut().zip(numbers) {
            *place = number.to_ne_bytes();
        }
        Ok(())
    })?;
    Ok(bytes.unbind())
}

pub(crate) fn refused(error: PortError) -> PyErr {
    match error {
        PortError::Os { what, source } => match source.raw_os_error() {
            Some(code) => PyOSError::new_err((code, format!("{what}: {source}"))),
            None => PyOSError::new_err(format!("{what}: {source}")),
        },
        PortError::Serves => PyRuntimeError::new_err(error.to_string()),
        PortError::Gap(_) | PortError::Columns(_) => PyValueError::new_err(error.to_string()),
    }
}

fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map(|time| time.min(LONGEST_WAIT))
        .map_err(|_| {
            PyValueError::new_err(format!("{name} is {value}; allowed are seconds, 0 or more"))
        })
}

/// A worker's gRPC port. Nothing of Python runs on its thread.
#[pyclass(name = "WorkerPort", module = "kvmesh._router", frozen)]
pub(crate) struct PyWorkerPort {
    pub(crate) port: Port,
}

#[pymethods]
impl PyWorkerPort {
    #[new]
    #[pyo3(signature = (
        listen, *, step_lane_bytes=8_388_608, step_lane_age_s=10.0, cache_ring_events=65_536,
        cache_coalesce_ms=20.0, snapshot_interval_ms=5.0, load_interval_ms=250.0,
        load_coalesce_ms=5.0, keep_alive_interval_s=10.0, keep_alive_timeout_s=10.0,
        grace_s=30.0, tell_all_ends=false,
        load_delay_ms=0.0, replay_bytes=4_194_304, orphan_ttl_s=10.0,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        listen: &str,
        step_lane_bytes: usize,
        step_lane_age_s: f64,
        cache_ring_events: u64,
        cache_coalesce_ms: f64,
        snapshot_interval_ms: f64,
        load_interval_ms: f64,
        load_coalesce_ms: f64,
        keep_alive_interval_s: f64,
        keep_alive_timeout_s: f64,
        grace_s: f64,
        tell_all_ends: bool,
        load_delay_ms: f64,
        replay_bytes: usize,
        orphan_ttl_s: f64,
    ) -> PyResult<Self> {
        let ms = |name, value: f64| seconds(name, value / 1_000.0);
        let settings = Settings {
            step_lane_bytes,
            replay_bytes,
            orphan_ttl: seconds("orphan_ttl_s", orphan_ttl_s)?,
            step_lane_age: seconds("step_lane_age_s", step_lane_age_s)?,
            cache_ring_events,
            cache_coalesce: ms("cache_coalesce_ms", cache_coalesce_ms)?,
            snapshot_interval: ms("snapshot_interval_ms", snapshot_interval_ms)?,
            load_interval: ms("load_interval_ms", load_interval_ms)?,
            load_coalesce: ms("load_coalesce_ms", load_coalesce_ms)?,
            keep_alive_interval: seconds("keep_alive_interval_s", keep_alive_interval_s)?,
            keep_alive_timeout: seconds("keep_alive_timeout_s", keep_alive_timeout_s)?,
            grace: seconds("grace_s", grace_s)?,
            tell_all_ends,
            load_delay: ms("load_delay_ms", load_delay_ms)?,
        };
        if settings.load_interval.is_zero() {
            return Err(PyValueError::new_err(
                "load_interval_ms is 0; allowed is more than 0",
            ));
        }
        let port = py.detach(|| guarded(|| Port::bind(listen, settings).map_err(refused)))?;
        Ok(Self { port })
    }

    /// The bound port.
    #[getter]
    fn port(&self) -> u16 {
        self.port.address().port()
    }

    /// Begins to answer while the model is loaded.
    fn load(&self, py: Python<'_>, record: &[u8]) -> PyResult<()> {
        let record = worker_record(record)?;
        py.detach(|| guarded(|| self.port.load(record).map_err(refused)))
    }

    /// The model is there; its first steps are timed.
    fn warm_up(
        &self,
        py: Python<'_>,
        record: &[u8],
        tokenizer: Vec<(String, Vec<u8>)>,
        tokenizer_digest: String,
    ) -> PyResult<()> {
        let record = worker_record(record)?;
        let files = tokenizer_files(tokenizer, tokenizer_digest);
        py.detach(|| guarded(|| self.port.warm_up(record, files).map_err(refused)))
    }

    /// Begins to serve.
    fn serve(
        &self,
        py: Python<'_>,
        record: &[u8],
        tokenizer: Vec<(String, Vec<u8>)>,
        tokenizer_digest: String,
    ) -> PyResult<()> {
        let record = worker_record(record)?;
        let files = tokenizer_files(tokenizer, tokenizer_digest);
        py.detach(|| guarded(|| self.port.serve(record, files).map_err(refused)))
    }

    // -- the engine's side (contract.OutputSink) ---------------------------

    /// A step begins.
    fn begin_step(&self, predicted_ms: f64) {
        self.port.begin_step(predicted_ms);
    }

    /// Hands a `contract.StepOutput` to the sessions that it concerns.
    fn step(&self, output: &Bound<'_, PyAny>) -> PyResult<()> {
        let report = report(output)?;
        guarded(|| self.port.step(report).map_err(refused))
    }

    /// The engine says nothing more.
    fn ended(&self) {
        self.port.engine_ended();
    }

    // -- snapshots ---------------------------------------------------------

    fn begin_snapshot(&self, session: &str) -> bool {
        self.port.begin_snapshot(session)
    }

    /// Waits without the GIL while the session has enough.
    #[pyo3(signature = (session, changes))]
    fn add_snapshot(
        &self,
        py: Python<'_>,
        session: &str,
        changes: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<bool> {
        let part = changes.map(cache_changes).transpose()?;
        py.detach(|| guarded(|| Ok(self.port.add_snapshot(session, part))))
    }

    fn fail_snapshot(&self, session: &str) {
        self.port.fail_snapshot(session);
    }

    // -- the process's side ------------------------------------------------

    /// Waits without the GIL for events; `None`: the port is closed.
    fn wait<'py>(&self, py: Python<'py>, timeout_s: f64) -> PyResult<Option<Bound<'py, PyList>>> {
        let timeout = seconds("timeout_s", timeout_s)?;
        let events = py.detach(|| guarded(|| Ok(self.port.wait(timeout))))?;
        let Some(events) = events else {
            return Ok(None);
        };
        let objects: Vec<_> = events
            .into_iter()
            .map(|event| to_python(py, event))
            .collect::<PyResult<_>>()?;
        PyList::new(py, objects).map(Some)
    }

    fn answer_info(&self, call: u64, residue: &[u8]) -> PyResult<()> {
        let residue = Residue::decode(residue)
            .map_err(|error| PyValueError::new_err(format!("not a serialised Residue: {error}")))?;
        self.port.answer_info(call, residue);
        Ok(())
    }

    fn running(&self) -> usize {
        self.port.running()
    }

    fn begin_stop(&self) {
        self.port.begin_stop();
    }

    fn wait_idle(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let timeout = seconds("timeout_s", timeout_s)?;
        py.detach(|| guarded(|| Ok(self.port.wait_idle(timeout))))
    }

    fn give_back(&self, grace_s: f64) -> PyResult<()> {
        self.port.give_back(seconds("grace_s", grace_s)?);
        Ok(())
    }

    #[pyo3(signature = (linger_s=1.0))]
    fn close(&self, py: Python<'_>, linger_s: f64) -> PyResult<()> {
        let linger = seconds("linger_s", linger_s)?;
        py.detach(|| {
            guarded(|| {
                self.port.close(linger);
                Ok(())
            })
        })
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exc))]
    fn __exit__(&self, py: Python<'_>, _exc: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.close(py, 1.0)
    }
}

// -- from Python's types to the port's ------------------------------------

fn worker_record(record: &[u8]) -> PyResult<WorkerRecord> {
    WorkerRecord::decode(record)
        .map_err(|error| PyValueError::new_err(format!("not a serialised WorkerRecord: {error}")))
}

fn tokenizer_files(files: Vec<(String, Vec<u8>)>, digest: String) -> TokenizerFiles {
    let files = files.into_iter();
    TokenizerFiles {
        files: files.map(|(name, data)| (name, data.into())).collect(),
        digest,
    }
}

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
fn cache_changes(changes: &Bound<'_, PyAny>) -> PyResult<Vec<Change>> {
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
