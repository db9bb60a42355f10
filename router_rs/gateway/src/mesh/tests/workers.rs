//! What workers say of themselves, and what is fetched from them.

use kvmesh_testkit::etcd::Etcd;

use super::*;

#[tokio::test]
async fn a_draining_worker_gets_no_new_work() {
    let (one, two) = (worker(Role::Both), worker(Role::Both));
    let mesh = mesh_of(&[&one, &two]).await;
    one.set_draining(true);
    let told = || {
        let rows = mesh.workers();
        rows.iter()
            .any(|row| row.load.as_ref().is_some_and(|load| load.draining))
    };
    assert!(until(told).await);
    for n in 0..8 {
        assert_eq!(
            collect(mesh.generate(request(&[n], 3)).unwrap())
                .await
                .ids
                .len(),
            3
        );
    }
    assert_eq!((one.counters().placed, two.counters().placed), (0, 8));
    let drain = v1::DrainWorkerRequest {
        worker_id: two.worker_id().to_owned(),
        ..v1::DrainWorkerRequest::default()
    };
    assert!(matches!(
        mesh.drain(&drain).await,
        Err(MeshError::EmptiesRole)
    ));
}

fn drain_of(worker: &MockWorker) -> v1::DrainWorkerRequest {
    v1::DrainWorkerRequest {
        worker_id: worker.worker_id().to_owned(),
        ..v1::DrainWorkerRequest::default()
    }
}

fn role_of(worker: &MockWorker, role: Role) -> v1::SetWorkerRoleRequest {
    v1::SetWorkerRoleRequest {
        worker_id: worker.worker_id().to_owned(),
        role: role.into(),
        ..v1::SetWorkerRoleRequest::default()
    }
}

/// A pool of two that decode, whose loads say what they said before.
async fn pool_of_two() -> ([MockWorker; 3], Arc<Mesh>) {
    let pool = [Role::Prefill, Role::Decode, Role::Decode].map(worker);
    let mesh = mesh_of(&pool.each_ref()).await;
    let told = || mesh.workers().iter().all(|row| row.load.is_some());
    assert!(until(told).await);
    for one in &pool {
        one.faults().set(|plan| plan.old_loads = true);
    }
    (pool, mesh)
}

#[tokio::test]
async fn of_two_changes_at_once_the_second_counts_the_first() {
    let emptied = |answer: Result<(), MeshError>| match answer {
        Ok(()) => false,
        Err(MeshError::EmptiesRole) => true,
        Err(other) => panic!("{other}"),
    };
    for drains in [true, false] {
        let (pool, mesh) = pool_of_two().await;
        let leave = async |one: &MockWorker| match drains {
            true => mesh.drain(&drain_of(one)).await.map(drop),
            false => mesh.set_role(&role_of(one, Role::Prefill)).await.map(drop),
        };
        let (first, second) = tokio::join!(leave(&pool[1]), leave(&pool[2]));
        assert_eq!((emptied(first), emptied(second)), (false, true));
        // It counts until a load says so, and not only while it is being asked for.
        assert!(emptied(leave(&pool[2]).await));
        let forced = v1::DrainWorkerRequest {
            force: true,
            ..drain_of(&pool[2])
        };
        mesh.drain(&forced).await.unwrap();
        mesh.shutdown(Duration::ZERO).await;
    }
}

/// Two routers in one cluster; each has heard of all workers.
async fn two_routers(etcd: &Etcd, pool: &[MockWorker]) -> [Arc<Mesh>; 2] {
    let mut etcd_settings = kvmesh_registry::Settings::new([etcd.endpoint()], "test");
    etcd_settings.call_timeout = LIMIT;
    let registry = kvmesh_registry::Registry::new(etcd_settings).unwrap();
    let all: Vec<&MockWorker> = pool.iter().collect();
    let routers = ["r1", "r2"].map(|router_id| {
        let own = MeshSettings {
            router_id: router_id.to_owned(),
            ..settings(&all)
        };
        Mesh::start(own, Some(&registry))
    });
    for mesh in &routers {
        let told = || mesh.workers().iter().all(|row| row.load.is_some());
        let live = || mesh.sessions().live == pool.len() as u64;
        assert!(until(|| live() && told()).await);
    }
    routers
}

#[tokio::test]
async fn of_two_changes_at_two_routers_the_second_counts_the_first() {
    let etcd = Etcd::start();
    for refuses in [false, true] {
        let pool = [Role::Prefill, Role::Decode, Role::Decode].map(worker);
        let routers = two_routers(&etcd, &pool).await;
        for one in &pool {
            one.faults().set(|plan| plan.old_loads = true);
        }
        pool[1]
            .faults()
            .set(|plan| plan.refuse_calls_next = u32::from(refuses));
        let first = routers[0].drain(&drain_of(&pool[1])).await;
        let second = routers[1].drain(&drain_of(&pool[2])).await;
        match refuses {
            true => {
                // What was not done is of no account.
                assert!(matches!(first, Err(MeshError::Worker(_))), "{first:?}");
                second.unwrap();
            }
            false => {
                first.unwrap();
                assert!(matches!(second, Err(MeshError::EmptiesRole)), "{second:?}");
            }
        }
        for mesh in routers {
            mesh.shutdown(Duration::ZERO).await;
        }
    }
}

#[tokio::test]
async fn a_change_is_made_though_the_registry_is_away() {
    let mut etcd = Etcd::start();
    let pool = [Role::Prefill, Role::Decode, Role::Decode].map(worker);
    let [mesh, _other] = two_routers(&etcd, &pool).await;
    etcd.kill();
    mesh.drain(&drain_of(&pool[1])).await.unwrap();
}

#[tokio::test]
async fn a_change_that_its_worker_refused_counts_no_more() {
    let (pool, mesh) = pool_of_two().await;
    pool[1].faults().set(|plan| plan.refuse_calls_next = 1);
    let refused = mesh.set_role(&role_of(&pool[1], Role::Prefill)).await;
    assert!(matches!(refused, Err(MeshError::Worker(_))), "{refused:?}");
    let role = mesh.set_role(&role_of(&pool[2], Role::Prefill)).await;
    assert_eq!(role.unwrap(), Role::Prefill);
}

#[tokio::test]
async fn what_outputs_taught_outlives_a_session_that_breaks_and_comes_back() {
    let both = worker(Role::Both);
    let mesh = mesh_of(&[&both]).await;
    let dispatcher = &mesh.core.dispatcher;
    let class = kvmesh_scheduler::Class::Standard.index();
    let left = || {
        let views = dispatcher.placer().left_by_views();
        assert_eq!(views.len(), 1);
        views[0][class]
    };
    let asked = request(&[1], 4_000);
    let expected = || dispatcher.expected_output(&asked, 0);
    let (left_before, expected_before) = (left(), expected());
    for n in 0..8 {
        let answer = collect(mesh.generate(request(&[n], 4_000)).unwrap()).await;
        assert_eq!(answer.ids.len(), 4_000);
    }
    // Outputs are much longer than what is expected of a new cluster.
    let learnt = || left() > 2.0 * left_before && expected() > 2 * expected_before;
    assert!(until(learnt).await, "{left_before} {}", left());
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
    let (left_learnt, expected_learnt) = (left(), expected());
    let opened = both.counters().sessions_opened;
    both.break_sessions();
    // Live again is only what said hello once more.
    let back = || both.counters().sessions_opened > opened && mesh.sessions().live == 1;
    assert!(until(back).await, "{:?}", mesh.workers());
    assert_eq!(expected(), expected_learnt);
    // Views are told anew where it changed by a tenth.
    let drift = (left() / left_learnt - 1.0).abs();
    assert!(drift < 0.1, "{left_learnt} {}", left());
}

#[tokio::test]
async fn another_protocol_major_is_refused_by_name() {
    let config = MockConfig {
        version: (2, 0),
        ..MockConfig::default()
    };
    let other = MockWorker::start(config).unwrap();
    let mesh = Mesh::start(settings(&[&other]), None);
    let refused = || mesh.workers()[0].state_detail.contains("protocol 2.0");
    assert!(until(refused).await, "{:?}", mesh.workers());
    assert!(matches!(mesh.model("mock"), Err(RequestError::NoWorker(_))));
}

#[tokio::test]
async fn a_model_that_no_worker_has_any_more_is_unknown_again() {
    let of = |model: &str, listen| MockConfig {
        model: model.to_owned(),
        listen,
        ..MockConfig::default()
    };
    let asked = || AdmittedRequest {
        model: "old".to_owned(),
        ..request(&[1], 3)
    };
    let stays = worker(Role::Both);
    let any = MockConfig::default().listen;
    let mut changes = MockWorker::start(of("old", any)).unwrap();
    let mesh = mesh_of(&[&stays, &changes]).await;
    let answer = collect(mesh.generate(asked()).unwrap()).await;
    assert_eq!(answer.error, None);
    let address = changes.addr();
    changes.kill();
    assert!(until(|| mesh.sessions().live == 1).await);
    // Its worker is away: nobody says that it does not come back.
    let away = mesh.generate(asked()).err();
    assert!(matches!(away, Some(RequestError::NoWorker(_))), "{away:?}");
    // It comes back with another model.
    let _changed = MockWorker::start(of("new", address)).unwrap();
    assert!(until(|| mesh.model("new").is_ok()).await);
    let known = vec!["mock".to_owned(), "new".to_owned()];
    let name = "old".to_owned();
    let unknown = mesh.generate(asked()).err();
    assert_eq!(unknown, Some(RequestError::UnknownModel { name, known }));
}

#[tokio::test]
async fn a_tokenizer_is_fetched_once_a_digest_and_kept_on_disk() {
    let (one, two) = (worker(Role::Both), worker(Role::Both));
    let folder = std::env::temp_dir().join(format!("kvmesh-mesh-{}", std::process::id()));
    let cached = MeshSettings {
        cache_dir: Some(folder.clone()),
        ..settings(&[&one, &two])
    };
    let mesh = mesh_with(cached).await;
    assert_eq!(mesh.counters().tokenizer_fetches.get(), 1);
    let digest = mesh.model("mock").unwrap().record.tokenizer_digest.clone();
    let kept = folder
        .join("tokenizers")
        .join(&digest)
        .join("tokenizer.json");
    assert!(until(|| kept.exists()).await);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[tokio::test]
async fn a_failed_tokenizer_download_is_tried_again_until_it_comes() {
    let both = worker(Role::Both);
    both.faults().set(|plan| plan.fail_tokenizer_next = 3);
    let retrying = MeshSettings {
        tokenizer_retry: (Duration::from_millis(1), Duration::from_millis(4)),
        ..settings(&[&both])
    };
    let mesh = mesh_with(retrying).await;
    let counters = mesh.counters();
    let tries = (
        counters.tokenizer_fetches.get(),
        counters.tokenizer_failures.get(),
    );
    assert_eq!(tries, (4, 3));
    let answer = collect(mesh.generate(request(&[1], 5)).unwrap()).await;
    assert_eq!(answer.error, None);
}

#[tokio::test]
async fn a_tokenizer_comes_from_another_worker_where_one_fails() {
    let (broken, sound) = (worker(Role::Both), worker(Role::Both));
    broken
        .faults()
        .set(|plan| plan.fail_tokenizer_next = u32::MAX);
    let retrying = MeshSettings {
        tokenizer_retry: (Duration::from_millis(1), Duration::from_millis(4)),
        ..settings(&[&broken, &sound])
    };
    let mesh = mesh_with(retrying).await;
    let answer = collect(mesh.generate(request(&[1], 5)).unwrap()).await;
    assert_eq!(answer.error, None);
    // One that fails for ever was no obstacle: it failed for as long as it was
    // the only one known, and the one fetch that worked was of the other.
    let counters = mesh.counters();
    let worked = counters.tokenizer_fetches.get() - counters.tokenizer_failures.get();
    assert_eq!(worked, 1);
}

#[tokio::test]
async fn a_shutdown_ends_with_the_last_stream_and_not_with_its_grace() {
    let config = MockConfig {
        step: Duration::from_millis(5),
        ..MockConfig::default()
    };
    let both = MockWorker::start(config).unwrap();
    let mesh = mesh_of(&[&both]).await;
    let mut stream = mesh.generate(request(&[1], 40)).unwrap();
    first_tokens(&mut stream).await;
    let rest = tokio::spawn(collect_rest(stream));
    let hour = Duration::from_secs(3_600);
    tokio::time::timeout(LIMIT, mesh.shutdown(hour))
        .await
        .expect("it ends with its streams");
    assert!(rest.await.unwrap().is_some(), "the stream finished");
}

/// The last message of a stream that has begun, if it ends well.
async fn collect_rest(mut stream: GenerationStream) -> Option<v1::Finished> {
    let mut finished = None;
    while let Some(item) = stream.next().await {
        if let Some(Message::Finished(end)) = item.ok()?.event {
            finished = Some(end);
        }
    }
    finished
}
