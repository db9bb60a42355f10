//! Every setting of a router: name, kind, default, bounds, meaning.

use serde_json::{Value, json};

use crate::mesh::POLICIES;

/// What values a key takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Any text.
    Text,
    /// One of these.
    OneOf(&'static [&'static str]),
    /// IP address and port.
    Address,
    /// Texts; as one text separated by commas.
    List,
    /// true or false.
    Flag,
    /// A whole number within bounds, both allowed.
    Number(u64, u64),
    /// A number within bounds, both allowed.
    Real(f64, f64),
    /// Bytes within bounds; `16MiB`, `512KiB` or a bare number of bytes.
    Bytes(u64, u64),
    /// A time in milliseconds within bounds; written `250ms`, `10s`, `5m`,
    /// `1h`, or as a bare number of seconds.
    Time(u64, u64),
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Name in files and JSON; `--kebab-case` as a flag, `KVMESH_UPPER_CASE` as
    /// a variable.
    pub name: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// The value if none is given, as text.
    pub default: &'static str,
    /// What it is.
    pub help: &'static str,
}

const HOUR: u64 = 3_600_000;
const GIB: u64 = 1 << 30;

const fn key(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Key {
    Key {
        name,
        kind,
        default,
        help,
    }
}

/// All settings of a router.
pub const KEYS: &[Key] = &[
    key(
        "listen",
        Kind::Address,
        "127.0.0.1:7440",
        "Address for gRPC, metrics and health. Port 0 takes a free one.",
    ),
    key(
        "advertise",
        Kind::Text,
        "",
        "Address, host:port, that clients find in etcd. Empty: the bound one.",
    ),
    key(
        "insecure",
        Kind::Flag,
        "false",
        "Allow a bind that other machines can reach without TLS: whoever reaches the port can use the models.",
    ),
    key(
        "tls_cert",
        Kind::Text,
        "",
        "PEM file of the certificate chain. Needs tls_key.",
    ),
    key(
        "tls_key",
        Kind::Text,
        "",
        "PEM file of the certificate's key.",
    ),
    key(
        "api_keys",
        Kind::Text,
        "",
        "TOML file of tenants and digests of their keys; read again when it changes. Given: calls for inference need a key.",
    ),
    key(
        "tenant_requests_per_s",
        Kind::Real(0.0, 1e9),
        "0",
        "Requests a second of one tenant, on average; those of a second may come at once. 0: any. Without api_keys a tenant is an address.",
    ),
    key(
        "tenant_concurrency",
        Kind::Number(0, 1_000_000_000),
        "0",
        "Requests of one tenant at the same time. 0: any number.",
    ),
    key(
        "etcd",
        Kind::List,
        "",
        "Members of etcd, host:port each. Empty: only the workers named here.",
    ),
    key(
        "etcd_ca",
        Kind::Text,
        "",
        "PEM file of the authorities that etcd's certificate must come from. Given: etcd is spoken to over TLS.",
    ),
    key(
        "etcd_cert",
        Kind::Text,
        "",
        "PEM file of this router's certificate for etcd. Needs etcd_key and etcd_ca.",
    ),
    key(
        "etcd_key",
        Kind::Text,
        "",
        "PEM file of that certificate's key.",
    ),
    key(
        "etcd_server_name",
        Kind::Text,
        "",
        "Name that etcd's certificate has, where it is not the one in etcd's address.",
    ),
    key(
        "etcd_user",
        Kind::Text,
        "",
        "User at etcd. Needs etcd_password.",
    ),
    key(
        "etcd_password",
        Kind::Text,
        "",
        "Password at etcd. Best given by its variable: flags can be read by everyone on the machine.",
    ),
    key(
        "etcd_ttl",
        Kind::Time(2_000, HOUR),
        "10s",
        "Time that a record outlives its last sign of life.",
    ),
    key(
        "cluster",
        Kind::Text,
        "default",
        "Name of the cluster: part of etcd's keys.",
    ),
    key(
        "router_id",
        Kind::Text,
        "",
        "Name of this router, best stable over restarts. Empty: drawn at start.",
    ),
    key(
        "workers",
        Kind::List,
        "",
        "Workers at fixed addresses, host:port each, besides those in etcd.",
    ),
    key(
        "cache_dir",
        Kind::Text,
        "",
        "Folder where workers' tokenisers are kept. Empty: in memory only.",
    ),
    key(
        "threads",
        Kind::Number(1, 1_024),
        "2",
        "Threads that serve.",
    ),
    key(
        "max_connections",
        Kind::Number(1, 1_000_000),
        "10000",
        "Connections at the same time; more are closed at once.",
    ),
    key(
        "max_streams_per_connection",
        Kind::Number(1, 1_000_000),
        "10000",
        "Calls at the same time on one connection; clients wait.",
    ),
    key(
        "max_request_bytes",
        Kind::Bytes(1_024, GIB),
        "16MiB",
        "Longest message, by its inflated length.",
    ),
    key(
        "request_bytes_budget",
        Kind::Bytes(1_024, 64 * GIB),
        "256MiB",
        "Bytes of all messages between their length prefix and admission.",
    ),
    key(
        "request_read_timeout",
        Kind::Time(100, HOUR),
        "30s",
        "A message has to be there this long after its call began.",
    ),
    key(
        "handshake_timeout",
        Kind::Time(100, HOUR),
        "10s",
        "TLS and the first bytes of a connection have to be there within this.",
    ),
    key(
        "keep_alive_interval",
        Kind::Time(1_000, HOUR),
        "30s",
        "A connection is pinged this often.",
    ),
    key(
        "keep_alive_timeout",
        Kind::Time(1_000, HOUR),
        "20s",
        "A connection that answers no ping for this long is closed.",
    ),
    key(
        "max_connection_age",
        Kind::Time(0, 24 * HOUR),
        "1h",
        "Connections are asked to go after this time, 10 % more or less, so that clients spread. 0: never.",
    ),
    key(
        "max_connection_age_grace",
        Kind::Time(0, 24 * HOUR),
        "10m",
        "Time that calls of such a connection have to end.",
    ),
    key(
        "max_reset_streams",
        Kind::Number(1, 10_000_000),
        "20000",
        "Calls reset by the client before they were accepted, at any one time, above which a connection is closed.",
    ),
    key(
        "inline_text_bytes",
        Kind::Bytes(0, 1 << 20),
        "4KiB",
        "Text below this is tokenised at once, longer text on the text threads.",
    ),
    key(
        "text_threads",
        Kind::Number(1, 256),
        "2",
        "Threads that tokenise long text, render chats and inflate.",
    ),
    key(
        "default_class",
        Kind::OneOf(&["interactive", "standard", "batch"]),
        "standard",
        "Class of requests that name none.",
    ),
    key(
        "slow_client_timeout",
        Kind::Time(100, 24 * HOUR),
        "60s",
        "A client that takes nothing for so long is given up.",
    ),
    key(
        "sse_keep_alive",
        Kind::Time(0, HOUR),
        "10s",
        "A stream of the OpenAI face that has nothing to say for so long sends a comment, which keeps proxies from closing it. 0: never.",
    ),
    key(
        "undelivered_ids",
        Kind::Number(1_024, 1 << 32),
        "16777216",
        "Token ids kept for all clients together, 4 bytes each.",
    ),
    key(
        "queue_length",
        Kind::Number(0, 1_000_000),
        "4096",
        "Requests that may wait for room.",
    ),
    key(
        "queue_timeout",
        Kind::Time(100, 24 * HOUR),
        "60s",
        "Longest wait for room.",
    ),
    key(
        "dispatch_ahead",
        Kind::Time(0, HOUR),
        "50ms",
        "A request leaves for a worker that is predicted to start it within this after the step that runs, or within one more step if that is longer.",
    ),
    key(
        "dispatch_tries",
        Kind::Number(1, 4_096),
        "32",
        "Waiting requests of a model that are tried in one go, most urgent first: a bound on what a load report costs.",
    ),
    key(
        "dispatch_interval",
        Kind::Time(0, 1_000),
        "5ms",
        "Pause between two looks at what waits for the sake of workers that none of it means to go to.",
    ),
    key(
        "answer_timeout",
        Kind::Time(100, HOUR),
        "10s",
        "A worker has to answer a placement within this.",
    ),
    key(
        "orphan_ttl",
        Kind::Time(100, HOUR),
        "10s",
        "Decode has to bring a token within this after prefill's session broke.",
    ),
    key(
        "reattach_grace",
        Kind::Time(0, 60_000),
        "250ms",
        "A worker whose session broke has so long to come back before its streams go on elsewhere.",
    ),
    key(
        "quarantine_time",
        Kind::Time(0, 24 * HOUR),
        "5m",
        "A request of which workers died, also where nothing ran beside it, is not run again for so long.",
    ),
    key(
        "worker_keep_alive",
        Kind::Time(1_000, HOUR),
        "10s",
        "Workers' connections are pinged this often.",
    ),
    key(
        "decisions_kept",
        Kind::Number(0, 1_000_000),
        "4096",
        "Generations whose decisions are kept for `explain`.",
    ),
    key(
        "plans_kept",
        Kind::Number(0, 1_000),
        "8",
        "Plans kept of each decision, the best first. 0: none.",
    ),
    key(
        "policy",
        Kind::OneOf(&POLICIES),
        "cost",
        "How workers are chosen. cost: the least added delay, summed over everyone.",
    ),
    key(
        "stretch_weight",
        Kind::Real(0.0, 100.0),
        "0.05",
        "Policy cost: a millisecond of stretched streaming, in milliseconds of waiting for a first token.",
    ),
    key(
        "beyond_target_weight",
        Kind::Real(1.0, 1_000.0),
        "4",
        "Policy cost: how many times more it counts beyond the target between tokens.",
    ),
    key(
        "best_of_side",
        Kind::Number(1, 10_000),
        "8",
        "Policy cost: prefill and decode workers that are paired with each other.",
    ),
    key(
        "pull_from_tokens",
        Kind::Number(1, 1 << 32),
        "32",
        "Policy cost: fewest tokens for which a prefix is pulled from another worker.",
    ),
    key(
        "local_prefill",
        Kind::OneOf(&["by-cost", "without-prefill-workers"]),
        "by-cost",
        "Policy cost: when decode workers compute prompts.",
    ),
    key(
        "overlap_weight",
        Kind::Real(0.0, 1e6),
        "1",
        "Policy overlap-load: weight of a block to compute against a block that a stream holds.",
    ),
    key(
        "overlap_temperature",
        Kind::Real(0.0, 1e6),
        "0",
        "Policy overlap-load: 0 takes the least cost, more draws.",
    ),
    key(
        "expected_output_tokens",
        Kind::Number(1, 1 << 32),
        "256",
        "Length of an output where none was seen yet.",
    ),
    key(
        "index_bytes",
        Kind::Bytes(1 << 20, 1 << 40),
        "1GiB",
        "Memory of what the prefix index holds; above it the blocks longest not asked for go. The process may take more (docs/kv-index.md, Bounds).",
    ),
    key(
        "index_workers",
        Kind::Number(1, 1 << 20),
        "4096",
        "Most workers. One above it gets no requests, and a warning says so.",
    ),
    key(
        "approximate_ttl",
        Kind::Time(1_000, 24 * HOUR),
        "2m",
        "How long a prompt counts as cached where it was sent, for engines without cache events.",
    ),
    key(
        "fair_quantum",
        Kind::Time(1, HOUR),
        "100ms",
        "Predicted work that a tenant may add to its account in a turn; tenants of a class take turns.",
    ),
    key(
        "batch_strict",
        Kind::Flag,
        "false",
        "Batch requests leave the queue only where no others wait.",
    ),
    key(
        "drain_delay",
        Kind::Time(0, HOUR),
        "500ms",
        "Time between NOT_SERVING and the end of new connections at shutdown.",
    ),
    key(
        "grace",
        Kind::Time(0, 24 * HOUR),
        "30s",
        "Time that running generations have to end at shutdown.",
    ),
    key(
        "log_format",
        Kind::OneOf(&["text", "json"]),
        "text",
        "Form of log lines.",
    ),
    key(
        "log_level",
        Kind::Text,
        "info",
        "Level of log lines: error, warn, info, debug, or directives such as kvmesh=debug.",
    ),
    key(
        "otlp_endpoint",
        Kind::Text,
        "",
        "Collector that takes OTLP over gRPC, host:port, without TLS: requests are told to it as spans of OpenTelemetry. Empty: to nobody.",
    ),
    key(
        "otlp_share",
        Kind::Real(0.0, 1.0),
        "1",
        "Share of requests whose spans are exported, by their trace id. Those whose traceparent says sampled always are.",
    ),
];

/// A key by name; `-` and `_` are the same.
pub(crate) fn find(name: &str) -> Option<&'static Key> {
    let name = name.replace('-', "_");
    KEYS.iter().find(|key| key.name == name)
}

impl Key {
    /// The flag, without its dashes.
    #[must_use]
    pub fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// The environment variable.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("KVMESH_{}", self.name.to_ascii_uppercase())
    }

    /// What is allowed, in words.
    #[must_use]
    pub fn allowed(&self) -> String {
        match self.kind {
            Kind::Text => "a text".to_owned(),
            Kind::OneOf(all) => all.join(" | "),
            Kind::Address => "an IP address and a port, such as 127.0.0.1:7440".to_owned(),
            Kind::List => "a list of texts, or one text with commas".to_owned(),
            Kind::Flag => "true | false".to_owned(),
            Kind::Number(least, most) => format!("a whole number, {least} to {most}"),
            Kind::Real(least, most) => format!("a number, {least} to {most}"),
            Kind::Bytes(least, most) => {
                format!("bytes, {least} to {most}, or with a unit, such as 16MiB")
            }
            Kind::Time(least, most) => {
                format!("a time with its unit (ms, s, m, h), {least}ms to {most}ms; bare: seconds")
            }
        }
    }

    /// The default in its checked form.
    pub(crate) fn default_value(&self) -> Value {
        self.check(&Value::String(self.default.to_owned()))
            .unwrap_or(Value::Null)
    }

    /// The value in one form (numbers: bytes or milliseconds), or what is
    /// allowed.
    pub(crate) fn check(&self, value: &Value) -> Result<Value, String> {
        let allowed = || self.allowed();
        let text = || value.as_str().map(str::trim);
        match self.kind {
            Kind::Text => text().map(|text| json!(text)).ok_or_else(allowed),
            Kind::OneOf(all) => text()
                .filter(|text| all.contains(text))
                .map(|t| json!(t))
                .ok_or_else(allowed),
            Kind::Address => text()
                .filter(|text| text.parse::<std::net::SocketAddr>().is_ok())
                .map(|text| json!(text))
                .ok_or_else(allowed),
            Kind::List => match value {
                Value::Array(items) if items.iter().all(Value::is_string) => Ok(value.clone()),
                Value::String(text) => {
                    let items = text
                        .split(',')
                        .map(str::trim)
                        .filter(|item| !item.is_empty());
                    Ok(Value::Array(items.map(|item| json!(item)).collect()))
                }
                _ => Err(allowed()),
            },
            Kind::Flag => match (value, text()) {
                (Value::Bool(flag), _) => Ok(json!(flag)),
                (_, Some("true" | "1")) => Ok(json!(true)),
                (_, Some("false" | "0")) => Ok(json!(false)),
                _ => Err(allowed()),
            },
            Kind::Number(least, most) => {
                let number = value.as_u64().or_else(|| text()?.parse().ok());
                number
                    .filter(|n| (least..=most).contains(n))
                    .map(|n| json!(n))
                    .ok_or_else(allowed)
            }
            Kind::Real(least, most) => {
                let number = value.as_f64().or_else(|| text()?.parse().ok());
                number
                    .filter(|n| (least..=most).contains(n))
                    .map(|n| json!(n))
                    .ok_or_else(allowed)
            }
            Kind::Bytes(least, most) => {
                let number = value.as_u64().or_else(|| bytes(text()?));
                number
                    .filter(|n| (least..=most).contains(n))
                    .map(|n| json!(n))
                    .ok_or_else(allowed)
            }
            Kind::Time(least, most) => {
                let seconds = value.as_f64().map(|seconds| seconds * 1e3);
                let number = seconds.or_else(|| milliseconds(text()?)).and_then(whole);
                number
                    .filter(|n| (least..=most).contains(n))
                    .map(|n| json!(n))
                    .ok_or_else(allowed)
            }
        }
    }
}

fn split(text: &str) -> (&str, &str) {
    let unit = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    (text[..unit].trim(), &text[unit..])
}

fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = split(text);
    let factor: u64 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

fn milliseconds(text: &str) -> Option<f64> {
    let (number, unit) = split(text);
    let factor = match unit {
        "ms" => 1.0,
        "" | "s" => 1e3,
        "m" => 60e3,
        "h" => 3_600e3,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

/// A number of milliseconds as a whole one.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn whole(number: f64) -> Option<u64> {
    (number.is_finite() && (0.0..1e15).contains(&number)).then(|| number.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_allowed() {
        for key in KEYS {
            let checked = key.check(&Value::String(key.default.to_owned()));
            assert!(checked.is_ok(), "{}: {:?}", key.name, checked);
        }
    }

    #[test]
    fn times_and_bytes_are_read_with_their_units() {
        let time = key("t", Kind::Time(0, HOUR), "0s", "");
        assert_eq!(time.check(&json!("250ms")), Ok(json!(250)));
        assert_eq!(time.check(&json!("1.5s")), Ok(json!(1500)));
        assert_eq!(time.check(&json!(2)), Ok(json!(2000)));
        assert!(time.check(&json!("2 weeks")).is_err());
        assert!(time.check(&json!("-1s")).is_err());
        assert!(time.check(&json!("NaN")).is_err());
        let real = key("r", Kind::Real(0.0, 2.0), "1", "");
        assert_eq!(real.check(&json!("0.5")), Ok(json!(0.5)));
        assert!(real.check(&json!(2.5)).is_err() && real.check(&json!("NaN")).is_err());
        let size = key("b", Kind::Bytes(1, GIB), "1", "");
        assert_eq!(size.check(&json!("16MiB")), Ok(json!(16 << 20)));
        assert!(size.check(&json!("16MB")).is_err());
    }
}
