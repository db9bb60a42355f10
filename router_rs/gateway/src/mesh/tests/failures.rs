//! What breaks, refuses or stands still.

use super::*;

#[tokio::test]
async fn a_refused_placement_is_planned_again() {
    let (prefill, decode) = (worker(Role::Prefill), worker(Role::Decode));
    decode.faults().set(|plan| plan.refuse_next = 2);
    let mesh = mesh_of(&[&prefill, &decode]).await;
    let answer = collect(mesh.generate(request(&[1], 5)).unwrap()).await;
    assert_eq!(answer.error, None);
    assert_eq!(answer.ids.len(), 5);
    assert_eq!(mesh.counters().refusals.get(), 2);
    assert!(until(|| nothing_left(&mesh, &[&prefill, &decode])).await);
}

#[tokio::test]
async fn what_is_returned_goes_on_where_it_was() {
    let both = worker(Role::Both);
    both.faults().set(|plan| {
        plan.return_at = Some(7);
        plan.return_next = 1;
    });
    let mesh = mesh_of(&[&both]).await;
    let answer = collect(mesh.generate(request(&[1, 1], 20)).unwrap()).await;
    assert_eq!(answer.error, None);
    assert_eq!(answer.ids, both.tokens().expected(&[1, 1], 20));
    assert_eq!(answer.finished.unwrap().usage.unwrap().attempts, 2);
}

#[tokio::test]
async fn a_killed_worker_ends_its_streams_with_the_next_index() {
    let config = MockConfig {
        step: Duration::from_millis(5),
        ..MockConfig::default()
    };
    let mut both = MockWorker::start(config).unwrap();
    let mesh = mesh_of(&[&both]).await;
    let mut stream = mesh.generate(request(&[1, 2], 100_000)).unwrap();
    let mut answer = first_tokens(&mut stream).await;
    both.kill();
    while let Some(item) = tokio::time::timeout(LIMIT, stream.next()).await.unwrap() {
        answer.take(item);
    }
    let Some(RequestError::WorkerLost { next_index, .. }) = answer.error else {
        panic!("{:?}", answer.error)
    };
    assert_eq!(next_index as usize, answer.ids.len());
    drop(stream);
    assert_eq!(mesh.booked(), 0);
    let refused = mesh.generate(request(&[1], 5)).err();
    assert!(
        matches!(refused, Some(RequestError::NoWorker(_))),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_frozen_worker_is_lost_and_comes_back_on_probation() {
    let config = MockConfig {
        step: Duration::from_millis(5),
        ..MockConfig::default()
    };
    let both = MockWorker::start(config).unwrap();
    let mesh = mesh_of(&[&both]).await;
    let mut stream = mesh.generate(request(&[1, 2], 100_000)).unwrap();
    first_tokens(&mut stream).await;
    both.freeze();
    let answer = collect(stream).await;
    assert!(
        matches!(answer.error, Some(RequestError::WorkerLost { .. })),
        "{:?}",
        answer.error
    );
    both.thaw();
    assert!(
        until(|| mesh.sessions().half_open == 1).await,
        "{:?}",
        mesh.sessions()
    );
    let answer = collect(mesh.generate(request(&[7], 5)).unwrap()).await;
    assert_eq!(answer.error, None);
    assert_eq!(mesh.sessions().live, 1);
    // What it held from before the freeze was cancelled.
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn a_hole_closes_the_session_and_it_comes_back() {
    let both = worker(Role::Both);
    both.faults().set(|plan| plan.hole_at = Some(3));
    let mesh = mesh_of(&[&both]).await;
    let answer = collect(mesh.generate(request(&[1], 10)).unwrap()).await;
    let Some(RequestError::WorkerLost { next_index, .. }) = answer.error else {
        panic!("{:?}", answer.error)
    };
    assert_eq!(next_index, 3);
    assert_eq!(mesh.counters().violations.get(), 1);
    both.faults().set(|plan| plan.hole_at = None);
    assert!(until(|| both.counters().sessions_opened == 2 && mesh.sessions().live == 1).await);
    let answer = collect(mesh.generate(request(&[1], 10)).unwrap()).await;
    assert_eq!(answer.error, None);
}

#[tokio::test]
async fn stale_rows_are_counted_and_dropped() {
    let both = worker(Role::Both);
    both.faults().set(|plan| {
        plan.stale_rows = true;
        plan.return_at = Some(2);
        plan.return_next = 1;
    });
    let mesh = mesh_of(&[&both]).await;
    let answer = collect(mesh.generate(request(&[1], 10)).unwrap()).await;
    assert_eq!(answer.error, None);
    assert_eq!(answer.ids, both.tokens().expected(&[1], 10));
    assert!(mesh.counters().stale_frames.get() > 0);
}

#[tokio::test]
async fn a_full_pool_makes_requests_wait_and_all_finish() {
    let config = MockConfig {
        pool_blocks: 16,
        step: Duration::from_millis(1),
        ..MockConfig::default()
    };
    let both = MockWorker::start(config).unwrap();
    let mesh = mesh_of(&[&both]).await;
    let prompt = vec![1; 32];
    let streams: Vec<_> = (0..16)
        .map(|_| tokio::spawn(collect(mesh.generate(request(&prompt, 20)).unwrap())))
        .collect();
    for stream in streams {
        assert_eq!(stream.await.unwrap().ids.len(), 20);
    }
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn a_slow_client_is_given_up_and_costs_ids_only() {
    let config = MockConfig {
        step: Duration::from_millis(1),
        ..MockConfig::default()
    };
    let both = MockWorker::start(config).unwrap();
    let bound = MeshSettings {
        slow_client_timeout: Duration::from_millis(500),
        ..settings(&[&both])
    };
    let mesh = mesh_with(bound).await;
    let mut stream = mesh.generate(request(&[1], 1_000_000)).unwrap();
    let before = first_tokens(&mut stream).await;
    assert!(until(|| mesh.counters().slow_clients.get() == 1).await);
    assert_eq!(mesh.counters().undelivered_ids.get(), 0);
    let answer = collect(stream).await;
    assert!(!before.ids.is_empty());
    assert!(
        matches!(answer.error, Some(RequestError::SlowClient { .. })),
        "{:?}",
        answer.error
    );
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}
