//! What sessions tell of their workers, for the choice among them.

use std::sync::Arc;

use kvmesh_kv_index::CacheChange;
use kvmesh_session::parse::{Hello, LoadReport};
use kvmesh_wire::v1;

use super::super::{Core, placer::Standing, table::WorkerEntry, views::apply_cache};

impl Core {
    /// A worker said who it is.
    pub(in crate::mesh) fn worker_greeted(
        self: &Arc<Self>,
        worker: &Arc<WorkerEntry>,
        hello: &Hello,
    ) {
        let record = &hello.record;
        let (Some(model), Some(capabilities)) = (&record.model, &record.capabilities) else {
            return;
        };
        let others = self.table.all();
        let alone = !others
            .iter()
            .any(|other| other.index != worker.index && other.live());
        let told = self.models.tell(model, capabilities, alone);
        let step_model = hello.step_model.or(record.step_model);
        let left = self.dispatcher.left(&model.name);
        let mut placer = self.dispatcher.placer();
        placer.greeted(worker.index, record, step_model, left, told.is_some());
        drop(placer);
        match told {
            None => worker.set_mismatch(format!(
                "its digests of model {} are not those of the other workers",
                model.name
            )),
            Some(true) => self.fetch_tokenizer(worker, model.tokenizer_digest.clone()),
            Some(false) => {}
        }
    }

    /// A worker's load came.
    pub(in crate::mesh) fn worker_loaded(
        self: &Arc<Self>,
        worker: &Arc<WorkerEntry>,
        report: &LoadReport,
    ) {
        let now_ms = self.dispatcher.waits.now_ms();
        let mut placer = self.dispatcher.placer();
        let reported = placer.loaded(worker.index, report, now_ms);
        drop(placer);
        if let Some(reported) = reported {
            self.look(&reported);
        }
    }

    /// A worker has computed prompts of ours: who waits for it need not wait for its
    /// next report, which may be late.
    pub(in crate::mesh) fn prompts_computed(self: &Arc<Self>, worker: &WorkerEntry) {
        if self.dispatcher.waits.len() == 0 {
            return;
        }
        let mut placer = self.dispatcher.placer();
        let computed = placer.reported(worker.index);
        drop(placer);
        if let Some(computed) = computed {
            self.look(&computed);
        }
    }

    /// Whether a worker can be placed on has changed.
    pub(in crate::mesh) fn worker_state(&self, worker: &WorkerEntry, standing: Standing) {
        self.dispatcher.placer().stands(worker.index, standing);
    }

    /// A worker is off the table.
    pub(in crate::mesh) fn worker_gone(&self, worker: &Arc<WorkerEntry>) {
        self.dispatcher.placer().remove(worker.index);
    }

    /// A step's service time came.
    pub(in crate::mesh) fn step_sample(&self, worker: &WorkerEntry, sample: &v1::StepSample) {
        self.dispatcher.placer().stepped(worker.index, sample);
    }

    /// Cache events came; gives the number of the last one that is applied.
    pub(in crate::mesh) fn cache_events(
        &self,
        worker: &WorkerEntry,
        events: &v1::CacheEvents,
    ) -> Option<u64> {
        let slot = self.dispatcher.placer().slot(worker.index)?;
        let fed = apply_cache(&self.dispatcher.index, slot, events);
        if fed.dropped > 0 {
            self.counters.cache_events_dropped.add(fed.dropped);
        }
        fed.last
    }

    /// What is known of a worker's cache is void.
    pub(in crate::mesh) fn forget_cache(&self, worker: &WorkerEntry) {
        if let Some(slot) = self.dispatcher.placer().slot(worker.index) {
            // The slot was just read: it is there.
            let _ = self.dispatcher.index.apply(slot, &[CacheChange::Cleared]);
        }
    }
}
