//! The settings of a router, for the command line's flags.

use kvmesh_gateway::settings::{KEYS, Kind};
use pyo3::prelude::*;

/// Adds what this module has.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(router_settings, module)?)
}

/// Every setting of a router as (name, default, meaning, what is allowed,
/// whether it is a switch).
#[pyfunction]
fn router_settings() -> Vec<(&'static str, &'static str, &'static str, String, bool)> {
    KEYS.iter()
        .map(|key| {
            let switch = key.kind == Kind::Flag;
            (key.name, key.default, key.help, key.allowed(), switch)
        })
        .collect()
}
