//! Who may hold a key, and what stands in it.

use std::{
    future::Future,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kvmesh_testkit::certificates::{Authority, IssuedFiles};
use kvmesh_trust::ServerTls;
use kvmesh_wire::v1::WorkerRecord;

use super::{CLUSTER, Etcd, Told, register, registry, settings, worker};
use crate::{
    Credentials, Probe, RecordError, RegistrationState, Registry, RegistryError, RouterRecord,
    Settings, WorkerTable, client::Client,
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
    let with = |authority: &Path, certified: bool| {
        let mut settings = settings(&etcd);
        settings.tls = Some(tls(authority, certified.then_some(&files.client)));
        Registry::new(settings).unwrap()
    };
    let right = with(&files.authority, true);
    let registration = register(&right, worker("a", 1)).await;
    assert_eq!(right.watch_workers().listed().await.workers.len(), 1);
    registration.close().await;
    // Without a certificate of ours etcd does not talk to us, and we do not
    // talk to an etcd whose authority is another.
    assert!(with(&files.authority, false).list_workers().await.is_err());
    let other = files.authority.with_file_name("another.pem");
    std::fs::write(&other, Authority::new("another").unwrap().pem()).unwrap();
    assert!(with(&other, true).list_workers().await.is_err());
}

/// The TLS that these files say.
fn tls(authority: &Path, client: Option<&IssuedFiles>) -> ServerTls {
    let identity = client.map(|client| {
        let certificate = ("etcd_cert", client.certificate.clone());
        (certificate, ("etcd_key", client.key.clone()))
    });
    ServerTls::open(("etcd_ca", authority.to_owned()), identity, None).unwrap()
}

#[tokio::test]
async fn changed_certificates_are_shown_to_etcd_and_the_lease_is_kept() {
    let mut etcd = Etcd::start_tls();
    let files = etcd.tls().unwrap().clone();
    // Files of our own: etcd's change apart from them.
    let own = files.authority.with_file_name("own-authority.pem");
    std::fs::copy(&files.authority, &own).unwrap();
    let stranger = Authority::new("another").unwrap();
    let folder = files.authority.parent().unwrap();
    let shown = stranger.issue(&["client"]).unwrap();
    let shown = shown.write(folder, "own").unwrap();
    let mut settings = settings(&etcd);
    // Longer than all that follows.
    settings.ttl = Duration::from_secs(600);
    settings.tls = Some(tls(&own, Some(&shown)));
    let registry = Registry::new(settings.clone()).unwrap();
    let registration = registry
        .register_worker(worker("a", 1), Told::dead())
        .unwrap();
    assert!(matches!(
        registration.settled().await,
        RegistrationState::Away(_)
    ));
    // The key first: what does not fit is not taken.
    std::fs::copy(&files.client.key, &shown.key).unwrap();
    std::fs::copy(&files.client.certificate, &shown.certificate).unwrap();
    let is = |wanted: RegistrationState| move |state: &RegistrationState| *state == wanted;
    registration
        .wait_for(is(RegistrationState::Registered))
        .await;
    let client = Client::new(settings).unwrap();
    let key = format!("kvmesh/v1/{CLUSTER}/workers/a");
    let lease = client.get(&key).await.unwrap().unwrap().lease;

    // etcd comes back and trusts another authority alone.
    let mut states = registration.changes();
    states.mark_unchanged();
    etcd.kill();
    std::fs::write(&files.authority, stranger.pem()).unwrap();
    let renewed = stranger.issue(&["client"]).unwrap();
    std::fs::write(&shown.key, &renewed.key).unwrap();
    std::fs::write(&shown.certificate, &renewed.certificate).unwrap();
    etcd.start_again();
    let mut changed = worker("a", 1);
    changed.version = "changed".to_owned();
    registration.update_worker(&changed).unwrap();
    let watch = registry.watch_workers();
    let is_changed = |table: &WorkerTable| {
        let found = table.workers.get("a");
        found.is_some_and(|found| *found.record == changed)
    };
    watch.wait_for(is_changed).await;
    assert_eq!(registration.state(), RegistrationState::Registered);
    assert!(
        !states.has_changed().unwrap(),
        "it was registered throughout"
    );
    while client.get(&key).await.is_err() {}
    assert_eq!(client.get(&key).await.unwrap().unwrap().lease, lease);
    registration.close().await;
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
