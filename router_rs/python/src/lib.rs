//! Bindings: thin, no logic.

mod attention;
mod chain;
mod pool;
mod registry;
mod router;
mod router_settings;
mod simulate;
mod transfer;

use pyo3::prelude::*;

/// The native module of kvmesh.
#[pymodule]
fn _router(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<pool::PyKvPool>()?;
    transfer::add(module)?;
    chain::add(module)?;
    registry::register(module)?;
    router::register(module)?;
    router_settings::register(module)?;
    simulate::register(module)?;
    module.add_class::<attention::PyPagedKv>()?;
    Ok(())
}
