//! What a worker shows others of its cluster, and asks of them.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use kvmesh_transfer::{PeerTls as TransferTls, Proof};
use kvmesh_trust::{ClusterToken, Dialer, Followed, PeerTls};
use pyo3::{exceptions::PyValueError, prelude::*};
use rustls::{ClientConfig, Error, ServerConfig, pki_types::CertificateDer};

/// Adds what this module has.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyClusterToken>()?;
    module.add_class::<PyPeerTls>()
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

/// A worker's TLS, out of its files. The port that has it reads them again.
#[pyclass(name = "PeerTls", module = "kvmesh._router", frozen)]
pub(crate) struct PyPeerTls {
    pub(crate) tls: Arc<PeerTls>,
}

#[pymethods]
impl PyPeerTls {
    #[new]
    fn new(
        certificate: PathBuf,
        key: PathBuf,
        ca: PathBuf,
        cluster: &str,
        worker_id: &str,
    ) -> PyResult<Self> {
        let (certificate, key) = (("tls_cert", certificate), ("tls_key", key));
        let tls = PeerTls::open(certificate, key, ("tls_ca", ca), cluster, worker_id);
        let tls = tls.map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(Self { tls: Arc::new(tls) })
    }
}

/// What a worker shows other workers when it calls them.
pub(crate) fn dialer(token: Option<&PyClusterToken>, tls: Option<&PyPeerTls>) -> Dialer {
    Dialer {
        token: token.map(|token| Arc::clone(&token.token)),
        tls: tls.map(|tls| tls.tls.calls()),
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

impl PyPeerTls {
    /// As transfers of KV between workers use it.
    pub(crate) fn transfers(&self) -> Arc<dyn TransferTls> {
        Arc::new(Transfers(Arc::clone(&self.tls)))
    }
}

#[derive(Debug)]
struct Transfers(Arc<PeerTls>);

impl TransferTls for Transfers {
    fn accepting(&self) -> Arc<ServerConfig> {
        self.0.transfer_port()
    }

    fn connecting(&self) -> Result<Arc<ClientConfig>, Error> {
        self.0.transfer_calls().map(Arc::new)
    }

    fn worker(&self, certificate: &CertificateDer<'_>) -> Result<String, String> {
        let named = self.0.worker(certificate);
        named.map_err(|error| error.to_string())
    }
}
