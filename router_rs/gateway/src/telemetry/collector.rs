//! What `/metrics` shows. Read from the mesh when asked; series of workers
//! exist as long as the worker is in the table, so churn leaves none behind.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
};

use kvmesh_registry::Status;
use kvmesh_wire::v1;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text::encode},
    metrics::{MetricType, counter::ConstCounter},
    registry::Registry,
};
use tokio::sync::watch;

use super::{
    Telemetry,
    encode::{Labels, Series, by_state, counter, gauge, gauges, histogram, ratios, seconds},
};
use crate::mesh::{Count, Mesh};

/// The figures of a router in the form that scrapers read.
pub(crate) struct Exposition {
    registry: Registry,
}

impl Exposition {
    pub(crate) fn new(
        mesh: Arc<Mesh>,
        telemetry: Arc<Telemetry>,
        etcd: Option<watch::Receiver<Status>>,
    ) -> Self {
        let mut registry = Registry::with_prefix("kvmesh");
        registry.register(
            "rejected",
            "Requests refused, by the step at the door and the reason",
            telemetry.rejected.clone(),
        );
        registry.register(
            "calls",
            "Calls that ended, by method and outcome",
            telemetry.ended.clone(),
        );
        registry.register(
            "class_requests",
            "Requests that ended, by class and outcome; goodput is the share of good ones",
            telemetry.by_class.clone(),
        );
        registry.register(
            "api_keys_reloads",
            "Changed files of keys, by whether they were taken",
            telemetry.key_reloads.clone(),
        );
        registry.register(
            "tls_reloads",
            "Changed certificates of the router's own ports, by whether they were taken",
            telemetry.tls_reloads.clone(),
        );
        registry.register(
            "jwt_keys_reloads",
            "Changed files of the keys that sign tokens, by whether they were taken",
            telemetry.jwt_key_reloads.clone(),
        );
        registry.register(
            "otlp_spans_exported",
            "Spans that the collector took",
            telemetry.spans_exported.clone(),
        );
        registry.register(
            "otlp_spans_dropped",
            "Spans that were not told: the collector was away, slow, or refused them",
            telemetry.spans_dropped.clone(),
        );
        registry.register_collector(Box::new(Figures {
            mesh,
            telemetry,
            etcd,
        }));
        Self { registry }
    }

    /// All series as OpenMetrics text.
    pub(crate) fn text(&self) -> String {
        let mut text = String::with_capacity(32 << 10);
        if encode(&mut text, &self.registry).is_err() {
            text.clear();
        }
        text
    }
}

struct Figures {
    mesh: Arc<Mesh>,
    telemetry: Arc<Telemetry>,
    etcd: Option<watch::Receiver<Status>>,
}

impl fmt::Debug for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Figures")
    }
}

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.requests(&mut encoder)?;
        self.sessions(&mut encoder)?;
        self.workers(&mut encoder)?;
        self.index(&mut encoder)?;
        self.registry(&mut encoder)
    }
}

impl Figures {
    fn requests(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counts = self.mesh.counters();
        let figures = &self.telemetry;
        let connections = figures.connections.load(Ordering::Relaxed).unsigned_abs();
        gauge(
            encoder,
            "connections",
            "Open client connections",
            connections,
        )?;
        gauge(
            encoder,
            "open_streams",
            "Generations that have not ended",
            counts.open_streams.get(),
        )?;
        gauge(
            encoder,
            "queued_requests",
            "Requests that wait for room",
            self.mesh.queued() as u64,
        )?;
        gauge(
            encoder,
            "bookings",
            "Bookings of work on workers",
            self.mesh.booked() as u64,
        )?;
        gauge(
            encoder,
            "request_bytes_held",
            "Bytes of requests between length prefix and admission",
            figures.held_bytes(),
        )?;
        gauge(
            encoder,
            "undelivered_ids",
            "Token ids kept for clients that have not taken them",
            counts.undelivered_ids.get(),
        )?;
        let mut migrations = encoder.encode_descriptor(
            "migrations",
            "New attempts of streams by cause",
            None,
            MetricType::Counter,
        )?;
        for (cause, value) in counts.migrations.by_cause() {
            let labels = [("cause", cause)];
            ConstCounter::new(value).encode(migrations.encode_family(&Labels(&labels))?)?;
        }
        let mut hand_overs = encoder.encode_descriptor(
            "hand_overs",
            "Running streams handed over with their KV by workers that are left: begun, done, \
             and failed, where the stream went on at its worker",
            None,
            MetricType::Counter,
        )?;
        let of = &counts.hand_overs;
        for (outcome, count) in [
            ("begun", &of.begun),
            ("done", &of.done),
            ("failed", &of.failed),
        ] {
            let labels = [("outcome", outcome)];
            ConstCounter::new(count.get()).encode(hand_overs.encode_family(&Labels(&labels))?)?;
        }
        let mut resumed = encoder.encode_descriptor(
            "resumed",
            "Calls of Resume: answered here, from another router with or without the attempt \
             that runs, unknown",
            None,
            MetricType::Counter,
        )?;
        for (outcome, value) in counts.resumed.by_outcome() {
            let labels = [("outcome", outcome)];
            ConstCounter::new(value).encode(resumed.encode_family(&Labels(&labels))?)?;
        }
        seconds(encoder, counts)?;
        let attempts = self.mesh.attempts();
        gauge(encoder, "open_attempts", "Attempts that run", attempts.open)?;
        let transfers = [
            ("placed", attempts.placed),
            ("reserved", attempts.reserved),
            ("flowing", attempts.flowing),
            ("committed", attempts.committed),
        ];
        gauges(
            encoder,
            "transfers",
            "Mesh hand-offs under way by state",
            &by_state(&transfers),
        )?;
        for (name, help, from) in [
            ("attempts", "Attempts made", &counts.attempts),
            (
                "plans_whole",
                "Plans with prompt and output on one worker",
                &counts.plans_whole,
            ),
            (
                "plans_split",
                "Plans with prompt and output on two workers",
                &counts.plans_split,
            ),
            (
                "placements",
                "Placements sent to workers",
                &counts.placements,
            ),
            (
                "refusals",
                "Placements refused by workers",
                &counts.refusals,
            ),
            (
                "stale_frames",
                "Rows of attempts that were over",
                &counts.stale_frames,
            ),
            (
                "transfers_started",
                "Mesh hand-offs begun",
                &counts.transfers_started,
            ),
            (
                "transfers_failed",
                "Hand-offs that failed",
                &counts.transfers_failed,
            ),
            (
                "hand_offs_dropped",
                "Engines' hand-offs that crossed a cancel and were dropped by decode",
                &counts.hand_offs_dropped,
            ),
            (
                "transferred_bytes",
                "Bytes of KV that workers received",
                &counts.transferred_bytes,
            ),
            ("tokens", "Tokens taken from workers", &counts.tokens),
            (
                "token_messages",
                "Messages with tokens to clients",
                &counts.token_messages,
            ),
            ("finished", "Generations that ended well", &counts.finished),
            (
                "cancelled",
                "Generations that their client left",
                &counts.cancelled,
            ),
            (
                "failed",
                "Generations that ended with an error",
                &counts.failed,
            ),
            (
                "recomputed_tokens",
                "Tokens that later attempts computed",
                &counts.recomputed_tokens,
            ),
            (
                "reattached",
                "Attempts that went on after a broken session",
                &counts.reattached,
            ),
            (
                "moved_gaps",
                "Streams that went on after a failure",
                &counts.moved_gaps,
            ),
            (
                "ejections",
                "Workers left out for a while since their answers failed",
                &counts.ejections,
            ),
            (
                "quarantined",
                "Requests of which workers died",
                &counts.quarantined,
            ),
            (
                "slow_clients",
                "Streams ended since their client read nothing",
                &counts.slow_clients,
            ),
            (
                "violations",
                "Sessions closed for a broken protocol",
                &counts.violations,
            ),
            (
                "session_panics",
                "Sessions that ended in a panic of this router",
                &counts.session_panics,
            ),
            (
                "task_panics",
                "Panics of this router's other tasks, which were started again",
                &counts.task_panics,
            ),
            (
                "cache_events_dropped",
                "Cache events of a kind that this version does not know",
                &counts.cache_events_dropped,
            ),
            (
                "tokenizer_fetches",
                "Tokeniser downloads begun",
                &counts.tokenizer_fetches,
            ),
            (
                "tokenizer_failures",
                "Tokeniser downloads that failed",
                &counts.tokenizer_failures,
            ),
        ] {
            counter(encoder, name, help, from)?;
        }
        for (name, help, from) in [
            (
                "first_token_seconds",
                "Arrival to first token (TTFT)",
                &figures.first_token,
            ),
            (
                "between_tokens_seconds",
                "Between two messages with tokens (ITL)",
                &figures.between_tokens,
            ),
            (
                "tokenize_seconds",
                "Template and tokeniser",
                &figures.tokenize,
            ),
            ("prefill_seconds", "Computing the prompt", &figures.prefill),
            ("queue_seconds", "Arrival to dispatch", &figures.queue),
            (
                "urgent_start_seconds",
                "From a prompt that is more urgent than all others of a worker to its first layer",
                self.mesh.urgent_start(),
            ),
        ] {
            histogram(encoder, name, help, from)?;
        }
        for (name, help, from) in [
            (
                "ttft_prediction_error_ratio",
                "First token as predicted at placement: |predicted / measured - 1|",
                &counts.ttft_errors,
            ),
            (
                "prefill_prediction_error_ratio",
                "Computing of the prompt: |predicted / measured - 1|",
                &counts.prefill_errors,
            ),
        ] {
            ratios(encoder, name, help, from)?;
        }
        Ok(())
    }

    fn sessions(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let now = self.mesh.sessions();
        let states = [
            ("connecting", now.connecting),
            ("live", now.live),
            ("suspect", now.suspect),
            ("lost", now.lost),
            ("half_open", now.half_open),
            ("refused", now.refused),
        ];
        gauges(
            encoder,
            "sessions",
            "Sessions with workers by state",
            &by_state(&states),
        )?;
        let counts = self.mesh.counters();
        let lanes = |of: [&Count; 3]| -> Vec<(&'static str, u64)> {
            ["step", "load", "cache"]
                .into_iter()
                .zip(of.map(Count::get))
                .collect()
        };
        let bytes = lanes([&counts.step_bytes, &counts.load_bytes, &counts.cache_bytes]);
        let frames = lanes([
            &counts.step_frames,
            &counts.load_frames,
            &counts.cache_frames,
        ]);
        for (name, help, values) in [
            ("lane_bytes", "Bytes from workers by lane", bytes),
            ("lane_frames", "Frames from workers by lane", frames),
        ] {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (lane, value) in values {
                let labels = [("lane", lane)];
                ConstCounter::new(value).encode(metric.encode_family(&Labels(&labels))?)?;
            }
        }
        Ok(())
    }

    fn workers(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let workers = self.mesh.workers();
        let mut blocks: Vec<Series<'_>> = Vec::new();
        let mut running: Vec<Series<'_>> = Vec::new();
        let mut queued: Vec<Series<'_>> = Vec::new();
        let mut indexed: Vec<Series<'_>> = Vec::new();
        for worker in &workers {
            let id = worker
                .record
                .as_ref()
                .map_or("", |record| record.worker_id.as_str());
            indexed.push((vec![("worker", id)], worker.indexed_blocks));
            running.push((vec![("worker", id)], u64::from(worker.running)));
            let Some(load) = &worker.load else { continue };
            let share = |share: &Option<v1::LoadShare>| share.as_ref().map_or(0, |s| s.queued);
            let waiting = share(&load.own).saturating_add(share(&load.others));
            queued.push((vec![("worker", id)], u64::from(waiting)));
            let Some(kv) = &load.kv else { continue };
            for (state, value) in [
                ("free", kv.free),
                ("evictable", kv.evictable),
                ("running", kv.running),
                ("pinned", kv.pinned),
                ("reserved", kv.reserved),
            ] {
                blocks.push((vec![("worker", id), ("state", state)], value));
            }
        }
        gauges(
            encoder,
            "kv_blocks",
            "KV blocks of a worker by state",
            &blocks,
        )?;
        gauges(
            encoder,
            "worker_queued",
            "Requests in a worker's queue",
            &queued,
        )?;
        gauges(
            encoder,
            "worker_running",
            "Requests of this router on a worker",
            &running,
        )?;
        gauges(
            encoder,
            "indexed_blocks",
            "Blocks of a worker in the index",
            &indexed,
        )
    }

    fn index(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let index = self.mesh.index();
        let bytes = index.bytes as u64;
        gauge(encoder, "index_bytes", "Memory of the prefix index", bytes)?;
        let blocks = index.blocks as u64;
        gauge(
            encoder,
            "index_blocks",
            "Distinct blocks in the index",
            blocks,
        )?;
        let evicted = ConstCounter::new(index.evicted);
        evicted.encode(encoder.encode_descriptor(
            "index_evicted_blocks",
            "Blocks that the bound of the index took out",
            None,
            MetricType::Counter,
        )?)
    }

    fn registry(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some(status) = &self.etcd else {
            return Ok(());
        };
        let status = *status.borrow();
        gauge(
            encoder,
            "etcd_connected",
            "Whether etcd answers",
            u64::from(status.connected),
        )?;
        gauge(encoder, "etcd_lists", "Lists of workers made", status.lists)?;
        gauge(
            encoder,
            "etcd_watch_breaks",
            "Watches that broke",
            status.watch_breaks,
        )
    }
}
