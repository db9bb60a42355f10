//! Names of prompt prefixes (hash scheme 1), for engines that tell of their cache.

use kvmesh_kv_index as kv_index;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Parent value of first blocks in a namespace.
#[pyfunction]
fn chain_root(model_digest: &str, adapter: &str, cache_salt: &str) -> u64 {
    kv_index::namespace_root(model_digest, adapter, cache_salt)
}

/// Chain value after each whole unit of 16 ids.
#[pyfunction]
fn chain_values(parent: u64, ids: &[u8]) -> PyResult<Vec<u64>> {
    if !ids.len().is_multiple_of(4) {
        return Err(PyValueError::new_err("ids are 4 bytes each"));
    }
    let ids: Vec<u32> = ids
        .chunks_exact(4)
        .map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]))
        .collect();
    Ok(kv_index::chain_values(parent, &ids))
}

pub(crate) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(chain_root, module)?)?;
    module.add_function(wrap_pyfunction!(chain_values, module)?)?;
    Ok(())
}
