//! Following the workers of a cluster.
//!
//! ```text
//!            list ok                       watch open
//!  listing ──────────▶ opening ───────────────────────▶ following
//!     ▲  ◀─ pause ─┐      │                                 │ stream ended,
//!     │            │      │ failed                          │ silent, compacted,
//!     └────────────┴──────┴──────── pause ◀─────────────────┘ revision went back
//! ```
//!
//! Every watch starts with a list, and the list is applied as a difference to
//! the table that is there: a worker that is in both never disappears between.

use std::{collections::BTreeSet, sync::Arc};

use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    again,
    backoff::Backoff,
    client::{Client, List, OpenWatch},
    error::{RegistryError, WatchBreak},
    etcd::{
        etcdserverpb::{WatchProgressRequest, WatchRequest, WatchResponse, watch_request},
        mvccpb::event::EventType,
    },
    table::WorkerTable,
};

/// Follows the workers of a cluster until it is dropped.
///
/// The table is exact while etcd can be reached. While it cannot, it shows what
/// was last seen: an unreachable etcd removes nobody.
#[derive(Debug)]
pub struct WorkerWatch {
    table: watch::Receiver<Arc<WorkerTable>>,
    stop: CancellationToken,
    /// Taken by the first close. Locked over its await, hence tokio's.
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for WorkerWatch {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl WorkerWatch {
    pub(crate) fn start(client: Arc<Client>, prefix: String) -> Self {
        let (sender, table) = watch::channel(Arc::new(WorkerTable::default()));
        let stop = CancellationToken::new();
        let follower = Follower {
            client,
            prefix,
            table: sender,
            seen: 0,
        };
        let task = tokio::spawn({
            let stop = stop.clone();
            async move {
                let mut follower = follower;
                let pause = follower.client.settings.backoff.0;
                let followed = async {
                    loop {
                        again::turn("workers", pause, follower.run()).await;
                    }
                };
                let never: Option<std::convert::Infallible> =
                    stop.run_until_cancelled(followed).await;
                debug_assert!(never.is_none());
            }
        });
        Self {
            table,
            stop,
            task: Mutex::new(Some(task)),
        }
    }

    /// The table as it is now. Empty and not listed before the first list.
    #[must_use]
    pub fn table(&self) -> Arc<WorkerTable> {
        self.table.borrow().clone()
    }

    /// Every change of the table; the newest only, for who is slow.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<Arc<WorkerTable>> {
        self.table.clone()
    }

    /// Waits for the first list, then gives the table.
    pub async fn listed(&self) -> Arc<WorkerTable> {
        self.wait_for(WorkerTable::is_listed).await
    }

    /// Waits until the table is as wanted.
    pub async fn wait_for(&self, wanted: impl Fn(&WorkerTable) -> bool) -> Arc<WorkerTable> {
        let mut table = self.table.clone();
        match table.wait_for(|table| wanted(table)).await {
            Ok(table) => table.clone(),
            // The task only ends with this watch.
            Err(_) => std::future::pending().await,
        }
    }

    /// Stops and waits for the end. Idempotent.
    pub async fn close(&self) {
        self.stop.cancel();
        let mut task = self.task.lock().await;
        if let Some(running) = task.as_mut()
            && let Err(error) = running.await
        {
            tracing::error!(%error, "the worker watch failed");
        }
        *task = None;
    }
}

/// The table that a list makes, without a history.
pub(crate) fn table_of(prefix: &str, list: &List) -> WorkerTable {
    let mut table = WorkerTable::default();
    apply_list(&mut table, prefix, list);
    table
}

/// Applies a list as a difference.
fn apply_list(table: &mut WorkerTable, prefix: &str, list: &List) {
    let mut listed = BTreeSet::new();
    for kv in &list.entries {
        if let Some(id) = id_of(prefix, &kv.key) {
            table.put(&id, &kv.value, kv.mod_revision);
            listed.insert(id);
        }
    }
    table.workers.retain(|id, _| listed.contains(id));
    table.unusable.retain(|id, _| listed.contains(id));
    table.revision = list.revision;
}

fn id_of(prefix: &str, key: &[u8]) -> Option<String> {
    let id = key.strip_prefix(prefix.as_bytes())?;
    Some(String::from_utf8_lossy(id).into_owned())
}

pub(crate) struct Follower {
    pub(crate) client: Arc<Client>,
    pub(crate) prefix: String,
    pub(crate) table: watch::Sender<Arc<WorkerTable>>,
    /// Highest revision seen in this life of etcd.
    pub(crate) seen: i64,
}

impl Follower {
    async fn run(&mut self) {
        let mut backoff = Backoff::new(self.client.settings.backoff);
        loop {
            let error = match self.list().await {
                Ok(()) => {
                    backoff.reset();
                    match self.follow(self.seen + 1).await {
                        Ok(never) => match never {},
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            if let RegistryError::WatchBroken(_) = &error {
                self.client.count_watch_break();
            }
            let pause = backoff.next();
            tracing::warn!(%error, ?pause, "worker watch starts anew");
            tokio::time::sleep(pause).await;
        }
    }

    /// Takes the table to what etcd has now.
    pub(crate) async fn list(&mut self) -> Result<(), RegistryError> {
        let list = self.client.list(&self.prefix).await?;
        self.client.count_list();
        if list.revision < self.seen {
            tracing::warn!(
                now = list.revision,
                seen = self.seen,
                "etcd started over with lower revisions"
            );
        }
        self.seen = list.revision;
        self.change(|table| apply_list(table, &self.prefix, &list));
        Ok(())
    }

    /// Follows changes from a revision on, until the watch breaks.
    pub(crate) async fn follow(
        &mut self,
        from: i64,
    ) -> Result<std::convert::Infallible, RegistryError> {
        let mut open = self.client.watch(&self.prefix, from).await?;
        let broken = self.read(&mut open).await;
        // The member may be cut off or frozen: the next try is at another.
        self.client.leave_member();
        if matches!(broken, WatchBreak::Ended(_) | WatchBreak::Silent(_)) {
            self.client.set_connected(false);
        }
        Err(broken.into())
    }

    async fn read(&mut self, open: &mut OpenWatch) -> WatchBreak {
        let interval = self.client.settings.ttl / 2;
        let mut asked = false;
        let mut at = Instant::now() + interval;
        loop {
            let message = tokio::select! {
                message = open.responses.message() => message,
                () = tokio::time::sleep_until(at) => {
                    if asked || open.requests.try_send(progress_request()).is_err() {
                        return WatchBreak::Silent(interval);
                    }
                    asked = true;
                    at = Instant::now() + interval;
                    continue;
                }
            };
            match message {
                Ok(Some(response)) => {
                    asked = false;
                    if let Err(broken) = self.apply(&response) {
                        return broken;
                    }
                }
                Ok(None) => return WatchBreak::Ended("etcd closed it".to_owned()),
                Err(status) => return WatchBreak::Ended(status.message().to_owned()),
            }
        }
    }

    fn apply(&mut self, response: &WatchResponse) -> Result<(), WatchBreak> {
        if response.compact_revision > 0 {
            return Err(WatchBreak::Compacted(response.compact_revision));
        }
        if response.canceled {
            return Err(WatchBreak::Cancelled(response.cancel_reason.clone()));
        }
        let now = response.header.as_ref().map_or(0, |h| h.revision);
        if now < self.seen {
            return Err(WatchBreak::WentBack {
                seen: self.seen,
                now,
            });
        }
        self.seen = now;
        if !response.events.is_empty() {
            self.change(|table| apply_events(table, &self.prefix, response));
        }
        Ok(())
    }

    /// Changes the table; wakes readers only where workers changed.
    fn change(&self, change: impl FnOnce(&mut WorkerTable)) {
        self.table.send_if_modified(|held| {
            let mut table = WorkerTable::clone(held);
            change(&mut table);
            let changed = table != **held;
            *held = Arc::new(table);
            changed
        });
    }
}

fn apply_events(table: &mut WorkerTable, prefix: &str, response: &WatchResponse) {
    for event in &response.events {
        let Some(kv) = &event.kv else { continue };
        let Some(id) = id_of(prefix, &kv.key) else {
            continue;
        };
        match event.r#type() {
            EventType::Put => table.put(&id, &kv.value, kv.mod_revision),
            EventType::Delete => table.delete(&id),
        }
        table.revision = table.revision.max(kv.mod_revision);
    }
}

fn progress_request() -> WatchRequest {
    WatchRequest {
        request_union: Some(watch_request::RequestUnion::ProgressRequest(
            WatchProgressRequest {},
        )),
    }
}
