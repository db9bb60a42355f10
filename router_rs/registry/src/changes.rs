//! Changes of workers that routers are about to ask for, so that of two at two routers the
//! second counts the first.
//!
//! A worker tells all routers of its role, but each hears of it a moment after it has changed.
//! So a router writes down what it is about to ask for before it asks, under a key that lapses
//! by itself, and only where nobody wrote anything since it looked at what the others had
//! written: a comparison of etcd's over the whole range (Compare.range_end, etcd 3.3).

use std::{sync::Arc, time::Duration};

use kvmesh_wire::v1::Role;
use serde::{Deserialize, Serialize};

use crate::{
    client::{Client, List},
    error::RegistryError,
    etcd::etcdserverpb::{
        Compare, PutRequest, RequestOp, TxnRequest,
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op::Request,
    },
    keys::{Keys, end_of},
    record::unreadable,
};

/// A change counts for so long: its worker's reports show it within a fraction of that, or it
/// was not made.
const COUNTS_FOR: Duration = Duration::from_secs(10);
/// How often it is looked again where others wrote meanwhile.
const TRIES: u32 = 16;

/// A change of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerChange {
    /// Its name.
    pub worker_id: String,
    /// The process: another one in its place was not asked.
    pub incarnation: u64,
    /// Its role afterwards; `None`: it takes nothing more.
    pub becomes: Option<Role>,
}

/// The value under a change's key.
#[derive(Serialize, Deserialize)]
struct Entry {
    incarnation: u64,
    becomes: Option<String>,
}

/// The changes of a cluster.
#[derive(Debug, Clone)]
pub struct Changes {
    client: Arc<Client>,
    keys: Arc<Keys>,
}

/// A change that was written down. Dropped, it counts until it lapses.
#[derive(Debug)]
pub struct Announced {
    client: Arc<Client>,
    lease: i64,
}

impl Announced {
    /// It is not made: it counts no more.
    ///
    /// # Errors
    /// Where etcd does not answer; it then lapses.
    pub async fn withdraw(self) -> Result<(), RegistryError> {
        self.client.revoke(self.lease).await
    }

    /// Nothing was written: the lease is given back, and this is said.
    async fn with<T>(self, said: Result<T, RegistryError>) -> Result<T, RegistryError> {
        // One that cannot be given back lapses.
        let _ = self.withdraw().await;
        said
    }
}

impl Changes {
    pub(crate) fn new(client: Arc<Client>, keys: Arc<Keys>) -> Self {
        Self { client, keys }
    }

    /// Writes a change down, if `agrees` says so of those of other workers. It may be asked
    /// several times: whoever writes first is seen by all others.
    ///
    /// # Errors
    /// Where etcd does not answer or refuses, or others write all the time. The inner error is
    /// what `agrees` said.
    pub async fn announce<E>(
        &self,
        change: &WorkerChange,
        mut agrees: impl FnMut(&[WorkerChange]) -> Result<(), E>,
    ) -> Result<Result<Announced, E>, RegistryError> {
        let lease = self.client.grant(COUNTS_FOR).await?;
        let announced = Announced {
            client: Arc::clone(&self.client),
            lease,
        };
        for _ in 0..TRIES {
            let list = match self.client.list(self.keys.changes()).await {
                Ok(list) => list,
                Err(error) => return announced.with(Err(error)).await,
            };
            let mut others = self.read(&list);
            others.retain(|other| other.worker_id != change.worker_id);
            if let Err(why) = agrees(&others) {
                return announced.with(Ok(Err(why))).await;
            }
            match self.write(change, lease, list.revision).await {
                Ok(true) => return Ok(Ok(announced)),
                Ok(false) => {}
                Err(error) => return announced.with(Err(error)).await,
            }
        }
        let contended = RegistryError::Contended("a change of a worker");
        announced.with(Err(contended)).await
    }

    /// What is written. What cannot be read is of a version to come, and nobody's now.
    fn read(&self, list: &List) -> Vec<WorkerChange> {
        let change = |kv: &crate::etcd::mvccpb::KeyValue| {
            let id = kv.key.strip_prefix(self.keys.changes().as_bytes())?;
            let entry: Entry = serde_json::from_slice(&kv.value).ok()?;
            let becomes = match entry.becomes {
                Some(name) => Some(Role::from_str_name(&name)?),
                None => None,
            };
            Some(WorkerChange {
                worker_id: std::str::from_utf8(id).ok()?.to_owned(),
                incarnation: entry.incarnation,
                becomes,
            })
        };
        list.entries.iter().filter_map(change).collect()
    }

    /// Whether it was written: nobody wrote since this revision.
    async fn write(
        &self,
        change: &WorkerChange,
        lease: i64,
        revision: i64,
    ) -> Result<bool, RegistryError> {
        let prefix = self.keys.changes();
        let unchanged = Compare {
            result: CompareResult::Less.into(),
            target: CompareTarget::Mod.into(),
            key: prefix.as_bytes().to_vec(),
            range_end: end_of(prefix),
            target_union: Some(TargetUnion::ModRevision(revision + 1)),
        };
        let entry = Entry {
            incarnation: change.incarnation,
            becomes: change.becomes.map(|role| role.as_str_name().to_owned()),
        };
        let value =
            serde_json::to_vec(&entry).map_err(|error| unreadable(&change.worker_id, error))?;
        let put = PutRequest {
            key: self.keys.change(&change.worker_id).into_bytes(),
            value,
            lease,
        };
        let request = TxnRequest {
            compare: vec![unchanged],
            success: vec![RequestOp {
                request: Some(Request::RequestPut(put)),
            }],
            failure: Vec::new(),
        };
        Ok(self.client.transact(request).await?.succeeded)
    }
}
