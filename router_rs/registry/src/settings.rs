//! How etcd is reached.

use std::{fmt, time::Duration};

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use crate::error::SettingsError;

/// How etcd is reached, and under which cluster's keys.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Members of etcd, each "host:port" or with `http://` or `https://`. The
    /// one that answers is used; a failing one is left for the next.
    pub endpoints: Vec<String>,
    /// Cluster: part of the keys. 1 to 128 characters of `[A-Za-z0-9._-]`.
    pub cluster: String,
    /// TLS; needed for `https://`, and makes `host:port` mean it.
    pub tls: Option<Tls>,
    /// User and password, where etcd has authentication on.
    pub credentials: Option<Credentials>,
    /// How long a record outlives the last sign of life. Default 10 s; whole
    /// seconds, 2 s to 1 h. Watches ask for progress every half of it.
    pub ttl: Duration,
    /// Longest wait for the answer to one call at one endpoint. Default 2 s.
    pub call_timeout: Duration,
    /// Shortest and longest pause before another try; the pause doubles and is
    /// drawn at random below its value. Default 100 ms to 5 s.
    pub backoff: (Duration, Duration),
}

impl Settings {
    /// Settings with defaults. Checked by [`Registry::new`](crate::Registry::new).
    pub fn new(
        endpoints: impl IntoIterator<Item = impl Into<String>>,
        cluster: impl Into<String>,
    ) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            cluster: cluster.into(),
            tls: None,
            credentials: None,
            ttl: Duration::from_secs(10),
            call_timeout: Duration::from_secs(2),
            backoff: (Duration::from_millis(100), Duration::from_secs(5)),
        }
    }

    /// The endpoints as tonic takes them.
    pub(crate) fn transport(&self) -> Result<Vec<Endpoint>, SettingsError> {
        if self.endpoints.is_empty() {
            return Err(SettingsError::NoEndpoint);
        }
        if !crate::keys::is_name(&self.cluster) {
            return Err(SettingsError::Cluster(self.cluster.clone()));
        }
        if self.ttl < Duration::from_secs(2) || self.ttl > Duration::from_secs(3600) {
            return Err(SettingsError::Ttl(self.ttl));
        }
        self.endpoints.iter().map(|e| self.endpoint(e)).collect()
    }

    fn endpoint(&self, given: &str) -> Result<Endpoint, SettingsError> {
        let wrong = || SettingsError::Endpoint(given.to_owned());
        let uri = if given.contains("://") {
            given.to_owned()
        } else if self.tls.is_some() {
            format!("https://{given}")
        } else {
            format!("http://{given}")
        };
        let secure = uri.starts_with("https://");
        if !secure && !uri.starts_with("http://") {
            return Err(wrong());
        }
        let endpoint = Endpoint::from_shared(uri).map_err(|_| wrong())?;
        if endpoint.uri().port_u16().is_none() || endpoint.uri().host().is_none_or(str::is_empty) {
            return Err(wrong());
        }
        let endpoint = endpoint
            .tcp_nodelay(true)
            .connect_timeout(self.call_timeout)
            // A peer that vanished without a FIN is found by the transport,
            // also while a stream is silent.
            .http2_keep_alive_interval(self.ttl / 2)
            .keep_alive_timeout(self.ttl / 2)
            .keep_alive_while_idle(true);
        match (&self.tls, secure) {
            (Some(tls), true) => endpoint
                .tls_config(tls.config())
                .map_err(|error| SettingsError::Tls(error.to_string())),
            (None, false) => Ok(endpoint),
            _ => Err(SettingsError::TlsMismatch(given.to_owned())),
        }
    }
}

/// TLS to etcd.
#[derive(Debug, Clone, Default)]
pub struct Tls {
    /// Roots that etcd's certificate must lead to, PEM.
    pub ca_pem: Vec<u8>,
    /// Our certificate and its key, PEM, where etcd asks for one.
    pub identity_pem: Option<(Vec<u8>, Vec<u8>)>,
    /// Name that etcd's certificate must have, where the endpoint is another.
    pub server_name: Option<String>,
}

impl Tls {
    fn config(&self) -> ClientTlsConfig {
        let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.ca_pem));
        if let Some((certificate, key)) = &self.identity_pem {
            config = config.identity(Identity::from_pem(certificate, key));
        }
        if let Some(name) = &self.server_name {
            config = config.domain_name(name);
        }
        config
    }
}

/// User and password. Never printed.
#[derive(Clone)]
pub struct Credentials {
    /// Name of the user.
    pub user: String,
    /// Password.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}
