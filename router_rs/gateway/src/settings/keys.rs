//! Every setting of a router: name, kind, default, bounds, meaning.

mod streams;
mod trust;

use super::key::{GIB, HOUR, Key, Kind, key};
use crate::mesh::POLICIES;
use streams::STREAMS;
use trust::TRUST;

/// All settings of a router.
pub const KEYS: &[Key] =
    &joined::<{ ROUTER.len() + STREAMS.len() + TRUST.len() }>(&[ROUTER, STREAMS, TRUST]);

/// Tables as one.
const fn joined<const N: usize>(tables: &[&[Key]]) -> [Key; N] {
    let mut all = [ROUTER[0]; N];
    let (mut table, mut filled) = (0, 0);
    while table < tables.len() {
        let mut at = 0;
        while at < tables[table].len() {
            all[filled] = tables[table][at];
            (at, filled) = (at + 1, filled + 1);
        }
        table += 1;
    }
    assert!(filled == N, "a table is left out");
    all
}

/// A key by name; `-` and `_` are the same.
pub(crate) fn find(name: &str) -> Option<&'static Key> {
    let name = name.replace('-', "_");
    KEYS.iter().find(|key| key.name == name)
}

/// What a router is, and what it is held to.
const ROUTER: &[Key] = &[
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
        "etcd",
        Kind::List,
        "",
        "Members of etcd, host:port each. Empty: only the workers named here.",
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
        "Bytes of all messages between their length prefix and admission, and what their JSON takes as a tree.",
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
        "TLS and the first bytes of a connection have to be there within this, over HTTP/1.1 all headers of its first call.",
    ),
    key(
        "http1_idle_timeout",
        Kind::Time(100, 24 * HOUR),
        "2m",
        "A connection of HTTP/1.1 that waits so long for its next call is closed. Let it be longer than clients keep idle ones in their pools.",
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
        "Threads that tokenise long text, render chats and inflate. Texts of 128 KiB or more never have the last of several: short ones wait for short ones only.",
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
        "tool_parser",
        Kind::List,
        "auto",
        "How models write tool calls, for the OpenAI face: auto (as the chat template has it), none, hermes, llama3, mistral, deepseek, qwen3_coder, glm45, pythonic or harmony; MODEL=FORMAT for one model.",
    ),
    key(
        "reasoning_parser",
        Kind::List,
        "auto",
        "How models mark reasoning, for the OpenAI face: auto (as the chat template has it), none, think, mistral or harmony; MODEL=FORMAT for one model.",
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
        "Requests of a model that may wait for room: one is refused where so many wait that are as urgent by class or more.",
    ),
    key(
        "queue_timeout",
        Kind::Time(100, 24 * HOUR),
        "60s",
        "Longest wait for room. Less where the target of a class for first tokens asks for it: for interactive requests always, for others in an overload.",
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
        "explain_traces",
        Kind::Real(0.0, 1.0),
        "0.1",
        "Share of generations whose workers are asked for spans for the sake of `explain`, whoever asked for a trace. What it costs is in docs/isolation.md. 1: all, as it takes to explain any one.",
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
        "queue_order",
        Kind::OneOf(&["deadline", "arrival"]),
        "deadline",
        "What waits is served by its virtual deadline (class, and predicted work), here and in the engines; or by its arrival: first come, first served, for comparison.",
    ),
    key(
        "stretch_weight",
        Kind::Real(0.0, 100.0),
        "0.07",
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
        "Collector that takes OTLP over gRPC, host:port, or https://host:port for one with TLS: requests are told to it as spans of OpenTelemetry. Empty: to nobody.",
    ),
    key(
        "otlp_ca",
        Kind::Text,
        "",
        "PEM file of the authorities that the collector's certificate must come from, such as /etc/ssl/certs/ca-certificates.crt; read again when it changes. Needed for https.",
    ),
    key(
        "otlp_headers",
        Kind::Text,
        "",
        "Headers of each call to the collector, as OTEL_EXPORTER_OTLP_HEADERS has them: NAME=VALUE with commas between, values percent-encoded. Best given by its variable: flags can be read by everyone on the machine.",
    ),
    key(
        "otlp_share",
        Kind::Real(0.0, 1.0),
        "1",
        "Share of requests whose spans are exported, by their trace id. Those whose traceparent says sampled always are.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn every_key_is_there_once() {
        for (n, key) in KEYS.iter().enumerate() {
            assert!(
                KEYS[..n].iter().all(|other| other.name != key.name),
                "{}",
                key.name
            );
        }
    }

    #[test]
    fn every_default_is_allowed() {
        for key in KEYS {
            let checked = key.check(&Value::String(key.default.to_owned()));
            assert!(checked.is_ok(), "{}: {:?}", key.name, checked);
        }
    }
}
