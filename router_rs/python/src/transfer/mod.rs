//! `TransferNode` and its events as Python sees them.

mod events;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use kvmesh_transfer::{
    PullRequest, Reason, Refused, Settings, TransferId, TransferNode, check_logprobs, sender::Tail,
};
use kvmesh_wire::v1::{KvCompatibility, PrefixKey};
use prost::Message;
use pyo3::{
    exceptions::PyValueError,
    prelude::*,
    types::{PyDict, PyTuple},
};

use self::events::to_python;
use crate::{
    pool::PyKvPool,
    trust::{PyClusterToken, PyPeerTls},
};

pyo3::create_exception!(
    kvmesh._router,
    TransferError,
    pyo3::exceptions::PyException,
    "A call about a transfer was refused; `args` is (reason, message)."
);

fn refused(error: Refused) -> PyErr {
    TransferError::new_err((error.reason.name(), error.message))
}

/// A transfer id as an argument: 16 bytes.
struct Id(TransferId);

impl<'py> FromPyObject<'_, 'py> for Id {
    type Error = PyErr;

    fn extract(argument: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        TransferId::parse(argument.extract()?)
            .map(Self)
            .ok_or_else(|| PyValueError::new_err("a transfer id has 16 bytes"))
    }
}

fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|time| *time <= Duration::from_secs(86_400))
        .ok_or_else(|| PyValueError::new_err(format!("{name}: 0 to 86400 seconds, not {value}")))
}

/// Moves KV blocks between this worker's pool and its peers'.
#[pyclass(name = "TransferNode", module = "kvmesh._router", frozen)]
pub(crate) struct PyTransferNode {
    pub(crate) node: TransferNode,
}

#[pymethods]
impl PyTransferNode {
    #[new]
    #[pyo3(signature = (
        pool, *, worker_id, incarnation, compatibility, block_tokens, listen="127.0.0.1:0",
        advertise="", shared_memory=true, lease_s=10.0, offer_timeout_s=2.0,
        aborted_memory_s=10.0, connect_timeout_s=2.0, idle_timeout_s=30.0, max_transfers=4096,
        max_connections=1024, copy_threads=0, token=None, tls=None,
    ))]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    fn new(
        py: Python<'_>,
        pool: &PyKvPool,
        worker_id: String,
        incarnation: u64,
        compatibility: &[u8],
        block_tokens: u32,
        listen: &str,
        advertise: &str,
        shared_memory: bool,
        lease_s: f64,
        offer_timeout_s: f64,
        aborted_memory_s: f64,
        connect_timeout_s: f64,
        idle_timeout_s: f64,
        max_transfers: usize,
        max_connections: usize,
        copy_threads: usize,
        token: Option<&PyClusterToken>,
        tls: Option<&PyPeerTls>,
    ) -> PyResult<Self> {
        let settings = Settings {
            worker_id,
            incarnation,
            compatibility: KvCompatibility::decode(compatibility)
                .map_err(|error| PyValueError::new_err(format!("compatibility: {error}")))?,
            block_tokens,
            listen: listen.to_owned(),
            advertise: advertise.to_owned(),
            shared_memory,
            lease: seconds("lease_s", lease_s)?,
            offer_timeout: seconds("offer_timeout_s", offer_timeout_s)?,
            aborted_memory: seconds("aborted_memory_s", aborted_memory_s)?,
            connect_timeout: seconds("connect_timeout_s", connect_timeout_s)?,
            idle_timeout: seconds("idle_timeout_s", idle_timeout_s)?,
            max_transfers,
            max_connections,
            copy_threads,
            proof: token.map(PyClusterToken::proof),
            tls: tls.map(PyPeerTls::transfers),
            ..Settings::default()
        };
        let pool = Arc::clone(pool.open()?);
        let node = py.detach(|| TransferNode::start(pool, settings))?;
        Ok(Self { node })
    }

    #[getter]
    fn address(&self) -> &str {
        self.node.address()
    }

    #[pyo3(signature = (transfer_id, pins=0, *, grows=false))]
    fn offer(&self, py: Python<'_>, transfer_id: Id, pins: u64, grows: bool) -> PyResult<()> {
        let Id(id) = transfer_id;
        py.detach(|| match grows {
            true => self.node.offer_growing(id, pins),
            false => self.node.offer(id, pins),
        })
        .map_err(refused)
    }

    fn ready(
        &self,
        py: Python<'_>,
        transfer_id: Id,
        first_block: u32,
        slots: Vec<u32>,
    ) -> PyResult<()> {
        let Id(id) = transfer_id;
        py.detach(|| self.node.ready(id, first_block, &slots))
            .map_err(refused)
    }

    #[pyo3(signature = (transfer_id, kv_tokens, partial=None, output_ids=Vec::new(), logprobs=Vec::new()))]
    fn commit(
        &self,
        py: Python<'_>,
        transfer_id: Id,
        kv_tokens: u32,
        partial: Option<(u32, u32)>,
        output_ids: Vec<u32>,
        logprobs: Vec<Vec<u8>>,
    ) -> PyResult<()> {
        let Id(id) = transfer_id;
        let logprobs: Vec<Bytes> = logprobs.into_iter().map(Bytes::from).collect();
        check_logprobs(&logprobs).map_err(refused)?;
        let tail = Tail {
            kv_tokens,
            output_ids,
            logprobs,
        };
        py.detach(|| self.node.commit(id, tail, partial))
            .map_err(refused)
    }

    fn offer_prefix(
        &self,
        py: Python<'_>,
        transfer_id: Id,
        tokens: u32,
        slots: Vec<u32>,
    ) -> PyResult<()> {
        let Id(id) = transfer_id;
        py.detach(|| self.node.offer_prefix(id, tokens, &slots))
            .map_err(refused)
    }

    #[pyo3(signature = (
        transfer_id, address, worker, incarnation, from_token, slots, traceparent="",
        request_id="",
    ))]
    #[allow(clippy::too_many_arguments, reason = "arguments in Python")]
    fn pull(
        &self,
        py: Python<'_>,
        transfer_id: Id,
        address: String,
        worker: String,
        incarnation: u64,
        from_token: u32,
        slots: Vec<u32>,
        traceparent: &str,
        request_id: &str,
    ) -> PyResult<()> {
        let request = PullRequest {
            id: transfer_id.0,
            address,
            worker,
            incarnation,
            from_token,
            slots,
            prefix: None,
            traceparent: traceparent.to_owned(),
            request_id: request_id.to_owned(),
        };
        py.detach(|| self.node.pull(request)).map_err(refused)
    }

    #[pyo3(signature = (
        transfer_id, address, worker, incarnation, from_token, slots, token_ids,
        adapter="", cache_salt="", traceparent="",
        request_id="", adapter_digest="",
    ))]
    #[allow(clippy::too_many_arguments, reason = "arguments in Python")]
    fn pull_prefix(
        &self,
        py: Python<'_>,
        transfer_id: Id,
        address: String,
        worker: String,
        incarnation: u64,
        from_token: u32,
        slots: Vec<u32>,
        token_ids: Vec<u32>,
        adapter: &str,
        cache_salt: &str,
        traceparent: &str,
        request_id: &str,
        adapter_digest: &str,
    ) -> PyResult<()> {
        let request = PullRequest {
            id: transfer_id.0,
            address,
            worker,
            incarnation,
            from_token,
            slots,
            prefix: Some(PrefixKey {
                adapter: adapter.to_owned(),
                cache_salt: cache_salt.to_owned(),
                token_ids,
                adapter_digest: adapter_digest.to_owned(),
            }),
            traceparent: traceparent.to_owned(),
            request_id: request_id.to_owned(),
        };
        py.detach(|| self.node.pull(request)).map_err(refused)
    }

    #[pyo3(signature = (transfer_id, reason="cancelled", message=""))]
    fn abort(
        &self,
        py: Python<'_>,
        transfer_id: Id,
        reason: &str,
        message: &str,
    ) -> PyResult<bool> {
        let Id(id) = transfer_id;
        let reason = Reason::by_name(reason)
            .ok_or_else(|| PyValueError::new_err(format!("no reason is called {reason:?}")))?;
        Ok(py.detach(|| self.node.abort(id, reason, message)))
    }

    fn poll(&self, py: Python<'_>) -> PyResult<Vec<Py<PyAny>>> {
        let events = py.detach(|| self.node.poll());
        events
            .into_iter()
            .map(|event| to_python(py, event))
            .collect()
    }

    #[pyo3(signature = (timeout_s=None))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        let timeout = timeout_s
            .map(|value| seconds("timeout_s", value))
            .transpose()?;
        Ok(py.detach(|| self.node.wait(timeout)))
    }

    fn wake(&self, py: Python<'_>) {
        py.detach(|| self.node.wake());
    }

    fn residue<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let held = py.detach(|| self.node.residue());
        let dict = PyDict::new(py);
        for (name, value) in [
            ("sending", held.sending),
            ("receiving", held.receiving),
            ("awaited", held.awaited),
            ("pins", held.pins),
            ("connections", held.connections),
            ("mappings", held.mappings),
            ("jobs", held.jobs),
            ("remembered", held.remembered),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    fn figures<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let figures = py.detach(|| self.node.figures());
        let dict = PyDict::new(py);
        for (name, value) in [
            ("sent_blocks", figures.sent_blocks),
            ("sent_bytes", figures.sent_bytes),
            ("sent_tcp_bytes", figures.sent_tcp_bytes),
            ("received_blocks", figures.received_blocks),
            ("received_bytes", figures.received_bytes),
            ("copied_bytes", figures.copied_bytes),
            ("mismatches", figures.mismatches),
            ("sends_released", figures.sends_released),
            ("sends_aborted", figures.sends_aborted),
            ("receives_committed", figures.receives_committed),
            ("receives_failed", figures.receives_failed),
            ("untrusted", figures.untrusted),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.node.close());
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exc))]
    fn __exit__(&self, py: Python<'_>, _exc: &Bound<'_, PyTuple>) {
        self.close(py);
    }
}

/// Adds what this module has.
pub(crate) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("TransferError", module.py().get_type::<TransferError>())?;
    module.add_class::<PyTransferNode>()?;
    events::add(module)
}
