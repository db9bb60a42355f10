//! What `/metrics` shows. Read from the mesh when asked; series of workers
//! exist as long as the worker is in the table, so churn leaves none behind.

mod requests;

use std::{fmt, sync::Arc};

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
    encode::{Labels, Series, by_state, gauge, gauges},
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
