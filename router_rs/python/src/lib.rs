//! Bindings: thin, no logic.

mod pool;

use pyo3::prelude::*;

/// The native module of kvmesh.
#[pymodule]
fn _router(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<pool::PyKvPool>()?;
    Ok(())
}
