//! Workers and models as administrators and clients see them.

use kvmesh_scheduler::TransferRate;
use kvmesh_session::WorkerIndex;
use kvmesh_wire::v1;

use super::super::{Core, models::ServedModel, table::WorkerEntry};

impl Core {
    /// The row of a worker.
    pub(in crate::mesh) fn status(&self, worker: &WorkerEntry) -> v1::WorkerStatus {
        let (step_model, slot, paths) = {
            let placer = self.dispatcher.placer();
            let (index, slot) = (worker.index, placer.slot(worker.index));
            (placer.step_model(index), slot, placer.paths_to(index))
        };
        let path = |(source, rate): (WorkerIndex, TransferRate)| {
            Some(v1::PathRate {
                source: self.table.get(source)?.name(),
                fixed_ms: rate.fixed_ms,
                bytes_per_ms: rate.bytes_per_ms,
            })
        };
        let status = worker.status();
        v1::WorkerStatus {
            step_model: step_model.or(status.step_model),
            paths_to: paths.into_iter().filter_map(path).collect(),
            indexed_blocks: slot.map_or(0, |slot| self.dispatcher.index.held(slot)),
            ..status
        }
    }

    /// A model as clients see it.
    pub(in crate::mesh) fn describe(&self, model: &ServedModel) -> v1::Model {
        let record = &model.record;
        v1::Model {
            name: record.name.clone(),
            context_length: record.context_length,
            vocabulary_size: record.vocabulary_size,
            adapters: {
                let mut names: Vec<_> = record.adapters.keys().cloned().collect();
                names.sort();
                names
            },
            reproducible: model.capabilities.reproducible,
            chat: model.text.has_chat_template(),
            digest: record.digest.clone(),
            ready: self.dispatcher.placer().ready(&record.name),
        }
    }
}
