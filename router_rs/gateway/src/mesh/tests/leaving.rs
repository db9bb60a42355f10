//! Streams of workers that are left: they go on elsewhere with their KV.

use super::*;

fn stepping(role: Role, step_ms: u64) -> MockWorker {
    MockWorker::start(MockConfig {
        role,
        step: Duration::from_millis(step_ms),
        ..MockConfig::default()
    })
    .unwrap()
}

/// Where streams stand until they have been left.
const HELD: Option<u32> = Some(10);

/// A stream of which the worker that decodes has made some tokens.
async fn begun(mesh: &Mesh, prompt: &[u32]) -> (GenerationStream, Answer) {
    let mut stream = mesh.generate(request(prompt, 400)).unwrap();
    let mut answer = first_tokens(&mut stream).await;
    while answer.ids.len() < 3 {
        let item = tokio::time::timeout(LIMIT, stream.next()).await.unwrap();
        answer.take(item.expect("tokens come"));
    }
    (stream, answer)
}

fn outcomes(mesh: &Mesh) -> (u64, u64, u64) {
    let of = &mesh.counters().hand_overs;
    (of.begun.get(), of.done.get(), of.failed.get())
}

#[tokio::test]
async fn a_drained_workers_streams_go_on_elsewhere_and_nothing_is_computed_again() {
    for role in [Role::Decode, Role::Both] {
        let prefill = stepping(Role::Prefill, 2);
        let (a, b) = (stepping(role, 2), stepping(role, 2));
        let mesh = mesh_of(&[&prefill, &a, &b]).await;
        hold(&[&a, &b], HELD);
        let mut streams = Vec::new();
        for n in 0..8 {
            streams.push((n, begun(&mesh, &[n, 7]).await));
        }
        a.set_draining(true);
        assert!(until(|| a.counters().running == 0).await);
        hold(&[&a, &b], None);
        for (n, (stream, mut answer)) in streams {
            answer.rest(stream).await;
            assert_eq!(answer.error, None);
            assert_eq!(answer.ids, b.tokens().expected(&[n, 7], 400));
            let usage = answer.finished.unwrap().usage.unwrap();
            assert_eq!(usage.recomputed_tokens, 0, "{usage:?}");
        }
        let (begun, done, failed) = outcomes(&mesh);
        assert!(
            begun > 0 && begun == done && failed == 0,
            "{begun} {done} {failed}"
        );
        assert_eq!(a.counters().returned, 0);
        assert_eq!(mesh.counters().recomputed_tokens.get(), 0);
        assert_eq!(mesh.counters().violations.get(), 0);
        assert!(until(|| nothing_left(&mesh, &[&prefill, &a, &b])).await);
    }
}

#[tokio::test]
async fn a_role_that_flips_away_from_decode_is_left_too() {
    let prefill = stepping(Role::Prefill, 2);
    let (a, b) = (stepping(Role::Decode, 2), stepping(Role::Decode, 2));
    let mesh = mesh_of(&[&prefill, &a, &b]).await;
    hold(&[&a, &b], HELD);
    let mut streams = Vec::new();
    for n in 0..4 {
        streams.push((n, begun(&mesh, &[n, 1]).await));
    }
    a.set_role(Role::Prefill);
    assert!(until(|| a.counters().running == 0).await);
    hold(&[&a, &b], None);
    for (n, (stream, mut answer)) in streams {
        answer.rest(stream).await;
        assert_eq!(answer.ids, b.tokens().expected(&[n, 1], 400));
    }
    assert_eq!(outcomes(&mesh).2, 0);
    assert!(until(|| nothing_left(&mesh, &[&prefill, &a, &b])).await);
}

#[tokio::test]
async fn without_a_target_a_stream_finishes_where_it_is() {
    let (prefill, decode) = (stepping(Role::Prefill, 1), stepping(Role::Decode, 1));
    let mesh = mesh_of(&[&prefill, &decode]).await;
    hold(&[&decode], HELD);
    let (stream, mut answer) = begun(&mesh, &[3, 3]).await;
    decode.set_draining(true);
    let told = || {
        let loads = mesh.workers().into_iter().filter_map(|row| row.load);
        loads.filter(|load| load.draining).count() == 1
    };
    assert!(until(told).await);
    hold(&[&decode], None);
    answer.rest(stream).await;
    assert_eq!(answer.error, None);
    assert_eq!(answer.ids, decode.tokens().expected(&[3, 3], 400));
    assert_eq!(outcomes(&mesh), (0, 0, 0));
    assert!(until(|| nothing_left(&mesh, &[&prefill, &decode])).await);
}

#[tokio::test]
async fn a_drain_says_which_streams_stay_and_why() {
    let prefill = stepping(Role::Prefill, 1);
    let (a, b) = (stepping(Role::Decode, 3), stepping(Role::Decode, 3));
    let mesh = mesh_of(&[&prefill, &a]).await;
    hold(&[&a, &b], HELD);
    let (stream, mut answer) = begun(&mesh, &[8, 3]).await;
    let drain = |worker: &MockWorker| v1::DrainWorkerRequest {
        worker_id: worker.worker_id().to_owned(),
        force: true,
        ..v1::DrainWorkerRequest::default()
    };
    let told = mesh.drain(&drain(&a)).await.unwrap();
    assert_eq!((told.running, told.staying.len()), (1, 1));
    let id = &answer.accepted.as_ref().unwrap().generation_id;
    assert_eq!(told.staying[0].generation_id, *id);
    assert!(!told.staying[0].reason.is_empty());
    // Somebody comes: it goes there after all, and from there nobody has to stay.
    mesh.core
        .spawn_session(mesh.core.table.add_static(&b.addr().to_string()));
    assert!(until(|| a.counters().running == 0).await);
    let c = stepping(Role::Decode, 3);
    hold(&[&c], HELD);
    mesh.core
        .spawn_session(mesh.core.table.add_static(&c.addr().to_string()));
    assert!(until(|| mesh.sessions().live == 4).await);
    let told = mesh.drain(&drain(&b)).await.unwrap();
    assert_eq!(told.staying, []);
    hold(&[&a, &b, &c], None);
    answer.rest(stream).await;
    assert_eq!(answer.ids, c.tokens().expected(&[8, 3], 400));
    assert!(until(|| nothing_left(&mesh, &[&prefill, &a, &b, &c])).await);
}

#[tokio::test]
async fn a_target_that_refuses_and_a_transfer_that_fails_leave_the_stream_where_it_is() {
    for fails in [true, false] {
        let prefill = stepping(Role::Prefill, 1);
        let a = stepping(Role::Decode, 5);
        let b = stepping(Role::Decode, 5);
        let mesh = mesh_of(&[&prefill, &a]).await;
        hold(&[&a], HELD);
        let (stream, mut answer) = begun(&mesh, &[5, 3]).await;
        // Now somebody is there who takes nothing, or gets nothing.
        a.faults().set(|plan| plan.keep_streams = fails);
        b.faults()
            .set(|plan| plan.refuse_next = if fails { 0 } else { 1_000 });
        let mesh_of_both = mesh;
        mesh_of_both
            .core
            .spawn_session(mesh_of_both.core.table.add_static(&b.addr().to_string()));
        assert!(until(|| mesh_of_both.sessions().live == 3).await);
        a.set_draining(true);
        assert!(until(|| outcomes(&mesh_of_both).2 > 1).await);
        hold(&[&a], None);
        answer.rest(stream).await;
        assert_eq!(answer.error, None);
        assert_eq!(answer.ids, a.tokens().expected(&[5, 3], 400));
        let (begun, done, failed) = outcomes(&mesh_of_both);
        assert!(
            begun > 1 && begun <= 6,
            "tried more than once, and not for ever: {begun}"
        );
        assert_eq!((done, failed), (0, begun));
        assert_eq!(a.counters().finished, 1);
        assert!(until(|| nothing_left(&mesh_of_both, &[&prefill, &a, &b])).await);
    }
}

#[tokio::test]
async fn where_a_target_refuses_or_fails_another_one_is_tried() {
    let prefill = stepping(Role::Prefill, 1);
    let a = stepping(Role::Decode, 5);
    let mesh = mesh_of(&[&prefill, &a]).await;
    let mut streams = Vec::new();
    for n in 0..8 {
        streams.push((n, begun(&mesh, &[n, 8]).await));
    }
    // Of two that are the same by all that is known one takes nobody.
    let (refuses, takes) = (stepping(Role::Decode, 5), stepping(Role::Decode, 5));
    refuses.faults().set(|plan| plan.refuse_next = 1_000);
    for worker in [&refuses, &takes] {
        let entry = mesh.core.table.add_static(&worker.addr().to_string());
        mesh.core.spawn_session(entry);
    }
    assert!(until(|| mesh.sessions().live == 4).await);
    a.set_draining(true);
    for (n, (stream, mut answer)) in streams {
        answer.rest(stream).await;
        assert_eq!(answer.error, None);
        assert_eq!(answer.ids, takes.tokens().expected(&[n, 8], 400));
    }
    let (_, done, _) = outcomes(&mesh);
    assert_eq!(
        (done, a.counters().finished),
        (8, 0),
        "each found the other one"
    );
    assert_eq!(refuses.counters().finished, 0);
    assert!(until(|| nothing_left(&mesh, &[&prefill, &a, &refuses, &takes])).await);
}

#[tokio::test]
async fn a_drain_names_what_stays_after_all_its_tries() {
    let prefill = stepping(Role::Prefill, 1);
    let (a, b) = (stepping(Role::Decode, 10), stepping(Role::Decode, 10));
    let streams = StreamSettings {
        hand_over_tries: 2,
        ..StreamSettings::default()
    };
    let mesh = mesh_with(MeshSettings {
        streams,
        ..settings(&[&prefill, &a, &b])
    })
    .await;
    let (stream, mut answer) = begun(&mesh, &[5, 4]).await;
    let (holds, other) = match a.counters().running {
        0 => (&b, &a),
        _ => (&a, &b),
    };
    other.faults().set(|plan| plan.refuse_next = 1_000);
    let drain = v1::DrainWorkerRequest {
        worker_id: holds.worker_id().to_owned(),
        force: true,
        ..v1::DrainWorkerRequest::default()
    };
    mesh.drain(&drain).await.unwrap();
    assert!(until(|| outcomes(&mesh).2 == 2).await);
    let told = mesh.drain(&drain).await.unwrap();
    let reasons: Vec<_> = told.staying.iter().map(|one| one.reason.as_str()).collect();
    assert!(
        matches!(reasons[..], [why] if why.starts_with("2 tries") && why.contains("hand_over_tries")),
        "{reasons:?}"
    );
    answer.rest(stream).await;
    assert_eq!(answer.ids, holds.tokens().expected(&[5, 4], 400));
    assert_eq!(outcomes(&mesh), (2, 0, 2));
    assert!(until(|| nothing_left(&mesh, &[&prefill, &a, &b])).await);
}

#[tokio::test]
async fn a_drain_names_what_runs_alone() {
    let both = |dies: bool| {
        let worker = stepping(Role::Both, 5);
        let after = dies.then_some(3);
        worker.faults().set(|plan| plan.die_after_tokens = after);
        worker
    };
    let (a, b) = (both(true), both(true));
    let mesh = mesh_of(&[&a, &b]).await;
    let mut stream = mesh.generate(request(&[6, 6], 400)).unwrap();
    let mut answer = first_tokens(&mut stream).await;
    assert!(until(|| mesh.sessions().live == 0).await, "both died of it");
    let (c, d) = (both(false), both(false));
    let join = |worker: &MockWorker| {
        let entry = mesh.core.table.add_static(&worker.addr().to_string());
        mesh.core.spawn_session(entry);
    };
    join(&c);
    assert!(until(|| c.counters().running == 1).await);
    join(&d);
    assert!(until(|| mesh.sessions().live == 2).await);
    while answer.ids.len() < 8 {
        let item = tokio::time::timeout(LIMIT, stream.next()).await.unwrap();
        answer.take(item.expect("tokens come"));
    }
    let told = mesh
        .drain(&v1::DrainWorkerRequest {
            worker_id: c.worker_id().to_owned(),
            force: true,
            ..v1::DrainWorkerRequest::default()
        })
        .await
        .unwrap();
    let reasons: Vec<_> = told.staying.iter().map(|one| one.reason.as_str()).collect();
    assert!(
        matches!(reasons[..], [why] if why.contains("alone")),
        "{reasons:?}"
    );
    answer.rest(stream).await;
    assert_eq!(answer.ids, c.tokens().expected(&[6, 6], 400));
    assert_eq!(outcomes(&mesh), (0, 0, 0));
    assert!(until(|| nothing_left(&mesh, &[&c, &d])).await);
}

#[tokio::test]
async fn as_many_streams_are_on_their_way_at_once_as_is_set() {
    for at_once in [1, 3] {
        let prefill = stepping(Role::Prefill, 1);
        let a = stepping(Role::Decode, 5);
        let streams = StreamSettings {
            hand_overs_at_once: at_once,
            ..StreamSettings::default()
        };
        let mesh = mesh_with(MeshSettings {
            streams,
            ..settings(&[&prefill, &a])
        })
        .await;
        let mut streams = Vec::new();
        for n in 0..5 {
            streams.push(begun(&mesh, &[n, 2]).await);
        }
        // One that answers no placement for a while.
        let b = stepping(Role::Decode, 5);
        let entry = mesh.core.table.add_static(&b.addr().to_string());
        mesh.core.spawn_session(entry);
        assert!(until(|| mesh.sessions().live == 3).await);
        b.freeze();
        a.set_draining(true);
        let begun = || outcomes(&mesh).0;
        assert!(until(|| begun() == at_once as u64).await);
        let (stream, answer) = &mut streams[0];
        while answer.ids.len() < 40 {
            let item = tokio::time::timeout(LIMIT, stream.next()).await.unwrap();
            answer.take(item.expect("tokens come"));
        }
        assert_eq!(begun(), at_once as u64);
        b.thaw();
        for (stream, mut answer) in streams {
            answer.rest(stream).await;
            assert_eq!((answer.error, answer.ids.len()), (None, 400));
        }
        assert!(until(|| nothing_left(&mesh, &[&prefill, &a, &b])).await);
    }
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_leaves_nothing_on_either_side() {
    let prefill = stepping(Role::Prefill, 1);
    let (a, b) = (stepping(Role::Decode, 3), stepping(Role::Decode, 3));
    let mesh = mesh_of(&[&prefill, &a, &b]).await;
    let mut streams = Vec::new();
    for n in 0..12 {
        streams.push(begun(&mesh, &[n, 9]).await);
    }
    a.set_draining(true);
    for (stream, _) in streams {
        drop(stream);
        tokio::task::yield_now().await;
    }
    assert!(until(|| nothing_left(&mesh, &[&prefill, &a, &b])).await);
    assert_eq!(mesh.counters().violations.get(), 0);
}

#[tokio::test]
async fn a_worker_that_is_left_and_dies_costs_a_pause() {
    for dies in ["source", "target"] {
        let prefill = stepping(Role::Prefill, 1);
        let (mut a, mut b) = (stepping(Role::Decode, 3), stepping(Role::Decode, 3));
        let c = stepping(Role::Decode, 3);
        let mesh = mesh_of(&[&prefill, &a, &b, &c]).await;
        hold(&[&a, &b, &c], HELD);
        let mut streams = Vec::new();
        for n in 0..12 {
            streams.push((n, begun(&mesh, &[n, 4]).await));
        }
        a.set_draining(true);
        let moved = || mesh.counters().hand_overs.begun.get() > 0;
        assert!(until(moved).await);
        match dies {
            "source" => a.kill(),
            _ => b.kill(),
        }
        hold(&[&a, &b, &c], None);
        for (n, (stream, mut answer)) in streams {
            answer.rest(stream).await;
            assert_eq!(answer.error, None, "{dies}");
            assert_eq!(answer.ids, c.tokens().expected(&[n, 4], 400));
        }
        assert_eq!(mesh.counters().violations.get(), 0);
        assert!(until(|| nothing_left(&mesh, &[&prefill, &c])).await);
    }
}

#[tokio::test]
async fn a_session_that_breaks_in_the_middle_loses_nothing() {
    let prefill = stepping(Role::Prefill, 1);
    let (a, b) = (stepping(Role::Decode, 3), stepping(Role::Decode, 3));
    let mesh = mesh_of(&[&prefill, &a, &b]).await;
    hold(&[&a, &b], HELD);
    let mut streams = Vec::new();
    for n in 0..8 {
        streams.push((n, begun(&mesh, &[n, 6]).await));
    }
    a.set_draining(true);
    assert!(until(|| mesh.counters().hand_overs.begun.get() > 0).await);
    a.break_sessions();
    b.break_sessions();
    hold(&[&a, &b], None);
    for (n, (stream, mut answer)) in streams {
        answer.rest(stream).await;
        assert_eq!(answer.error, None);
        assert_eq!(answer.ids, b.tokens().expected(&[n, 6], 400));
    }
    assert!(until(|| nothing_left(&mesh, &[&prefill, &a, &b])).await);
}
