//! TLS out of files: of a port that clients call, of a worker's port, of calls to
//! workers.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, RootCertStore,
    ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{
        ClientCertVerifierBuilder, NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier,
    },
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::{
    followed::{FileError, Followed, Wrong},
    identity::{Identity, IdentityError, Role},
};

pub(crate) const HTTP2: &[u8] = b"h2";
/// What is spoken on transfer ports: a connection cannot be led to the other port.
const TRANSFER: &[u8] = b"kvmesh-transfer";
const NO_CERTIFICATE: &str = "it has no certificate that can be read; allowed is PEM";

/// A setting, and the file that it names.
pub type File = (&'static str, PathBuf);

pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())))
}

/// A chain and its key. The files are those at `at` and after it.
pub(crate) fn certified(said: &[Vec<u8>], at: usize) -> Result<CertifiedKey, Wrong> {
    let text = |file: usize| said.get(file).map(Vec::as_slice).unwrap_or_default();
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(text(at))
        .collect::<Result<_, _>>()
        // What is wrong with it may tell what is in it, and that may be a key.
        .map_err(|_| Wrong::new(at, NO_CERTIFICATE))?;
    if chain.is_empty() {
        return Err(Wrong::new(at, NO_CERTIFICATE));
    }
    let key = PrivateKeyDer::from_pem_slice(text(at + 1)).map_err(|_| {
        Wrong::new(
            at + 1,
            "it has no private key that can be read; allowed is PEM",
        )
    })?;
    CertifiedKey::from_der(chain, key, &provider()).map_err(|error| {
        let reason = match error {
            Error::InconsistentKeys(_) => "it is not the key of the certificate".to_owned(),
            other => other.to_string(),
        };
        Wrong::new(at + 1, reason)
    })
}

/// Whom a chain is for; `role` alone is allowed, and `id` where one is given.
fn own(
    chain: &CertifiedKey,
    at: usize,
    cluster: &str,
    role: Role,
    id: Option<&str>,
) -> Result<(), Wrong> {
    let first = chain
        .end_entity_cert()
        .map_err(|error| Wrong::new(at, error))?;
    let found = Identity::read(first, cluster).map_err(|error| Wrong::new(at, error))?;
    if found.role == role && id.is_none_or(|id| id == found.id) {
        return Ok(());
    }
    let wanted = Identity {
        role,
        id: id.unwrap_or("(any id)").to_owned(),
    };
    Err(Wrong::new(
        at,
        format!("it is of {found}; allowed is that of {wanted}"),
    ))
}

pub(crate) fn authorities(said: &[Vec<u8>], at: usize) -> Result<Arc<RootCertStore>, Wrong> {
    let text = said.get(at).map(Vec::as_slice).unwrap_or_default();
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(text) {
        let certificate = certificate.map_err(|_| Wrong::new(at, NO_CERTIFICATE))?;
        roots
            .add(certificate)
            .map_err(|error| Wrong::new(at, error))?;
    }
    match roots.is_empty() {
        true => Err(Wrong::new(at, NO_CERTIFICATE)),
        false => Ok(Arc::new(roots)),
    }
}

/// The TLS of a port that anybody may call: a certificate and its key. HTTP/2, then
/// HTTP/1.1.
///
/// # Errors
/// [`FileError`] for files that cannot be read or used.
pub fn public_port(certificate: File, key: File) -> Result<Followed<ServerConfig>, FileError> {
    Followed::open(vec![certificate, key], |said, _| {
        let key = certified(said, 0)?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| Wrong::new(0, error))?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
        config.alpn_protocols = vec![HTTP2.to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    })
}

/// The TLS of a worker's ports.
#[derive(Debug)]
struct WorkerPorts {
    /// Of its calls. Whoever calls may show a certificate that one of the authorities
    /// has signed; what it says is asked for later, call by call.
    calls: Arc<ServerConfig>,
    /// Of transfers of KV. Whoever comes has to show one.
    transfers: Arc<ServerConfig>,
}

/// The TLS of a worker's ports.
///
/// # Errors
/// [`FileError`] for files that cannot be read or used, such as a certificate that
/// is not this worker's.
fn worker_ports(
    certificate: File,
    key: File,
    ca: File,
    cluster: String,
    worker_id: String,
) -> Result<Followed<WorkerPorts>, FileError> {
    Followed::open(vec![certificate, key, ca], move |said, _| {
        let key = certified(said, 0)?;
        own(&key, 0, &cluster, Role::Worker, Some(&worker_id))?;
        let key = Arc::new(SingleCertAndKey::from(key));
        let callers =
            WebPkiClientVerifier::builder_with_provider(authorities(said, 2)?, provider());
        let port = |callers: ClientCertVerifierBuilder, spoken: &[u8]| -> Result<_, Wrong> {
            let callers = callers.build().map_err(|error| Wrong::new(2, error))?;
            let mut config = ServerConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .map_err(|error| Wrong::new(0, error))?
                .with_client_cert_verifier(callers)
                .with_cert_resolver(Arc::clone(&key) as _);
            config.alpn_protocols = vec![spoken.to_vec()];
            Ok(config)
        };
        // Health needs none.
        let calls = port(callers.clone().allow_unauthenticated(), HTTP2)?;
        let mut transfers = port(callers, TRANSFER)?;
        // Each connection looks at the certificates that are in force.
        transfers.send_tls13_tickets = 0;
        transfers.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(WorkerPorts {
            calls: Arc::new(calls),
            transfers: Arc::new(transfers),
        })
    })
}

/// What calls to workers are made with.
#[derive(Debug)]
struct WorkerTrust {
    roots: Arc<RootCertStore>,
    key: Option<Arc<SingleCertAndKey>>,
}

/// The TLS of calls to workers: authorities, and what is shown. `role`: what the
/// caller's certificate has to say of it.
///
/// # Errors
/// [`FileError`] for files that cannot be read or used.
fn calls_to_workers(
    ca: File,
    identity: Option<(File, File)>,
    cluster: String,
    role: Role,
) -> Result<Followed<WorkerTrust>, FileError> {
    let mut files = vec![ca];
    if let Some((certificate, key)) = identity {
        files.extend([certificate, key]);
    }
    Followed::open(files, move |said, _| {
        let roots = authorities(said, 0)?;
        let key = match said.len() {
            1 => None,
            _ => {
                let key = certified(said, 1)?;
                own(&key, 1, &cluster, role, None)?;
                Some(Arc::new(SingleCertAndKey::from(key)))
            }
        };
        Ok(WorkerTrust { roots, key })
    })
}

impl WorkerTrust {
    /// For one call: the worker of this cluster that has this id, or any.
    fn config(
        &self,
        cluster: &str,
        worker_id: Option<&str>,
        spoken: &[u8],
    ) -> Result<ClientConfig, Error> {
        let verifier = NamesWorker {
            roots: Arc::clone(&self.roots),
            provider: provider(),
            cluster: cluster.to_owned(),
            worker_id: worker_id.map(str::to_owned),
        };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match &self.key {
            Some(key) => builder.with_client_cert_resolver(Arc::clone(key) as _),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![spoken.to_vec()];
        // A worker is known by its id, whatever its address is called.
        config.enable_sni = false;
        Ok(config)
    }
}

/// Takes a certificate that an authority signed and that names a worker of the
/// cluster. Its other names do not count: workers move.
#[derive(Debug)]
struct NamesWorker {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    cluster: String,
    worker_id: Option<String>,
}

impl ServerCertVerifier for NamesWorker {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        let named = Identity::read(end_entity, &self.cluster);
        let fits = named.and_then(|named| named.worker(self.worker_id.as_deref()));
        match fits {
            Ok(_) => Ok(ServerCertVerified::assertion()),
            Err(error) => Err(not_named(error)),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

fn not_named(error: IdentityError) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

/// The TLS of calls to workers of one cluster.
#[derive(Clone, Debug)]
pub struct WorkerTls {
    trust: Arc<Followed<WorkerTrust>>,
    cluster: Arc<str>,
}

impl WorkerTls {
    /// Authorities, and what is shown: a chain and its key, where workers ask.
    /// `role`: what the caller's own certificate has to say of it.
    ///
    /// # Errors
    /// [`FileError`] for files that cannot be read or used.
    pub fn open(
        ca: File,
        identity: Option<(File, File)>,
        cluster: &str,
        role: Role,
    ) -> Result<Self, FileError> {
        Ok(Self {
            trust: Arc::new(calls_to_workers(ca, identity, cluster.to_owned(), role)?),
            cluster: cluster.into(),
        })
    }

    pub(crate) fn cluster(&self) -> &str {
        &self.cluster
    }

    pub(crate) fn config(&self, worker_id: Option<&str>) -> Result<ClientConfig, Error> {
        self.trust.now().config(&self.cluster, worker_id, HTTP2)
    }

    /// Takes changed files, for as long as it is polled.
    pub async fn follow(self) {
        self.trust.follow_and_log(|_| {}).await;
    }
}

/// A worker's TLS: of its ports, and of its own calls to other workers.
#[derive(Debug)]
pub struct PeerTls {
    ports: Arc<Followed<WorkerPorts>>,
    calls: WorkerTls,
}

impl PeerTls {
    /// This worker's certificate and key, and the authorities of all that it meets.
    ///
    /// # Errors
    /// [`FileError`] for files that cannot be read or used, such as a certificate
    /// that is not this worker's.
    pub fn open(
        certificate: File,
        key: File,
        ca: File,
        cluster: &str,
        worker_id: &str,
    ) -> Result<Self, FileError> {
        let identity = Some((certificate.clone(), key.clone()));
        let calls = WorkerTls::open(ca.clone(), identity, cluster, Role::Worker)?;
        let ports = worker_ports(
            certificate,
            key,
            ca,
            cluster.to_owned(),
            worker_id.to_owned(),
        )?;
        Ok(Self {
            ports: Arc::new(ports),
            calls,
        })
    }

    /// What new connections with calls are taken with.
    #[must_use]
    pub fn port(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.ports.now().calls)
    }

    /// What new connections of other workers are taken with that want KV.
    #[must_use]
    pub fn transfer_port(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.ports.now().transfers)
    }

    /// What it reaches other workers with that have KV: any worker of the cluster.
    ///
    /// # Errors
    /// Where the key cannot be used.
    pub fn transfer_calls(&self) -> Result<ClientConfig, Error> {
        let trust = self.calls.trust.now();
        let mut config = trust.config(&self.calls.cluster, None, TRANSFER)?;
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// The worker whose certificate this is.
    ///
    /// # Errors
    /// [`IdentityError`] for one that is no worker's of this cluster.
    pub fn worker(&self, certificate: &CertificateDer<'_>) -> Result<String, IdentityError> {
        Ok(self.identity(certificate)?.worker(None)?.id)
    }

    /// Whom a certificate is for.
    ///
    /// # Errors
    /// [`IdentityError`] for nobody of this cluster.
    pub fn identity(&self, certificate: &CertificateDer<'_>) -> Result<Identity, IdentityError> {
        Identity::read(certificate, self.calls.cluster())
    }

    /// The TLS of its own calls to other workers.
    #[must_use]
    pub fn calls(&self) -> WorkerTls {
        self.calls.clone()
    }

    /// Takes changed files, for as long as it is polled.
    pub async fn follow(self: Arc<Self>) {
        let ports = Arc::clone(&self.ports).follow_and_log(|_| {});
        tokio::join!(ports, self.calls.clone().follow());
    }
}
