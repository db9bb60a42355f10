//! What etcd's failures do: to a lease, a watch, a table.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Server;

use super::{CLUSTER, Etcd, Told, hasty, register, registry, settings, worker};
use crate::{
    RegistrationState, Registry, RegistryError, Settings, Status, WatchBreak, WorkerTable,
    client::Client,
    etcd::etcdserverpb::{
        PutRequest, RequestOp, TxnRequest, WatchRequest, WatchResponse,
        request_op::Request,
        watch_request,
        watch_server::{Watch, WatchServer},
    },
    watch::Follower,
};

/// Writes keys in one transaction.
pub(super) async fn put_all(client: &Client, entries: &[(String, String)]) {
    put_with_lease(client, entries, 0).await;
}

async fn put_with_lease(client: &Client, entries: &[(String, String)], lease: i64) {
    let put = |(key, value): &(String, String)| RequestOp {
        request: Some(Request::RequestPut(PutRequest {
            key: key.clone().into_bytes(),
            value: value.clone().into_bytes(),
            lease,
        })),
    };
    let request = TxnRequest {
        success: entries.iter().map(put).collect(),
        ..TxnRequest::default()
    };
    client.transact(request).await.unwrap();
}

fn entry(id: &str, incarnation: u64) -> (String, String) {
    let value = serde_json::to_string(&worker(id, incarnation)).unwrap();
    (format!("kvmesh/v1/{CLUSTER}/workers/{id}"), value)
}

fn has(table: &WorkerTable, id: &str) -> bool {
    table.workers.contains_key(id)
}

async fn until(status: &mut watch::Receiver<Status>, connected: bool) {
    status
        .wait_for(|status| status.connected == connected)
        .await
        .unwrap();
}

/// Collects every id that was ever missing from a table after it was there.
fn losses(
    mut changes: watch::Receiver<Arc<WorkerTable>>,
) -> tokio::task::JoinHandle<BTreeSet<String>> {
    tokio::spawn(async move {
        let (mut seen, mut lost) = (BTreeSet::new(), BTreeSet::new());
        loop {
            let ids: BTreeSet<String> = changes
                .borrow_and_update()
                .workers
                .keys()
                .cloned()
                .collect();
            lost.extend(seen.difference(&ids).cloned());
            seen.extend(ids);
            if changes.changed().await.is_err() {
                return lost;
            }
        }
    })
}

#[tokio::test]
async fn a_worker_that_says_nothing_is_gone_with_its_lease() {
    let etcd = Etcd::start();
    let watch = registry(&etcd).watch_workers();
    watch.listed().await;
    let client = Client::new(hasty(&etcd)).unwrap();
    let lease = client.grant(client.settings.ttl).await.unwrap();
    put_with_lease(&client, &[entry("silent", 1)], lease).await;
    watch.wait_for(|table| has(table, "silent")).await;
    watch.wait_for(|table| !has(table, "silent")).await;
}

#[tokio::test]
async fn a_lost_lease_is_replaced_under_the_same_key() {
    let etcd = Etcd::start();
    let registry = Registry::new(hasty(&etcd)).unwrap();
    let watch = registry.watch_workers();
    let registration = register(&registry, worker("a", 1)).await;
    watch.wait_for(|table| has(table, "a")).await;

    let client = Client::new(settings(&etcd)).unwrap();
    let key = entry("a", 1).0;
    let lease = client.get(&key).await.unwrap().unwrap().lease;
    client.revoke(lease).await.unwrap();
    watch.wait_for(|table| !has(table, "a")).await;
    watch.wait_for(|table| has(table, "a")).await;
    let found = client.get(&key).await.unwrap().unwrap();
    assert_ne!(found.lease, lease);

    // Deleted by hand, under a lease that lives.
    etcd.ctl(&["del", &key]);
    watch.wait_for(|table| !has(table, "a")).await;
    watch.wait_for(|table| has(table, "a")).await;
    assert_ne!(registration.state(), RegistrationState::Closed);
}

#[tokio::test]
async fn etcd_stopped_and_back_with_its_data_takes_nobody_away() {
    let mut etcd = Etcd::start();
    let registry = Registry::new(hasty(&etcd)).unwrap();
    let watch = registry.watch_workers();
    let _a = register(&registry, worker("a", 1)).await;
    // No lease: what a restart alone would take away is not muddled with it.
    let client = Client::new(settings(&etcd)).unwrap();
    put_all(&client, &[entry("b", 2)]).await;
    watch
        .wait_for(|table| has(table, "a") && has(table, "b"))
        .await;
    let lost = losses(watch.changes());

    let mut status = registry.status();
    etcd.kill();
    until(&mut status, false).await;
    assert_eq!(watch.table().workers.len(), 2);

    etcd.start_again();
    until(&mut status, true).await;
    // What changed meanwhile, and after, is seen.
    etcd.ctl(&["put", &entry("c", 3).0, &entry("c", 3).1]);
    watch
        .wait_for(|table| has(table, "c") && has(table, "a"))
        .await;
    watch.close().await;
    let lost = lost.await.unwrap();
    assert!(!lost.contains("b"), "{lost:?}");
}

#[tokio::test]
async fn etcd_back_without_its_data_is_filled_again() {
    let mut etcd = Etcd::start();
    let registry = Registry::new(hasty(&etcd)).unwrap();
    let watch = registry.watch_workers();
    let client = Client::new(settings(&etcd)).unwrap();
    // Revisions well above those that the new life will have.
    for _ in 0..20 {
        put_all(&client, &[entry("gone", 9)]).await;
    }
    let registration = register(&registry, worker("a", 1)).await;
    let before = watch
        .wait_for(|table| has(table, "a") && has(table, "gone"))
        .await;

    etcd.kill();
    etcd.lose_data();
    etcd.start_again();
    // The worker writes itself again, and the watch is on the new life.
    let table = watch
        .wait_for(|table| has(table, "a") && !has(table, "gone"))
        .await;
    assert!(table.revision < before.revision);
    registration
        .wait_for(|state| *state == RegistrationState::Registered)
        .await;
    registration.close().await;
    watch.wait_for(|table| !has(table, "a")).await;
}

#[tokio::test]
async fn a_frozen_etcd_takes_nobody_away_and_is_noticed() {
    let etcd = Etcd::start();
    let registry = Registry::new(Settings {
        call_timeout: Duration::from_millis(500),
        ..hasty(&etcd)
    })
    .unwrap();
    let watch = registry.watch_workers();
    let registration = registry
        .register_worker(worker("a", 1), Told::dead())
        .unwrap();
    registration
        .wait_for(|state| *state == RegistrationState::Registered)
        .await;
    watch.wait_for(|table| has(table, "a")).await;
    let mut status = registry.status();

    etcd.freeze();
    until(&mut status, false).await;
    registration
        .wait_for(|state| matches!(state, RegistrationState::Away(_)))
        .await;
    assert!(has(&watch.table(), "a"));

    etcd.thaw();
    registration
        .wait_for(|state| *state == RegistrationState::Registered)
        .await;
    etcd.ctl(&["put", &entry("b", 2).0, &entry("b", 2).1]);
    watch
        .wait_for(|table| has(table, "a") && has(table, "b"))
        .await;
}

#[tokio::test]
async fn a_silent_watch_breaks_though_its_connection_stands() {
    let member = SilentMember::default();
    let asked = member.0.clone();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut settings = Settings::new([listener.local_addr().unwrap().to_string()], CLUSTER);
    settings.ttl = Duration::from_secs(2);
    let server = tokio::spawn(
        Server::builder()
            .add_service(WatchServer::new(member))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );

    let mut follower = follower(Arc::new(Client::new(settings).unwrap()));
    let silence = WatchBreak::Silent(Duration::from_secs(1));
    // A machine that is too busy for the first answer makes it break before the second
    // question: another watch is opened then.
    for _ in 0..20 {
        asked.store(0, Ordering::SeqCst);
        let broken = follower.follow(1).await.err();
        assert!(
            matches!(&broken, Some(RegistryError::WatchBroken(found)) if *found == silence),
            "{broken:?}"
        );
        if asked.load(Ordering::SeqCst) > 1 {
            break;
        }
    }
    assert_eq!(asked.load(Ordering::SeqCst), 2, "the first was answered");
    server.abort();
}

/// A member whose connection lives, and whose watch goes dumb: it answers the
/// first progress request and no other.
#[derive(Default)]
struct SilentMember(Arc<AtomicU32>);

#[tonic::async_trait]
impl Watch for SilentMember {
    type WatchStream = ReceiverStream<Result<WatchResponse, tonic::Status>>;

    async fn watch(
        &self,
        request: tonic::Request<tonic::Streaming<WatchRequest>>,
    ) -> Result<tonic::Response<Self::WatchStream>, tonic::Status> {
        let (answers, stream) = tokio::sync::mpsc::channel(4);
        let asked = self.0.clone();
        let mut requests = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                let progress = matches!(
                    request.request_union,
                    Some(watch_request::RequestUnion::ProgressRequest(_))
                );
                if !progress || asked.fetch_add(1, Ordering::SeqCst) == 0 {
                    let _ = answers.send(Ok(WatchResponse::default())).await;
                }
            }
        });
        Ok(tonic::Response::new(ReceiverStream::new(stream)))
    }
}

#[tokio::test]
async fn a_watch_behind_a_compaction_breaks_and_a_list_heals_it() {
    let etcd = Etcd::start();
    let client = Arc::new(Client::new(settings(&etcd)).unwrap());
    let mut follower = follower(client.clone());
    follower.list().await.unwrap();
    let behind = follower.seen + 1;
    put_all(&client, &[entry("a", 1)]).await;
    put_all(&client, &[entry("b", 1)]).await;
    let newest = client.list("kvmesh/").await.unwrap().revision;
    etcd.ctl(&["compact", &newest.to_string()]);

    let broken = follower.follow(behind).await.err();
    assert!(
        matches!(broken, Some(RegistryError::WatchBroken(WatchBreak::Compacted(at))) if at == newest),
        "{broken:?}"
    );
    follower.list().await.unwrap();
    assert_eq!(follower.table.borrow().workers.len(), 2);
}

#[tokio::test]
async fn a_revision_that_went_back_breaks_the_watch() {
    let etcd = Etcd::start();
    let client = Arc::new(Client::new(settings(&etcd)).unwrap());
    let mut follower = follower(client.clone());
    follower.list().await.unwrap();
    // As after a life of etcd that was longer than this one.
    let from = follower.seen + 1;
    follower.seen += 1_000;
    let broken = follower.follow(from).await.err();
    assert!(
        matches!(
            broken,
            Some(RegistryError::WatchBroken(WatchBreak::WentBack { .. }))
        ),
        "{broken:?}"
    );
    // The list that follows is believed.
    follower.list().await.unwrap();
    assert_eq!(follower.seen + 1, from);
}

fn follower(client: Arc<Client>) -> Follower {
    Follower {
        client,
        prefix: format!("kvmesh/v1/{CLUSTER}/workers/"),
        table: watch::Sender::new(Arc::default()),
        seen: 0,
    }
}
