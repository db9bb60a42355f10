//! Bindings: thin, no logic.

mod attention;
mod chain;
mod decode_loop;
mod foreign;
mod kv_index;
mod pool;
mod registry;
mod router;
mod router_settings;
mod scoring;
mod sim;
mod simulate;
mod transfer;
mod trust;
mod worker_port;

use pyo3::prelude::*;

/// The native module of kvmesh.
#[pymodule]
fn _router(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<pool::PyKvPool>()?;
    transfer::add(module)?;
    trust::register(module)?;
    chain::add(module)?;
    module.add_class::<foreign::PyForeignNames>()?;
    kv_index::register(module)?;
    registry::register(module)?;
    router::register(module)?;
    worker_port::register(module)?;
    router_settings::register(module)?;
    scoring::register(module)?;
    simulate::register(module)?;
    module.add_class::<attention::PyPagedKv>()?;
    module.add_class::<sim::PySimStreams>()?;
    module.add_class::<decode_loop::PyDecodeLoop>()?;
    Ok(())
}
