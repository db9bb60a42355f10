//! Replays of traces.

use kvmesh_simulator::replay_json;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Adds what this module has.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(simulate, module)?)
}

/// Replays a trace: what to replay as JSON and the trace's text give the
/// results as JSON.
#[pyfunction]
fn simulate(py: Python<'_>, replay: &str, trace: &str) -> PyResult<String> {
    py.detach(|| replay_json(replay, trace))
        .map_err(|error| PyValueError::new_err(error.to_string()))
}
