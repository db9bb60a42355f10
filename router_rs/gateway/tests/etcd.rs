//! The mesh over a real etcd.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use common::{Mesh, read, request};
use kvmesh_registry::{
    Credentials, GetInfoProbe, Registration, RegistrationState, Registry, Settings,
};
use kvmesh_rpc::v1::admin_client::AdminClient;
use kvmesh_testkit::{
    etcd::Etcd,
    mock::{MockConfig, MockWorker},
};
use kvmesh_trust::ServerTls;
use kvmesh_wire::v1;
use serde_json::json;

const TTL: Duration = Duration::from_secs(2);

fn registry(etcd: &Etcd) -> Registry {
    let mut settings = Settings::new([etcd.endpoint()], "default");
    settings.ttl = TTL;
    Registry::new(settings).unwrap()
}

async fn register(registry: &Registry, worker: &MockWorker) -> Registration {
    let probe = Arc::new(GetInfoProbe::default());
    let registration = registry
        .register_worker(worker.record().clone(), probe)
        .unwrap();
    assert_eq!(registration.settled().await, RegistrationState::Registered);
    registration
}

async fn over(etcd: &Etcd) -> Mesh {
    let found = json!({"etcd": [etcd.endpoint()], "etcd_ttl": "2s", "router_id": "r1"});
    Mesh::start(vec![], found).await
}

/// Looks until the router's table of workers is as wanted.
async fn wait_workers(mesh: &Mesh, wanted: impl Fn(&[v1::WorkerStatus]) -> bool) {
    wait_workers_until(mesh, Instant::now() + Duration::from_secs(60), wanted).await;
}

async fn wait_workers_until(
    mesh: &Mesh,
    until: Instant,
    wanted: impl Fn(&[v1::WorkerStatus]) -> bool,
) {
    let mut admin = AdminClient::new(mesh.channel().await);
    loop {
        let ask = v1::ListWorkersRequest::default();
        let workers = admin.list_workers(ask).await.unwrap().into_inner().workers;
        if wanted(&workers) {
            return;
        }
        assert!(Instant::now() < until, "{workers:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn live(workers: &[v1::WorkerStatus], worker: &MockWorker) -> bool {
    workers.iter().any(|row| {
        row.record.as_ref().unwrap().worker_id == worker.worker_id()
            && row.state() == v1::SessionState::Live
            && row.registered
    })
}

fn known(workers: &[v1::WorkerStatus], worker: &MockWorker) -> bool {
    let id = |row: &v1::WorkerStatus| row.record.as_ref().unwrap().worker_id.clone();
    workers.iter().any(|row| id(row) == worker.worker_id())
}

async fn answers(mesh: &Mesh, tokens: u32) {
    mesh.wait_ready("").await;
    let stream = mesh.client().await.generate(request(tokens)).await.unwrap();
    let (ids, end) = read(stream.into_inner()).await;
    end.unwrap();
    assert_eq!(ids.len(), tokens as usize);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_come_and_go_by_their_records() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let mesh = over(&etcd).await;
    let one = MockWorker::start(MockConfig::default()).unwrap();
    let first = register(&registry, &one).await;
    wait_workers(&mesh, |workers| live(workers, &one)).await;
    answers(&mesh, 5).await;
    // The router stands there as etcd's own resolvers read it.
    let value = etcd.ctl(&["get", "--print-value-only", "kvmesh/v1/default/routers/r1"]);
    let record: serde_json::Value = serde_json::from_str(&value).unwrap();
    assert_eq!(record["Addr"], mesh.address().to_string());

    let mut two = MockWorker::start(MockConfig::default()).unwrap();
    let second = register(&registry, &two).await;
    wait_workers(&mesh, |workers| live(workers, &one) && live(workers, &two)).await;
    // A key that vanishes under a live session changes one column.
    second.close().await;
    wait_workers(&mesh, |workers| {
        known(workers, &two) && !live(workers, &two)
    })
    .await;
    // Both are as good: a draw decides, and all may go to one of them for a while.
    for _ in 0..100 {
        if two.counters().placed > 0 {
            break;
        }
        answers(&mesh, 3).await;
    }
    assert!(two.counters().placed > 0, "it serves on");
    // Without key and session it is gone.
    two.kill();
    wait_workers(&mesh, |workers| !known(workers, &two)).await;
    answers(&mesh, 3).await;
    first.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_whose_last_worker_is_gone_for_good_is_not_found() {
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let mesh = over(&etcd).await;
    let one = MockWorker::start(MockConfig::default()).unwrap();
    let other = MockConfig {
        model: "other".to_owned(),
        ..MockConfig::default()
    };
    let mut two = MockWorker::start(other).unwrap();
    let first = register(&registry, &one).await;
    let second = register(&registry, &two).await;
    wait_workers(&mesh, |workers| live(workers, &one) && live(workers, &two)).await;
    answers(&mesh, 3).await;
    let mut client = mesh.client().await;
    let mut asked = request(3);
    asked.model = "other".to_owned();
    two.kill();
    wait_workers(&mesh, |workers| !live(workers, &two)).await;
    // It has its key: it may come back.
    let away = client.generate(asked.clone()).await.unwrap_err();
    assert_eq!(away.code(), tonic::Code::Unavailable, "{away}");
    second.close().await;
    wait_workers(&mesh, |workers| !known(workers, &two)).await;
    let gone = client.generate(asked).await.unwrap_err();
    assert_eq!(gone.code(), tonic::Code::NotFound, "{gone}");
    let models = client.list_models(v1::ListModelsRequest {}).await.unwrap();
    let models = models.into_inner().models;
    assert_eq!(models.len(), 1, "{models:?}");
    answers(&mesh, 3).await;
    first.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_worker_gets_nothing_at_once_and_is_gone_with_its_lease() {
    // All that is done under it has to be done within it.
    const LEASE: Duration = Duration::from_secs(15);
    // etcd looks for leases that have ended every half a second, and a machine may be busy.
    const MARGIN: Duration = Duration::from_secs(30);
    let etcd = Etcd::start();
    let registry = registry(&etcd);
    let one = MockWorker::start(MockConfig::default()).unwrap();
    let mut two = MockWorker::start(MockConfig::default()).unwrap();
    let _one = register(&registry, &one).await;
    // By hand, under a lease that nobody keeps alive: as after kill -9.
    let lease = etcd.ctl(&["lease", "grant", &LEASE.as_secs().to_string()]);
    let lease = lease.split_whitespace().nth(1).unwrap();
    let key = format!("kvmesh/v1/default/workers/{}", two.worker_id());
    let record = serde_json::to_string(two.record()).unwrap();
    etcd.ctl(&["put", &format!("--lease={lease}"), &key, &record]);
    let mesh = over(&etcd).await;
    wait_workers(&mesh, |workers| live(workers, &one) && live(workers, &two)).await;
    mesh.wait_ready("").await;
    let placements = "kvmesh_placements_total ";
    let (before, here) = (mesh.figure(placements).await, one.counters().placed);
    two.kill();
    let killed = Instant::now();
    wait_workers(&mesh, |workers| !live(workers, &two)).await;
    let mut client = mesh.client().await;
    for _ in 0..20 {
        let stream = client.generate(request(2)).await.unwrap().into_inner();
        let (ids, end) = read(stream).await;
        // What goes to the dead is planned anew: that would be the second.
        assert_eq!((ids.len(), end.unwrap().usage.unwrap().attempts), (2, 1));
    }
    assert_eq!(mesh.figure(placements).await, before + 20);
    assert_eq!(one.counters().placed, here + 20);
    let until = killed + LEASE + MARGIN;
    wait_workers_until(&mesh, until, |workers| !known(workers, &two)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_away_stops_nothing_and_back_without_its_data_is_filled_again() {
    let mut etcd = Etcd::start();
    let registry = registry(&etcd);
    let config = MockConfig {
        step: Duration::from_millis(5),
        ..MockConfig::default()
    };
    let one = MockWorker::start(config).unwrap();
    let _one = register(&registry, &one).await;
    let mut mesh = over(&etcd).await;
    wait_workers(&mesh, |workers| live(workers, &one)).await;
    mesh.wait_ready("").await;
    let stream = mesh.client().await.generate(request(2_000)).await.unwrap();
    let stream = tokio::spawn(read(stream.into_inner()));
    etcd.kill();
    mesh.wait_figure("kvmesh_etcd_connected", 0).await;
    answers(&mesh, 5).await;
    etcd.lose_data();
    etcd.start_again();
    mesh.wait_figure("kvmesh_etcd_connected", 1).await;
    wait_workers(&mesh, |workers| live(workers, &one)).await;
    let (ids, end) = stream.await.unwrap();
    end.unwrap();
    assert_eq!(ids.len(), 2_000, "no token was lost over the outage");
    // Another router finds the worker and this one's record is there again.
    let second = over(&etcd).await;
    wait_workers(&second, |workers| live(workers, &one)).await;
    let routers = registry.list_routers().await.unwrap();
    assert!(!routers.is_empty());
    mesh.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_user_and_password_come_from_the_settings() {
    let etcd = Etcd::start_tls();
    etcd.ctl(&["user", "add", "root:secret"]);
    etcd.ctl(&["user", "grant-role", "root", "root"]);
    etcd.ctl(&["auth", "enable"]);
    let files = etcd.tls().unwrap();
    let mut settings = Settings::new([etcd.endpoint()], "default");
    settings.ttl = TTL;
    let client = (
        ("etcd_cert", files.client.certificate.clone()),
        ("etcd_key", files.client.key.clone()),
    );
    let authority = ("etcd_ca", files.authority.clone());
    settings.tls = Some(ServerTls::open(authority, Some(client), None).unwrap());
    settings.credentials = Some(Credentials {
        user: "root".to_owned(),
        password: "secret".to_owned(),
    });
    let worker = MockWorker::start(MockConfig::default()).unwrap();
    let _worker = register(&Registry::new(settings).unwrap(), &worker).await;
    let found = json!({
        "etcd": [etcd.endpoint()], "etcd_ttl": "2s",
        "etcd_ca": files.authority,
        "etcd_cert": files.client.certificate, "etcd_key": files.client.key,
        "etcd_user": "root", "etcd_password": "secret",
    });
    let mesh = Mesh::start(vec![], found).await;
    wait_workers(&mesh, |workers| live(workers, &worker)).await;
    answers(&mesh, 5).await;
    mesh.wait_figure("kvmesh_etcd_connected", 1).await;
}
