//! The workers of a cluster as etcd has them.

use std::{collections::BTreeMap, sync::Arc};

use kvmesh_wire::v1::WorkerRecord;

use crate::record::worker_from_json;

/// A worker that is registered.
#[derive(Debug, Clone, PartialEq)]
pub struct RegisteredWorker {
    /// Who it is. Its id is that of the key, its addresses have the form
    /// "host:port", its incarnation is not zero.
    pub record: Arc<WorkerRecord>,
    /// Store revision of its last change.
    pub revision: i64,
}

/// The workers of a cluster at one revision of etcd.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WorkerTable {
    /// Store revision that the table shows; 0 before the first list.
    pub revision: i64,
    /// Workers by id.
    pub workers: BTreeMap<String, RegisteredWorker>,
    /// Keys whose record cannot be used, with the reason. Kept apart so that a
    /// broken record hides no worker but its own.
    pub unusable: BTreeMap<String, String>,
}

impl WorkerTable {
    /// Whether a list was ever made.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        self.revision > 0
    }

    pub(crate) fn put(&mut self, id: &str, value: &[u8], revision: i64) {
        match worker_from_json(id, value) {
            Ok(record) => {
                self.unusable.remove(id);
                let record = match self.workers.get(id) {
                    Some(held) if *held.record == record => held.record.clone(),
                    _ => Arc::new(record),
                };
                let worker = RegisteredWorker { record, revision };
                self.workers.insert(id.to_owned(), worker);
            }
            Err(error) => {
                tracing::warn!(worker = id, %error, "worker record is not usable");
                self.workers.remove(id);
                self.unusable.insert(id.to_owned(), error.to_string());
            }
        }
    }

    pub(crate) fn delete(&mut self, id: &str) {
        self.workers.remove(id);
        self.unusable.remove(id);
    }
}
