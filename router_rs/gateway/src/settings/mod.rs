//! Settings of a router: one table of keys, three layers.
//!
//! A file is weaker than `KVMESH_*` variables, and these are weaker than
//! flags. All layers, and the Python bindings, bring values by the same keys;
//! a value that is not allowed is refused with its key, its source and what
//! is allowed.

mod error;
mod key;
mod keys;
mod otlp;
mod parsers;
mod policy;
mod streams;
mod trust;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use serde_json::Value;

pub use error::SettingsError;
pub use key::{Key, Kind};
pub use keys::KEYS;
pub use parsers::ParserSettings;
pub use trust::JwtSettings;

use crate::mesh::{MeshSettings, PolicySettings, StreamSettings};

/// Values by key, from the weakest layer to the strongest.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    values: BTreeMap<&'static str, Value>,
}

impl Layers {
    /// Adds a stronger layer of typed values.
    ///
    /// # Errors
    /// [`SettingsError`] for unknown keys and values that are not allowed.
    pub fn add(
        &mut self,
        from: &str,
        layer: impl IntoIterator<Item = (String, Value)>,
    ) -> Result<(), SettingsError> {
        for (name, value) in layer {
            let key = keys::find(&name).ok_or_else(|| SettingsError::Unknown {
                from: from.to_owned(),
                key: name,
                known: KEYS
                    .iter()
                    .map(|key| key.name)
                    .collect::<Vec<_>>()
                    .join(", "),
            })?;
            let value = key.check(&value).map_err(|allowed| SettingsError::Value {
                from: from.to_owned(),
                key: key.name,
                value: match key.is_secret() {
                    // Of a wrong kind it may be right in all else.
                    true => "not shown".to_owned(),
                    false => value.to_string(),
                },
                allowed,
            })?;
            self.values.insert(key.name, value);
        }
        Ok(())
    }

    /// Adds a TOML file: its section `[router]` where it has one, as the file
    /// that all commands share; else the whole of it.
    ///
    /// # Errors
    /// As [`Layers::add`], and for what is not TOML.
    pub fn add_toml(&mut self, from: &str, text: &str) -> Result<(), SettingsError> {
        let unreadable = |reason: String| SettingsError::Unreadable {
            from: from.to_owned(),
            reason,
        };
        let table: toml::Table = toml::from_str(text).map_err(|e| unreadable(e.to_string()))?;
        let value = serde_json::to_value(table).map_err(|e| unreadable(e.to_string()))?;
        let Value::Object(mut map) = value else {
            return Ok(());
        };
        match map.remove("router") {
            Some(Value::Object(section)) => self.add(from, section),
            Some(other) => Err(unreadable(format!("router is {other}, not a section"))),
            None => self.add(from, map),
        }
    }

    /// Adds a JSON object.
    ///
    /// # Errors
    /// As [`Layers::add`], and for what is not a JSON object.
    pub fn add_json(&mut self, from: &str, text: &str) -> Result<(), SettingsError> {
        let unreadable = |reason: String| SettingsError::Unreadable {
            from: from.to_owned(),
            reason,
        };
        match serde_json::from_str(text).map_err(|e| unreadable(e.to_string()))? {
            Value::Object(map) => self.add(from, map),
            _ => Err(unreadable("not a JSON object".to_owned())),
        }
    }

    /// Adds `KVMESH_*` variables. Those that are no setting of a router (the
    /// client's, a worker's) are not looked at.
    ///
    /// # Errors
    /// As [`Layers::add`].
    pub fn add_environment(
        &mut self,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<(), SettingsError> {
        for (name, text) in variables {
            let Some(rest) = name.strip_prefix("KVMESH_") else {
                continue;
            };
            let Some(key) = keys::find(&rest.to_ascii_lowercase()) else {
                continue;
            };
            self.add(&name, [(key.name.to_owned(), Value::String(text))])?;
        }
        Ok(())
    }

    fn value(&self, name: &'static str) -> Value {
        let default = || keys::find(name).map_or(Value::Null, Key::default_value);
        self.values.get(name).cloned().unwrap_or_else(default)
    }

    fn text(&self, name: &'static str) -> String {
        self.value(name).as_str().unwrap_or_default().to_owned()
    }

    fn path(&self, name: &'static str) -> Option<PathBuf> {
        Some(self.text(name))
            .filter(|text| !text.is_empty())
            .map(PathBuf::from)
    }

    fn flag(&self, name: &'static str) -> bool {
        self.value(name).as_bool().unwrap_or_default()
    }

    fn number(&self, name: &'static str) -> u64 {
        self.value(name).as_u64().unwrap_or_default()
    }

    fn real(&self, name: &'static str) -> f64 {
        self.value(name).as_f64().unwrap_or_default()
    }

    fn duration(&self, name: &'static str) -> Duration {
        Duration::from_millis(self.number(name))
    }

    fn list(&self, name: &'static str) -> Vec<String> {
        let value = self.value(name);
        let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
        items
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    }
}

/// A text that is never printed.
#[derive(Clone, Default)]
pub struct Secret(
    /// The text.
    pub String,
);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

/// Settings of a router, all of them decided. `kvmesh-router --help` and
/// [`KEYS`] say what each one is.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Settings {
    pub listen: SocketAddr,
    pub advertise: String,
    pub insecure: bool,
    pub cluster_token_file: Option<PathBuf>,
    pub admin_listen: Option<SocketAddr>,
    pub worker_ca: Option<PathBuf>,
    pub worker_cert: Option<PathBuf>,
    pub worker_key: Option<PathBuf>,
    pub jwt: JwtSettings,
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    pub api_keys: Option<PathBuf>,
    pub tenant_requests_per_s: f64,
    pub tenant_concurrency: u32,
    pub etcd: Vec<String>,
    pub etcd_ca: Option<PathBuf>,
    pub etcd_cert: Option<PathBuf>,
    pub etcd_key: Option<PathBuf>,
    pub etcd_server_name: String,
    pub etcd_user: String,
    pub etcd_password: Secret,
    pub etcd_ttl: Duration,
    pub cluster: String,
    pub router_id: String,
    pub workers: Vec<String>,
    pub cache_dir: Option<PathBuf>,
    pub threads: usize,
    pub max_connections: usize,
    pub max_streams_per_connection: u32,
    pub max_request_bytes: u64,
    pub request_bytes_budget: u64,
    pub request_read_timeout: Duration,
    pub handshake_timeout: Duration,
    pub http1_idle_timeout: Duration,
    pub keep_alive_interval: Duration,
    pub keep_alive_timeout: Duration,
    pub max_connection_age: Duration,
    pub max_connection_age_grace: Duration,
    pub max_reset_streams: usize,
    pub inline_text_bytes: usize,
    pub text_threads: usize,
    pub default_class: String,
    pub slow_client_timeout: Duration,
    pub sse_keep_alive: Duration,
    pub parsers: ParserSettings,
    pub undelivered_ids: u64,
    pub queue_length: usize,
    pub queue_timeout: Duration,
    pub dispatch_ahead: Duration,
    pub dispatch_tries: usize,
    pub dispatch_interval: Duration,
    pub answer_timeout: Duration,
    pub orphan_ttl: Duration,
    pub reattach_grace: Duration,
    pub quarantine_time: Duration,
    pub worker_keep_alive: Duration,
    pub decisions_kept: usize,
    pub explain_traces: f64,
    pub policy: PolicySettings,
    pub streams: StreamSettings,
    pub drain_delay: Duration,
    pub grace: Duration,
    pub log_format: String,
    pub log_level: String,
    pub otlp_endpoint: String,
    pub otlp_share: f64,
    pub otlp_ca: Option<PathBuf>,
    pub otlp_headers: Secret,
}

impl Settings {
    /// Decides every setting.
    ///
    /// # Errors
    /// [`SettingsError::Together`] for a bind that others can reach without
    /// TLS, keys or `insecure`, and for a certificate without its key.
    pub fn resolve(layers: &Layers) -> Result<Self, SettingsError> {
        let size = |name| usize::try_from(layers.number(name)).unwrap_or(usize::MAX);
        let listen = layers.text("listen");
        let listen: SocketAddr = listen.parse().map_err(|_| SettingsError::Value {
            from: "listen".to_owned(),
            key: "listen",
            value: listen,
            allowed: "an IP address and a port".to_owned(),
        })?;
        let settings = Self {
            listen,
            advertise: layers.text("advertise"),
            insecure: layers.flag("insecure"),
            cluster_token_file: layers.path("cluster_token_file"),
            // Checked as a layer was added: what does not parse is empty.
            admin_listen: layers.text("admin_listen").parse().ok(),
            worker_ca: layers.path("worker_ca"),
            worker_cert: layers.path("worker_cert"),
            worker_key: layers.path("worker_key"),
            jwt: JwtSettings::of(layers),
            tls_cert: layers.path("tls_cert"),
            tls_key: layers.path("tls_key"),
            api_keys: layers.path("api_keys"),
            tenant_requests_per_s: layers.real("tenant_requests_per_s"),
            tenant_concurrency: u32::try_from(layers.number("tenant_concurrency"))
                .unwrap_or(u32::MAX),
            etcd: layers.list("etcd"),
            etcd_ca: layers.path("etcd_ca"),
            etcd_cert: layers.path("etcd_cert"),
            etcd_key: layers.path("etcd_key"),
            etcd_server_name: layers.text("etcd_server_name"),
            etcd_user: layers.text("etcd_user"),
            etcd_password: Secret(layers.text("etcd_password")),
            etcd_ttl: layers.duration("etcd_ttl"),
            cluster: layers.text("cluster"),
            router_id: layers.text("router_id"),
            workers: layers.list("workers"),
            cache_dir: layers.path("cache_dir"),
            threads: size("threads"),
            max_connections: size("max_connections"),
            max_streams_per_connection: u32::try_from(layers.number("max_streams_per_connection"))
                .unwrap_or(u32::MAX),
            max_request_bytes: layers.number("max_request_bytes"),
            request_bytes_budget: layers.number("request_bytes_budget"),
            request_read_timeout: layers.duration("request_read_timeout"),
            handshake_timeout: layers.duration("handshake_timeout"),
            http1_idle_timeout: layers.duration("http1_idle_timeout"),
            keep_alive_interval: layers.duration("keep_alive_interval"),
            keep_alive_timeout: layers.duration("keep_alive_timeout"),
            max_connection_age: layers.duration("max_connection_age"),
            max_connection_age_grace: layers.duration("max_connection_age_grace"),
            max_reset_streams: size("max_reset_streams"),
            inline_text_bytes: size("inline_text_bytes"),
            text_threads: size("text_threads"),
            default_class: layers.text("default_class"),
            slow_client_timeout: layers.duration("slow_client_timeout"),
            sse_keep_alive: layers.duration("sse_keep_alive"),
            parsers: ParserSettings::of(layers)?,
            undelivered_ids: layers.number("undelivered_ids"),
            queue_length: size("queue_length"),
            queue_timeout: layers.duration("queue_timeout"),
            dispatch_ahead: layers.duration("dispatch_ahead"),
            dispatch_tries: size("dispatch_tries"),
            dispatch_interval: layers.duration("dispatch_interval"),
            answer_timeout: layers.duration("answer_timeout"),
            orphan_ttl: layers.duration("orphan_ttl"),
            reattach_grace: layers.duration("reattach_grace"),
            quarantine_time: layers.duration("quarantine_time"),
            worker_keep_alive: layers.duration("worker_keep_alive"),
            decisions_kept: size("decisions_kept"),
            explain_traces: layers.real("explain_traces"),
            policy: policy::of(layers),
            streams: StreamSettings::of(layers),
            drain_delay: layers.duration("drain_delay"),
            grace: layers.duration("grace"),
            log_format: layers.text("log_format"),
            log_level: layers.text("log_level"),
            otlp_endpoint: layers.text("otlp_endpoint"),
            otlp_share: layers.real("otlp_share"),
            otlp_ca: layers.path("otlp_ca"),
            otlp_headers: Secret(layers.text("otlp_headers")),
        };
        settings.together()?;
        Ok(settings)
    }

    fn together(&self) -> Result<(), SettingsError> {
        let wrong = |message: &str| Err(SettingsError::Together(message.to_owned()));
        if self.etcd_cert.is_some() != self.etcd_key.is_some() {
            return wrong("etcd_cert and etcd_key go together; one of them is not set");
        }
        if self.etcd_ca.is_none() && (self.etcd_cert.is_some() || !self.etcd_server_name.is_empty())
        {
            return wrong(
                "etcd_cert and etcd_server_name need etcd_ca: without it there is no TLS",
            );
        }
        if self.etcd_user.is_empty() != self.etcd_password.0.is_empty() {
            return wrong("etcd_user and etcd_password go together; one of them is not set");
        }
        self.otlp_together()?;
        self.trust_together()?;
        if self.request_bytes_budget < self.max_request_bytes {
            return wrong(
                "request_bytes_budget is below max_request_bytes: no such request could pass",
            );
        }
        Ok(())
    }

    /// What the mesh needs of them.
    #[must_use]
    pub fn mesh(&self, router_id: String, incarnation: u64) -> MeshSettings {
        MeshSettings {
            router_id,
            incarnation,
            workers: self.workers.clone(),
            cache_dir: self.cache_dir.clone(),
            keep_alive: self.worker_keep_alive,
            slow_client_timeout: self.slow_client_timeout,
            undelivered_ids: self.undelivered_ids,
            queue_length: self.queue_length,
            queue_timeout: self.queue_timeout,
            dispatch_ahead: self.dispatch_ahead,
            dispatch_tries: self.dispatch_tries,
            dispatch_interval: self.dispatch_interval,
            answer_timeout: self.answer_timeout,
            orphan_timeout: self.orphan_ttl,
            reattach_grace: self.reattach_grace,
            quarantine_time: self.quarantine_time,
            decisions_kept: self.decisions_kept,
            explain_traces: self.explain_traces,
            policy: self.policy.clone(),
            streams: self.streams,
            ..MeshSettings::default()
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn listen(file: &str) -> Result<SocketAddr, SettingsError> {
        let mut layers = Layers::default();
        layers.add_toml("test.toml", file)?;
        Ok(Settings::resolve(&layers)?.listen)
    }

    #[test]
    fn a_file_is_the_routers_alone_or_has_a_section_for_it() {
        let wanted: SocketAddr = "127.0.0.1:1".parse().unwrap();
        assert_eq!(listen("listen = '127.0.0.1:1'").unwrap(), wanted);
        let shared = "[worker]\nrole = 'both'\n[router]\nlisten = '127.0.0.1:1'";
        assert_eq!(listen(shared).unwrap(), wanted);
        assert!(
            listen("[router]\nlisen = 'x'")
                .unwrap_err()
                .to_string()
                .contains("lisen")
        );
        assert!(
            listen("router = 1")
                .unwrap_err()
                .to_string()
                .contains("not a section")
        );
    }

    #[test]
    fn a_collector_is_asked_for_in_a_form_that_can_be_used() {
        assert!(listen("otlp_endpoint = 'collector:4317'").is_ok());
        let refused = listen("otlp_endpoint = 'https://collector:4317'").unwrap_err();
        let refused = refused.to_string();
        assert!(refused.contains("otlp_endpoint") && refused.contains("host:port"));
    }

    #[test]
    fn other_machines_reach_a_router_only_where_it_was_said_that_they_may() {
        let resolved = |file: &str| listen(file).map_err(|error| error.to_string());
        for reachable in ["0.0.0.0:1", "192.0.2.1:1", "[::]:1"] {
            let refused = resolved(&format!("listen = '{reachable}'")).unwrap_err();
            for named in [
                "listen", reachable, "tls_cert", "tls_key", "api_keys", "insecure",
            ] {
                assert!(refused.contains(named), "{named} is not in: {refused}");
            }
            let trusted = format!("listen = '{reachable}'\ninsecure = true");
            assert_eq!(resolved(&trusted), Ok(reachable.parse().unwrap()));
            for proof in ["tls_cert = 'c'\ntls_key = 'k'", "api_keys = 'f'"] {
                let proven = format!("listen = '{reachable}'\n{proof}");
                assert_eq!(resolved(&proven), Ok(reachable.parse().unwrap()));
            }
            // That is for routers and workers, and opens nothing to clients.
            let token = format!("listen = '{reachable}'\ncluster_token_file = 'f'");
            assert!(resolved(&token).is_err());
        }
        for own in ["127.0.0.1:1", "[::1]:1"] {
            assert_eq!(
                resolved(&format!("listen = '{own}'")),
                Ok(own.parse().unwrap())
            );
        }
    }
}
