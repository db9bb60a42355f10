//! `WorkerPort` and its events as Python sees them.

mod events;
mod report;

use std::{sync::Arc, time::Duration};

use kvmesh_wire::v1::{Residue, WorkerRecord};
use kvmesh_worker_port::{Port, PortError, Settings, TokenizerFiles};
use prost::Message;
use pyo3::{
    exceptions::{PyOSError, PyRuntimeError, PyValueError},
    prelude::*,
    types::{PyList, PyTuple},
};

pub(crate) use self::report::report;
use self::{events::to_python, report::cache_changes};
use crate::{
    router::guarded,
    trust::{PyClusterToken, PyPeerTls},
};

/// Longest wait of Rust between two looks for signals.
const LONGEST_WAIT: Duration = Duration::from_secs(86_400);

/// Adds what this module has.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyWorkerPort>()?;
    events::register(module)
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
        resume_bytes=67_108_864, token=None, tls=None,
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
        resume_bytes: usize,
        token: Option<&PyClusterToken>,
        tls: Option<&PyPeerTls>,
    ) -> PyResult<Self> {
        let ms = |name, value: f64| seconds(name, value / 1_000.0);
        let settings = Settings {
            step_lane_bytes,
            replay_bytes,
            orphan_ttl: seconds("orphan_ttl_s", orphan_ttl_s)?,
            resume_bytes,
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
            token: token.map(|token| Arc::clone(&token.token)),
            tls: tls.map(|tls| Arc::clone(&tls.tls)),
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
