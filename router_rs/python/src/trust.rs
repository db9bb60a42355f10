//! What a worker shows others of its cluster, and asks of them.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use kvmesh_transfer::Proof;
use kvmesh_trust::{ClusterToken, Followed};
use pyo3::{exceptions::PyValueError, prelude::*};

/// Adds what this module has.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyClusterToken>()
}

/// The cluster's token, out of its file. The port that has it reads the file again.
#[pyclass(name = "ClusterToken", module = "kvmesh._router", frozen)]
pub(crate) struct PyClusterToken {
    pub(crate) token: Arc<Followed<ClusterToken>>,
}

#[pymethods]
impl PyClusterToken {
    #[new]
    fn new(file: PathBuf) -> PyResult<Self> {
        let token = ClusterToken::open(&file);
        let token = token.map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(Self {
            token: Arc::new(token),
        })
    }
}

impl PyClusterToken {
    /// As peers show it each other.
    pub(crate) fn proof(&self) -> Arc<dyn Proof> {
        Arc::new(TokenProof(Arc::clone(&self.token)))
    }
}

#[derive(Debug)]
struct TokenProof(Arc<Followed<ClusterToken>>);

impl Proof for TokenProof {
    fn shown(&self) -> Bytes {
        Bytes::copy_from_slice(self.0.now().shown().as_encoded_bytes())
    }

    fn accepts(&self, given: &[u8]) -> bool {
        self.0.now().accepts(given)
    }
}
