//! Who may hold a key, and what stands in it.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use kvmesh_wire::v1::WorkerRecord;

use super::{CLUSTER, Etcd, Told, register, registry, settings, worker};
use crate::{
    Credentials, Probe, RecordError, RegistrationState, Registry, RegistryError, RouterRecord,
    Settings, Tls, client::Client,
};

#[tokio::test]
async fn a_worker_appears_and_is_gone_when_closed() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let watch = registry.watch_workers();
    assert!(watch.listed().await.workers.is_empty());

    let registration = register(&registry, worker("a", 1)).await;
    let table = watch.wait_for(|table| !table.workers.is_empty()).await;
    assert_eq!(*table.workers["a"].record, worker("a", 1));
    assert!(registry.status().borrow().connected);

    registration.close().await;
    registration.close().await;
    assert_eq!(registration.state(), RegistrationState::Closed);
    watch.wait_for(|table| table.workers.is_empty()).await;
    watch.close().await;
}

#[tokio::test]
async fn a_drop_revokes_too() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let watch = registry.watch_workers();
    let registration = register(&registry, worker("a", 1)).await;
    watch.wait_for(|table| table.workers.len() == 1).await;
    drop(registration);
    watch.wait_for(|table| table.workers.is_empty()).await;
}

#[tokio::test]
async fn a_record_can_change_under_the_same_lease() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let watch = registry.watch_workers();
    let registration = register(&registry, worker("a", 1)).await;
    let client = Client::new(settings(&etcd)).unwrap();
    let key = format!("kvmesh/v1/{CLUSTER}/workers/a");
    let lease = client.get(&key).await.unwrap().unwrap().lease;

    let mut changed = worker("a", 1);
    changed.version = "0.2.0".to_owned();
    registration.update_worker(&changed).unwrap();
    watch
        .wait_for(|table| table.workers.get("a").is_some_and(|w| *w.record == changed))
        .await;
    assert_eq!(client.get(&key).await.unwrap().unwrap().lease, lease);

    assert!(matches!(
        registration.update_worker(&worker("a", 2)),
        Err(RegistryError::Record(RecordError::Field {
            field: "incarnation",
            ..
        }))
    ));
    assert!(registration.update_worker(&worker("b", 1)).is_err());
}

#[tokio::test]
async fn a_second_live_worker_is_refused_by_name_until_the_first_is_dead() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let first = register(&registry, worker("a", 1)).await;

    let probe = Told::alive();
    let second = registry
        .register_worker(worker("a", 2), probe.clone())
        .unwrap();
    let RegistrationState::Refused(reason) = second.settled().await else {
        panic!("not refused: {:?}", second.state());
    };
    assert!(reason.contains("a is taken: 127.0.0.1:1001"), "{reason}");
    let table = registry.list_workers().await.unwrap();
    assert_eq!(table.workers["a"].record.incarnation, 1);

    // The first is dead, though its lease lives on: nobody waits for a TTL.
    probe.0.store(false, Ordering::SeqCst);
    second
        .wait_for(|state| *state == RegistrationState::Registered)
        .await;
    let table = registry.list_workers().await.unwrap();
    assert_eq!(table.workers["a"].record.incarnation, 2);
    drop(first);
}

/// A probe with a bug, the first time.
#[derive(Default)]
struct Panics(AtomicBool);

impl Probe for Panics {
    fn is_alive<'a>(
        &'a self,
        _: &'a WorkerRecord,
    ) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>> {
        assert!(self.0.swap(true, Ordering::SeqCst), "a bug");
        Box::pin(std::future::ready(false))
    }
}

#[tokio::test]
async fn a_registration_outlives_a_panic_of_its_task() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let first = register(&registry, worker("a", 1)).await;
    let probe = Arc::new(Panics::default());
    let second = registry
        .register_worker(worker("a", 2), probe.clone())
        .unwrap();
    assert_eq!(second.settled().await, RegistrationState::Registered);
    assert!(probe.0.load(Ordering::SeqCst));
    let table = registry.list_workers().await.unwrap();
    assert_eq!(table.workers["a"].record.incarnation, 2);
    drop(first);
}

#[tokio::test]
async fn the_same_incarnation_replaces_its_record_without_a_question() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let _first = register(&registry, worker("a", 1)).await;
    let again = registry
        .register_worker(worker("a", 1), Told::alive())
        .unwrap();
    assert_eq!(again.settled().await, RegistrationState::Registered);
}

#[tokio::test]
async fn a_router_has_the_form_of_etcds_resolvers() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let record = RouterRecord {
        router_id: "r1".to_owned(),
        address: "127.0.0.1:8000".to_owned(),
    };
    let registration = registry.register_router(record.clone()).unwrap();
    assert_eq!(registration.settled().await, RegistrationState::Registered);

    let client = Client::new(settings(&etcd)).unwrap();
    let key = format!("kvmesh/v1/{CLUSTER}/routers/r1");
    let found = client.get(&key).await.unwrap().unwrap();
    assert_eq!(found.value, br#"{"Addr":"127.0.0.1:8000"}"#);
    assert_eq!(registry.list_routers().await.unwrap(), [record]);
}

#[tokio::test]
async fn records_that_cannot_be_used_hide_nobody_else() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let prefix = format!("kvmesh/v1/{CLUSTER}/workers");
    etcd.ctl(&["put", &format!("{prefix}/broken"), "{"]);
    // The record of another worker under this key.
    etcd.ctl(&[
        "put",
        &format!("{prefix}/liar"),
        r#"{"workerId":"a","incarnation":"1","address":"127.0.0.1:1"}"#,
    ]);
    // A field that a newer version added.
    etcd.ctl(&[
        "put",
        &format!("{prefix}/newer"),
        r#"{"workerId":"newer","incarnation":"1","address":"127.0.0.1:1","colour":"red"}"#,
    ]);
    let _a = register(&registry, worker("a", 1)).await;

    let table = registry.list_workers().await.unwrap();
    assert_eq!(table.workers.keys().collect::<Vec<_>>(), ["a", "newer"]);
    assert_eq!(
        table.unusable.keys().collect::<Vec<_>>(),
        ["broken", "liar"]
    );
}

#[tokio::test]
async fn a_list_of_several_pages_is_whole() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let input: Vec<_> = (0..1_203)
        .map(|n| {
            let record = worker(&format!("w{n:04}"), 1);
            let key = format!("kvmesh/v1/{CLUSTER}/workers/{}", record.worker_id);
            (key, serde_json::to_string(&record).unwrap())
        })
        .collect();
    // etcd takes at most 128 operations in a transaction.
    for part in input.chunks(100) {
        let client = Client::new(settings(&etcd)).unwrap();
        super::survive::put_all(&client, part).await;
    }
    let watch = registry.watch_workers();
    assert_eq!(watch.listed().await.workers.len(), 1_203);
}

#[tokio::test]
async fn a_dead_member_is_passed_over() {
    let mut dead = Etcd::start();
    dead.kill();
    let etcd = Etcd::start();
    let mut settings = settings(&etcd);
    settings.endpoints.insert(0, dead.endpoint());
    let registry = Registry::new(settings).unwrap();
    let _registration = register(&registry, worker("a", 1)).await;
    assert!(registry.status().borrow().connected);
}

#[tokio::test]
async fn user_and_password_are_used_and_a_wrong_one_is_said() {
    let etcd = Etcd::start();
    etcd.ctl(&["user", "add", "root:secret"]);
    etcd.ctl(&["user", "grant-role", "root", "root"]);
    etcd.ctl(&["auth", "enable"]);
    let mut with = settings(&etcd);
    with.credentials = Some(Credentials {
        user: "root".to_owned(),
        password: "secret".to_owned(),
    });
    let right = Registry::new(with.clone()).unwrap();
    let registration = register(&right, worker("a", 1)).await;
    let watch = right.watch_workers();
    assert_eq!(watch.listed().await.workers.len(), 1);

    with.credentials = Some(Credentials {
        user: "root".to_owned(),
        password: "wrong".to_owned(),
    });
    let wrong = Registry::new(with).unwrap();
    assert!(matches!(
        wrong.list_workers().await,
        Err(RegistryError::Rejected { .. })
    ));
    assert!(registry(&etcd).list_workers().await.is_err());
    registration.close().await;
}

#[tokio::test]
async fn tls_and_a_certificate_of_our_own_are_used() {
    let etcd = Etcd::start_tls();
    let files = etcd.tls().unwrap();
    let read = |path: &std::path::Path| std::fs::read(path).unwrap();
    let with = |authority: Vec<u8>, certified: bool| {
        let client = &files.client;
        let mut settings = settings(&etcd);
        settings.tls = Some(Tls {
            ca_pem: authority,
            identity_pem: certified.then(|| (read(&client.certificate), read(&client.key))),
            server_name: None,
        });
        Registry::new(settings).unwrap()
    };
    let right = with(read(&files.authority), true);
    let registration = register(&right, worker("a", 1)).await;
    assert_eq!(right.watch_workers().listed().await.workers.len(), 1);
    registration.close().await;
    // Without a certificate of ours etcd does not talk to us, and we do not
    // talk to an etcd whose authority is another.
    assert!(
        with(read(&files.authority), false)
            .list_workers()
            .await
            .is_err()
    );
    let other = kvmesh_testkit::certificates::Authority::new("another").unwrap();
    assert!(
        with(other.pem().into_bytes(), true)
            .list_workers()
            .await
            .is_err()
    );
}

#[tokio::test]
async fn settings_and_records_that_cannot_be_are_refused_by_name() {
    let none: [&str; 0] = [];
    let text = |settings: Settings| Registry::new(settings).unwrap_err().to_string();
    assert!(text(Settings::new(none, "c")).contains("endpoints are empty"));
    assert!(text(Settings::new(["ftp://a:1"], "c")).contains("ftp://a:1"));
    assert!(text(Settings::new(["nowhere"], "c")).contains("nowhere"));
    assert!(text(Settings::new(["https://a:1"], "c")).contains("TLS"));
    assert!(text(Settings::new(["a:1"], "a/b")).contains("a/b"));

    let registry = Registry::new(Settings::new(["127.0.0.1:1"], "c")).unwrap();
    let mut record = worker("a b", 1);
    let told: Arc<Told> = Told::dead();
    assert!(
        registry
            .register_worker(record.clone(), told.clone())
            .is_err()
    );
    record.worker_id = "a".to_owned();
    record.address = "nowhere".to_owned();
    assert!(
        registry
            .register_worker(record.clone(), told.clone())
            .is_err()
    );
    record.address = "127.0.0.1:5".to_owned();
    record.incarnation = 0;
    assert!(registry.register_worker(record, told).is_err());
}
