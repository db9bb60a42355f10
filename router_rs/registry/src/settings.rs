//! How etcd is reached.

use std::{fmt, time::Duration};

use kvmesh_trust::ServerTls;
use tonic::transport::{Channel, Endpoint};

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
    pub tls: Option<ServerTls>,
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

    /// A channel to each member, connected when it is used.
    pub(crate) fn channels(&self) -> Result<Vec<Channel>, SettingsError> {
        if self.endpoints.is_empty() {
            return Err(SettingsError::NoEndpoint);
        }
        if !crate::keys::is_name(&self.cluster) {
            return Err(SettingsError::Cluster(self.cluster.clone()));
        }
        if self.ttl < Duration::from_secs(2) || self.ttl > Duration::from_secs(3600) {
            return Err(SettingsError::Ttl(self.ttl));
        }
        self.endpoints.iter().map(|e| self.channel(e)).collect()
    }

    fn channel(&self, given: &str) -> Result<Channel, SettingsError> {
        let wrong = |_| SettingsError::Endpoint(given.to_owned());
        let (secure, address) = match given.split_once("://") {
            Some(("https", address)) => (true, address),
            Some(("http", address)) => (false, address),
            Some(_) => return Err(SettingsError::Endpoint(given.to_owned())),
            None => (self.tls.is_some(), given),
        };
        let endpoint = match secure {
            true => ServerTls::endpoint(address),
            false => Endpoint::from_shared(format!("http://{address}")),
        };
        let endpoint = endpoint.map_err(wrong)?;
        if endpoint.uri().port_u16().is_none() || endpoint.uri().host().is_none_or(str::is_empty) {
            return Err(SettingsError::Endpoint(given.to_owned()));
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
            (Some(tls), true) => Ok(tls.channel(&endpoint)),
            (None, false) => Ok(endpoint.connect_lazy()),
            _ => Err(SettingsError::TlsMismatch(given.to_owned())),
        }
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
