//! Holding a key under a lease.
//!
//! ```text
//!                 written                     lease or key gone
//!  registering ───────────▶ registered ─────────────────────────▶ registering
//!    │   ▲  ▲                   │
//!    │   │  └─ pause ── away ◀──┘ no answer for a whole TTL
//!    │   └──── TTL ──── refused   (another live holder)
//!    ▼
//!  closed (from any: the lease is revoked)
//! ```

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    again,
    backoff::{Backoff, jittered},
    client::Client,
    error::RegistryError,
    etcd::{
        etcdserverpb::{
            Compare, PutRequest, RequestOp, TxnRequest,
            compare::{CompareResult, CompareTarget, TargetUnion},
            request_op::Request,
        },
        mvccpb::KeyValue,
    },
    probe::Probe,
    record::{RecordError, RouterRecord, worker_from_json, worker_to_json},
};
use kvmesh_wire::v1::WorkerRecord;

/// Where a registration stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistrationState {
    /// Not written yet, or lost; being written.
    Registering,
    /// The key is there, under a live lease.
    Registered,
    /// Another live holder has the id; tried again every TTL. The text names
    /// it.
    Refused(String),
    /// etcd cannot be reached, or says no; tried again with growing pauses.
    /// The text says why.
    Away(String),
    /// Closed: the lease is revoked, or left to end where etcd was away.
    Closed,
}

impl RegistrationState {
    /// One word, for people and metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Registering => "registering",
            Self::Registered => "registered",
            Self::Refused(_) => "refused",
            Self::Away(_) => "away",
            Self::Closed => "closed",
        }
    }
}

/// A key that is held until this is closed or dropped.
///
/// [`close`](Self::close) revokes the lease and waits for that. A drop starts
/// the same and does not wait.
#[derive(Debug)]
pub struct Registration {
    state: watch::Receiver<RegistrationState>,
    value: watch::Sender<Vec<u8>>,
    id: String,
    incarnation: u64,
    stop: CancellationToken,
    /// Taken by the first close. Locked over its await, hence tokio's.
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Registration {
    pub(crate) fn start(client: Arc<Client>, entry: Entry) -> Self {
        let (state_sender, state) = watch::channel(RegistrationState::Registering);
        let (value, value_receiver) = watch::channel(entry.value.clone());
        let stop = CancellationToken::new();
        let (id, incarnation) = (entry.id.clone(), entry.incarnation);
        let holder = Holder {
            client,
            entry,
            value: value_receiver,
            state: state_sender,
            lease: 0,
        };
        let task = tokio::spawn(holder.run(stop.clone()));
        Self {
            state,
            value,
            id,
            incarnation,
            stop,
            task: Mutex::new(Some(task)),
        }
    }

    /// Where it stands now.
    #[must_use]
    pub fn state(&self) -> RegistrationState {
        self.state.borrow().clone()
    }

    /// Every change of where it stands.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<RegistrationState> {
        self.state.clone()
    }

    /// Waits for the first outcome: anything but `Registering`.
    pub async fn settled(&self) -> RegistrationState {
        self.wait_for(|state| *state != RegistrationState::Registering)
            .await
    }

    /// Waits until it stands as wanted, or is closed.
    pub async fn wait_for(&self, wanted: impl Fn(&RegistrationState) -> bool) -> RegistrationState {
        let mut state = self.state.clone();
        let waited = state
            .wait_for(|state| wanted(state) || *state == RegistrationState::Closed)
            .await;
        waited.map_or(RegistrationState::Closed, |state| state.clone())
    }

    /// Writes another record of the same worker and incarnation, under the same
    /// lease; at once, or as soon as etcd can be reached.
    pub fn update_worker(&self, record: &WorkerRecord) -> Result<(), RegistryError> {
        self.same_id(&record.worker_id)?;
        if record.incarnation != self.incarnation {
            return Err(RecordError::Field {
                id: self.id.clone(),
                field: "incarnation",
                value: record.incarnation.to_string(),
                allowed: "the one that was registered",
            }
            .into());
        }
        let value = worker_to_json(record)?;
        self.value.send_replace(value);
        Ok(())
    }

    /// Writes another address of the same router, as `update_worker`.
    pub fn update_router(&self, record: &RouterRecord) -> Result<(), RegistryError> {
        self.same_id(&record.router_id)?;
        let value = record.to_json()?;
        self.value.send_replace(value);
        Ok(())
    }

    fn same_id(&self, given: &str) -> Result<(), RecordError> {
        if given == self.id {
            return Ok(());
        }
        Err(RecordError::Field {
            id: self.id.clone(),
            field: "id",
            value: given.to_owned(),
            allowed: "the one that was registered",
        })
    }

    /// Revokes the lease and waits for it. Idempotent; takes at most a call's
    /// deadline for each endpoint.
    pub async fn close(&self) {
        self.stop.cancel();
        let mut task = self.task.lock().await;
        if let Some(running) = task.as_mut()
            && let Err(error) = running.await
        {
            tracing::error!(%error, "the registration's task failed");
        }
        *task = None;
    }
}

/// What is registered.
pub(crate) struct Entry {
    id: String,
    /// 0: a router, which has none.
    incarnation: u64,
    key: String,
    value: Vec<u8>,
    /// None: whatever is there is replaced.
    probe: Option<Arc<dyn Probe>>,
}

impl Entry {
    pub(crate) fn worker(
        id: String,
        incarnation: u64,
        key: String,
        value: Vec<u8>,
        probe: Arc<dyn Probe>,
    ) -> Self {
        Self {
            id,
            incarnation,
            key,
            value,
            probe: Some(probe),
        }
    }

    pub(crate) fn router(id: String, key: String, value: Vec<u8>) -> Self {
        Self {
            id,
            incarnation: 0,
            key,
            value,
            probe: None,
        }
    }

    /// Whether a record of another may be replaced.
    async fn may_replace(&self, found: &KeyValue) -> Result<(), RegistryError> {
        let Some(probe) = &self.probe else {
            return Ok(());
        };
        // A record that cannot be read keeps nobody out.
        let Ok(record) = worker_from_json(&self.id, &found.value) else {
            return Ok(());
        };
        if record.incarnation == self.incarnation || !probe.is_alive(&record).await {
            return Ok(());
        }
        Err(RegistryError::Taken {
            id: self.id.clone(),
            holder: record.address,
        })
    }
}

/// The task behind a registration.
struct Holder {
    client: Arc<Client>,
    entry: Entry,
    value: watch::Receiver<Vec<u8>>,
    state: watch::Sender<RegistrationState>,
    /// The lease that the key hangs on; 0: none.
    lease: i64,
}

impl Holder {
    async fn run(mut self, stop: CancellationToken) {
        let pause = self.client.settings.backoff.0;
        let held = async {
            loop {
                again::turn("registration", pause, self.hold()).await;
            }
        };
        let never: Option<std::convert::Infallible> = stop.run_until_cancelled(held).await;
        debug_assert!(never.is_none());
        if self.lease != 0
            && let Err(error) = self.client.revoke(self.lease).await
        {
            tracing::warn!(id = self.entry.id, %error, "lease not revoked; it ends by itself");
        }
        self.state.send_replace(RegistrationState::Closed);
    }

    async fn hold(&mut self) {
        let mut backoff = Backoff::new(self.client.settings.backoff);
        loop {
            let error = match self.write().await {
                Ok(()) => {
                    backoff.reset();
                    self.enter(RegistrationState::Registered);
                    let error = self.keep().await;
                    self.enter(RegistrationState::Registering);
                    tracing::warn!(id = self.entry.id, %error, "registering again");
                    // Many leases end together when etcd was away: not all
                    // holders are to ask for new ones at once.
                    tokio::time::sleep(jittered(self.client.settings.backoff.0 * 2)).await;
                    continue;
                }
                Err(error) => error,
            };
            let pause = match error {
                RegistryError::Taken { .. } => {
                    self.enter(RegistrationState::Refused(error.to_string()));
                    jittered(self.client.settings.ttl)
                }
                // The lease is not good for this key any more.
                RegistryError::LeaseLost => backoff.next(),
                _ => {
                    self.enter(RegistrationState::Away(error.to_string()));
                    backoff.next()
                }
            };
            tracing::warn!(id = self.entry.id, %error, ?pause, "not registered");
            tokio::time::sleep(pause).await;
        }
    }

    fn enter(&self, state: RegistrationState) {
        if *self.state.borrow() != state {
            tracing::info!(id = self.entry.id, state = state.name(), "registration");
        }
        self.state.send_if_modified(|held| {
            let changed = *held != state;
            *held = state;
            changed
        });
    }

    /// Writes the key: where it is not there, or may be replaced.
    async fn write(&mut self) -> Result<(), RegistryError> {
        let found = self.client.get(&self.entry.key).await?;
        if let Some(found) = &found {
            self.entry.may_replace(found).await?;
        }
        if self.lease == 0 || !self.client.keep_alive(self.lease).await? {
            self.lease = 0;
            self.lease = self.client.grant(self.client.settings.ttl).await?;
        }
        // 0 is what etcd compares for a key that is not there.
        let seen = found.map_or(0, |kv| kv.mod_revision);
        self.put_if(CompareTarget::Mod, TargetUnion::ModRevision(seen))
            .await
    }

    /// Writes the newest value under our lease, if the condition holds.
    async fn put_if(
        &mut self,
        target: CompareTarget,
        value: TargetUnion,
    ) -> Result<(), RegistryError> {
        let condition = Compare {
            result: CompareResult::Equal.into(),
            target: target.into(),
            key: self.entry.key.as_bytes().to_vec(),
            target_union: Some(value),
            ..Compare::default()
        };
        let put = PutRequest {
            key: self.entry.key.as_bytes().to_vec(),
            value: self.value.borrow_and_update().clone(),
            lease: self.lease,
        };
        let request = TxnRequest {
            compare: vec![condition],
            success: vec![RequestOp {
                request: Some(Request::RequestPut(put)),
            }],
            failure: Vec::new(),
        };
        match self.client.transact(request).await {
            Ok(answer) if answer.succeeded => Ok(()),
            // Somebody was quicker: look again.
            Ok(_) => Err(RegistryError::LeaseLost),
            // NOT_FOUND: the lease ended between its renewal and the write.
            Err(RegistryError::Rejected { .. }) => {
                self.lease = 0;
                Err(RegistryError::LeaseLost)
            }
            Err(error) => Err(error),
        }
    }

    /// Keeps the lease alive until key or lease are gone, or etcd was away for
    /// a whole TTL; says which.
    async fn keep(&mut self) -> RegistryError {
        let ttl = self.client.settings.ttl;
        let mut renewed = Instant::now();
        loop {
            let changed = tokio::select! {
                () = tokio::time::sleep(jittered(ttl / 3)) => false,
                changed = self.value.changed() => changed.is_ok(),
            };
            let asked = Instant::now();
            match self.renew(changed).await {
                Ok(()) => {
                    renewed = asked;
                    self.enter(RegistrationState::Registered);
                }
                Err(error @ RegistryError::Unreachable { .. }) => {
                    if renewed.elapsed() >= ttl {
                        return error;
                    }
                    if changed {
                        // The new value is still owed.
                        self.value.mark_changed();
                    }
                    tokio::time::sleep(pause_before_retry(ttl)).await;
                }
                Err(error) => return error,
            }
        }
    }

    /// One renewal. Also sees that the key is still ours: it may have been
    /// deleted by hand, or etcd may have been brought back from a backup.
    async fn renew(&mut self, changed: bool) -> Result<(), RegistryError> {
        if !self.client.keep_alive(self.lease).await? {
            self.lease = 0;
            return Err(RegistryError::LeaseLost);
        }
        if changed {
            let lease = TargetUnion::Lease(self.lease);
            return self.put_if(CompareTarget::Lease, lease).await;
        }
        match self.client.get(&self.entry.key).await? {
            Some(kv) if kv.lease == self.lease => Ok(()),
            _ => Err(RegistryError::LeaseLost),
        }
    }
}

fn pause_before_retry(ttl: Duration) -> Duration {
    jittered((ttl / 10).min(Duration::from_millis(500)))
}
