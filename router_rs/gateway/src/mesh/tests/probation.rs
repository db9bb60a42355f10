//! Workers that were lost or left out, and what lets them in again.

use super::{
    failures::{failing, slow, survives},
    *,
};

/// Nothing new goes to this worker from now on, or it may again.
async fn drain(worker: &MockWorker, mesh: &Mesh, drains: bool) {
    worker.set_draining(drains);
    let draining = |row: &v1::WorkerStatus| row.load.as_ref().is_some_and(|load| load.draining);
    assert!(until(|| mesh.workers().iter().any(draining) == drains).await);
}

/// Asks until a worker whose answers fail is left out. Nobody hears of it.
async fn until_ejected(mesh: &Arc<Mesh>) {
    ask_until(mesh, || mesh.counters().ejections.get() > 0).await;
}

/// Asks until something holds. Each answer is whole, whoever failed.
async fn ask_until(mesh: &Arc<Mesh>, holds: impl Fn() -> bool) {
    // As many as it takes: where one goes is the policy's choice.
    for n in 0..1_000 {
        let answer = collect(mesh.generate(request(&[n], 3)).unwrap()).await;
        assert_eq!((answer.error, answer.ids.len()), (None, 3));
        if holds() {
            return;
        }
    }
    panic!("{:?}", mesh.workers());
}

#[tokio::test]
async fn a_frozen_worker_is_lost_and_comes_back_on_probation() {
    let (mesh, [_lost, other]) = survives(MockWorker::freeze, MockWorker::thaw).await;
    assert!(mesh.counters().stale_frames.get() > 0);
    assert_eq!(mesh.sessions().half_open, 1, "{:?}", mesh.sessions());
    // Only it can take the next request, and that decides.
    drain(&other, &mesh, true).await;
    let answer = collect(mesh.generate(request(&[7], 5)).unwrap()).await;
    assert_eq!(answer.error, None);
    assert!(until(|| mesh.sessions().live == 2).await);
}

/// Its probe says nothing: it may not be ejected, being the last of its kind, or its
/// transfer failed.
#[tokio::test]
async fn the_last_worker_is_probed_again_after_a_probe_that_fails() {
    let both = worker(Role::Both);
    let mesh = mesh_of(&[&both]).await;
    both.freeze();
    assert!(until(|| mesh.sessions().lost == 1).await);
    both.faults().set(|plan| {
        plan.fail_at = Some(0);
        plan.fail_next = 1;
        plan.fail_code = tonic::Code::Unavailable as u32;
    });
    both.thaw();
    assert!(until(|| mesh.sessions().half_open == 1).await);
    let answer = collect(mesh.generate(request(&[1], 3)).unwrap()).await;
    assert_eq!((answer.error, answer.ids.len()), (None, 3));
    assert_eq!(both.faults().get().fail_next, 0, "the probe failed");
    assert_eq!(mesh.counters().ejections.get(), 0);
    assert!(until(|| mesh.sessions().live == 1).await);
}

#[tokio::test]
async fn a_worker_whose_answers_fail_is_left_out_until_a_probe_succeeds() {
    let (bad, good) = (failing(0, u32::MAX), worker(Role::Both));
    let mesh = mesh_of(&[&bad, &good]).await;
    // It is told until the worker is let in again, on probation too, and whoever tries it fails.
    let left_out = |row: &v1::WorkerStatus| row.state_detail == "its answers fail";
    ask_until(&mesh, || mesh.workers().iter().any(left_out)).await;
    // It is well again: with the next probe it is back.
    bad.faults().set(|plan| plan.fail_next = 0);
    assert!(until(|| mesh.sessions().half_open == 1).await);
    drain(&good, &mesh, true).await;
    let answer = collect(mesh.generate(request(&[7], 5)).unwrap()).await;
    assert_eq!(answer.error, None);
    assert_eq!(mesh.sessions().live, 2);
}

#[tokio::test]
async fn the_last_worker_of_a_role_is_never_left_out() {
    let both = failing(0, 6);
    let mesh = mesh_of(&[&both]).await;
    let answer = collect(mesh.generate(request(&[1], 3)).unwrap()).await;
    assert_eq!((answer.error, answer.ids.len()), (None, 3));
    assert_eq!(mesh.counters().ejections.get(), 0);
}

/// A worker that was frozen until it was given up, and is back.
async fn on_probation(worker: &MockWorker, mesh: &Mesh) {
    worker.freeze();
    assert!(until(|| mesh.sessions().lost == 1).await);
    worker.thaw();
    assert!(until(|| mesh.sessions().half_open == 1).await);
}

#[tokio::test]
async fn a_probe_whose_client_leaves_is_followed_by_another() {
    let both = worker(Role::Both);
    let mesh = mesh_of(&[&both]).await;
    on_probation(&both, &mesh).await;
    // A cancel need not be answered: nothing more is heard of the probe.
    both.faults().set(|plan| plan.untold_cancels = true);
    hold(&[&both], Some(0));
    let probe = mesh.generate(request(&[1], 3)).unwrap();
    assert!(until(|| both.counters().running == 1).await);
    drop(probe);
    assert!(until(|| both.counters().running == 0).await);
    assert_eq!(mesh.sessions().half_open, 1);
    hold(&[&both], None);
    let answer = collect(mesh.generate(request(&[2], 3)).unwrap()).await;
    assert_eq!((answer.error, answer.ids.len()), (None, 3));
    assert!(until(|| mesh.sessions().live == 1).await);
}

#[tokio::test]
async fn a_probe_that_went_on_elsewhere_is_followed_by_another() {
    let (prefill, decode) = (worker(Role::Prefill), worker(Role::Decode));
    let both = worker(Role::Both);
    let mesh = mesh_of(&[&prefill, &decode, &both]).await;
    drain(&both, &mesh, true).await;
    on_probation(&decode, &mesh).await;
    decode.faults().set(|plan| plan.untold_cancels = true);
    hold(&[&prefill], Some(0));
    hold(&[&both], Some(5));
    let mut stream = mesh.generate(request(&[1], 10)).unwrap();
    assert!(until(|| prefill.counters().running == 1 && decode.counters().running == 1).await);
    // What waited for its KV is cancelled, and the stream goes on for as long as it likes.
    drain(&both, &mesh, false).await;
    prefill.freeze();
    let mut answer = first_tokens(&mut stream).await;
    assert_eq!(both.counters().running, 1);
    drain(&both, &mesh, true).await;
    let next = collect(mesh.generate(request(&[2], 3)).unwrap()).await;
    assert_eq!((next.error, next.ids.len()), (None, 3));
    assert!(until(|| mesh.sessions().half_open == 0).await);
    hold(&[&both], None);
    answer.rest(stream).await;
    assert_eq!((answer.error, answer.ids.len()), (None, 10));
}

#[tokio::test]
async fn of_many_requests_that_wait_one_goes_to_a_worker_on_probation() {
    let (bad, good) = (failing(0, u32::MAX), worker(Role::Both));
    let mesh = mesh_of(&[&bad, &good]).await;
    until_ejected(&mesh).await;
    bad.faults().set(|plan| plan.fail_next = 0);
    hold(&[&bad], Some(0));
    drain(&good, &mesh, true).await;
    let asked = || mesh.generate(request(&[1], 3)).unwrap();
    let streams: Vec<_> = std::iter::repeat_with(asked).take(20).collect();
    assert!(until(|| bad.counters().running > 0).await);
    // Reports come, and each could let more go; what is chosen leaves at once.
    let reports = mesh.counters().load_frames.get() + 4;
    assert!(until(|| mesh.counters().load_frames.get() >= reports).await);
    assert_eq!((bad.counters().running, mesh.queued()), (1, 19));
    hold(&[&bad], None);
    for stream in streams {
        let answer = collect(stream).await;
        assert_eq!((answer.error, answer.ids.len()), (None, 3));
    }
    assert_eq!(mesh.sessions().live, 2);
}

#[tokio::test]
async fn a_stream_that_lost_its_worker_does_not_try_one_on_probation() {
    let mut workers = [slow(), slow(), worker(Role::Both)];
    let mesh = mesh_of(&workers.each_ref()).await;
    let [_, _, back] = &workers;
    back.freeze();
    assert!(until(|| mesh.sessions().lost == 1).await);
    // Both have streams: whoever gets one more is not the idlest.
    hold(&[&workers[0], &workers[1]], Some(5));
    let mut streams = Vec::new();
    while workers[..2].iter().any(|on| on.counters().running == 0) {
        let mut stream = mesh.generate(request(&[streams.len() as u32], 40)).unwrap();
        let answer = first_tokens(&mut stream).await;
        streams.push((answer, stream));
    }
    let lost = workers[0].counters().running;
    workers[2].thaw();
    assert!(until(|| mesh.sessions().half_open == 1).await);
    workers[0].kill();
    hold(&[&workers[1]], None);
    for (mut answer, stream) in streams {
        answer.rest(stream).await;
        assert_eq!((answer.error, answer.ids.len()), (None, 40));
    }
    assert_eq!(mesh.counters().migrations.died.get(), lost);
    assert_eq!(workers[2].counters().placed, 0);
    assert_eq!(mesh.sessions().half_open, 1, "{:?}", mesh.sessions());
}

#[tokio::test]
async fn a_worker_that_was_slow_before_it_failed_is_measured_anew() {
    let slow = worker(Role::Both);
    let mesh = mesh_of(&[&slow]).await;
    let a_ms = || {
        let rows = mesh.workers();
        rows[0].step_model.unwrap_or_default().a_ms
    };
    let told = a_ms();
    let twenty = Duration::from_millis(20);
    slow.faults().set(|plan| plan.say_step = Some(twenty));
    let answer = collect(mesh.generate(request(&[1], 100)).unwrap()).await;
    assert_eq!(answer.ids.len(), 100);
    assert!(a_ms() > told + 1.0, "{}", a_ms());
    on_probation(&slow, &mesh).await;
    assert!((a_ms() - told).abs() < 1e-9, "{}", a_ms());
}
