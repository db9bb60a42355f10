//! The registry: what the rest of the mesh calls.

use std::sync::Arc;

use kvmesh_wire::v1::WorkerRecord;
use tokio::sync::watch::Receiver;

use crate::{
    changes::Changes,
    client::Client,
    error::{RegistryError, SettingsError},
    keys::Keys,
    probe::Probe,
    record::{RouterRecord, worker_to_json},
    registration::{Entry, Registration},
    settings::Settings,
    status::Status,
    table::WorkerTable,
    watch::{WorkerWatch, table_of},
};

/// The registry of one cluster in etcd. Cheap to clone; connects when used,
/// inside a tokio runtime.
#[derive(Debug, Clone)]
pub struct Registry {
    client: Arc<Client>,
    keys: Arc<Keys>,
}

impl Registry {
    /// Checks the settings. Does not connect: etcd may come later. Call it
    /// inside a tokio runtime.
    pub fn new(settings: Settings) -> Result<Self, SettingsError> {
        let keys = Arc::new(Keys::new(&settings.cluster));
        let client = Arc::new(Client::new(settings)?);
        Ok(Self { client, keys })
    }

    /// Registers a worker and keeps it registered until the registration is
    /// closed or dropped. Returns at once; [`Registration::settled`] waits for
    /// the outcome.
    ///
    /// A record under the same id is replaced if it is of the same incarnation
    /// or `probe` finds its worker dead; else the registration is refused and
    /// tried again every TTL. Fails where the record itself is not valid.
    pub fn register_worker(
        &self,
        record: WorkerRecord,
        probe: Arc<dyn Probe>,
    ) -> Result<Registration, RegistryError> {
        let value = worker_to_json(&record)?;
        let key = self.keys.worker(&record.worker_id);
        let entry = Entry::worker(record.worker_id, record.incarnation, key, value, probe);
        Ok(Registration::start(self.client.clone(), entry))
    }

    /// Registers a router for clients that find routers through etcd. A record
    /// that another router left under the same id is replaced.
    pub fn register_router(&self, record: RouterRecord) -> Result<Registration, RegistryError> {
        let value = record.to_json()?;
        let key = self.keys.router(&record.router_id);
        let entry = Entry::router(record.router_id, key, value);
        Ok(Registration::start(self.client.clone(), entry))
    }

    /// Follows the workers of the cluster until the watch is dropped.
    #[must_use]
    pub fn watch_workers(&self) -> WorkerWatch {
        WorkerWatch::start(self.client.clone(), self.keys.workers().to_owned())
    }

    /// The workers as etcd has them now.
    pub async fn list_workers(&self) -> Result<WorkerTable, RegistryError> {
        let prefix = self.keys.workers();
        let list = self.client.list(prefix).await?;
        Ok(table_of(prefix, &list))
    }

    /// The routers as etcd has them now. Records that cannot be read are left
    /// out.
    pub async fn list_routers(&self) -> Result<Vec<RouterRecord>, RegistryError> {
        let prefix = self.keys.routers();
        let list = self.client.list(prefix).await?;
        let routers = list.entries.iter().filter_map(|kv| {
            let id = kv.key.strip_prefix(prefix.as_bytes())?;
            RouterRecord::from_json(std::str::from_utf8(id).ok()?, &kv.value).ok()
        });
        Ok(routers.collect())
    }

    /// Changes of workers that the routers of the cluster are about to ask for.
    #[must_use]
    pub fn changes(&self) -> Changes {
        Changes::new(Arc::clone(&self.client), Arc::clone(&self.keys))
    }

    /// Whether etcd can be reached, and every change of that.
    #[must_use]
    pub fn status(&self) -> Receiver<Status> {
        self.client.status()
    }
}
