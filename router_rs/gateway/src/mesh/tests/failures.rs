//! What breaks, refuses or stands still.

use kvmesh_session::WorkerIndex;

use super::*;

/// A worker whose next so many attempts fail at an index.
pub(super) fn failing(at: u32, times: u32) -> MockWorker {
    let worker = worker(Role::Both);
    worker.faults().set(|plan| {
        plan.fail_at = Some(at);
        plan.fail_next = times;
        plan.fail_code = tonic::Code::Unavailable as u32;
    });
    worker
}

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
async fn a_refusal_makes_a_request_no_more_urgent_and_a_failure_does() {
    let both = worker(Role::Both);
    let mesh = mesh_of(&[&both]).await;
    let asked = |token| AdmittedRequest {
        class: v1::RequestClass::Batch,
        ..request(&[token], 5)
    };
    let urgency_ms = async |token| {
        let answer = collect(mesh.generate(asked(token)).unwrap()).await;
        assert_eq!((answer.error, answer.ids.len()), (None, 5));
        assert_eq!(answer.finished.unwrap().usage.unwrap().attempts, 2);
        let place = both.last_place().unwrap();
        place.continuation.unwrap().virtual_deadline_ms
    };
    both.faults().set(|plan| plan.refuse_next = 1);
    // 30 s after its arrival: what its class has.
    let refused_ms = urgency_ms(1).await;
    assert!(refused_ms > 1_000.0, "{refused_ms}");
    both.faults().set(|plan| {
        plan.return_at = Some(2);
        plan.return_next = 1;
    });
    let begun_ms = urgency_ms(2).await;
    assert!(begun_ms <= 0.0, "{begun_ms}");
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

/// A worker of which streams can be lost in the middle: a step takes 5 ms.
pub(super) fn slow() -> MockWorker {
    slow_as(Role::Both)
}

fn slow_as(role: Role) -> MockWorker {
    MockWorker::start(MockConfig {
        role,
        step: Duration::from_millis(5),
        ..MockConfig::default()
    })
    .unwrap()
}

#[tokio::test]
async fn a_stream_goes_on_elsewhere_when_its_worker_is_killed() {
    let mut workers = [slow(), slow()];
    hold(&workers.each_ref(), Some(5));
    let mesh = mesh_of(&[&workers[0], &workers[1]]).await;
    let mut stream = mesh.generate(request(&[1, 2], 400)).unwrap();
    let mut answer = first_tokens(&mut stream).await;
    let on = usize::from(workers[1].counters().running > 0);
    workers[on].kill();
    hold(&[&workers[1 - on]], None);
    answer.rest(stream).await;
    assert_eq!(answer.error, None);
    assert_eq!(answer.ids, workers[0].tokens().expected(&[1, 2], 400));
    let usage = answer.finished.unwrap().usage.unwrap();
    assert_eq!((usage.output_tokens, usage.attempts), (400, 2));
    assert!(usage.recomputed_tokens > 0, "{usage:?}");
    let counters = mesh.counters();
    assert_eq!(counters.migrations.died.get(), 1);
    assert_eq!(counters.moved_gaps.get(), 1);
    assert_eq!(counters.failed.get(), 0);
    assert!(until(|| nothing_left(&mesh, &[&workers[1 - on]])).await);
}

#[tokio::test]
async fn without_another_worker_a_stream_ends_with_the_next_index() {
    let mut both = slow();
    let bound = MeshSettings {
        queue_timeout: Duration::from_millis(100),
        ..settings(&[&both])
    };
    let mesh = mesh_with(bound).await;
    let mut stream = mesh.generate(request(&[1, 2], 100_000)).unwrap();
    let mut answer = first_tokens(&mut stream).await;
    both.kill();
    answer.rest(stream).await;
    let Some(RequestError::WorkerLost { next_index, .. }) = answer.error else {
        panic!("{:?}", answer.error)
    };
    assert_eq!(next_index as usize, answer.ids.len());
    assert_eq!(mesh.booked(), 0);
    let refused = mesh.generate(request(&[1], 5)).err();
    assert!(
        matches!(refused, Some(RequestError::NoWorker(_))),
        "{refused:?}"
    );
}

/// Runs a stream on two workers, of which the one that has it is disturbed and
/// put right again; gives the mesh, the one that was, and the other.
pub(super) async fn survives(
    disturb: impl Fn(&MockWorker),
    heal: impl Fn(&MockWorker),
) -> (Arc<Mesh>, [MockWorker; 2]) {
    let [one, two] = [slow(), slow()];
    let mesh = mesh_of(&[&one, &two]).await;
    let mut stream = mesh.generate(request(&[1, 2], 1_000)).unwrap();
    let mut answer = first_tokens(&mut stream).await;
    let (lost, other) = match one.counters().running {
        0 => (two, one),
        _ => (one, two),
    };
    disturb(&lost);
    assert!(until(|| other.counters().running > 0).await);
    assert_eq!(mesh.counters().migrations.silent.get(), 1);
    // It comes back while the stream runs elsewhere.
    heal(&lost);
    answer.rest(stream).await;
    assert_eq!(answer.error, None);
    assert_eq!(answer.ids, other.tokens().expected(&[1, 2], 1_000));
    // What it held from before was cancelled.
    assert!(until(|| nothing_left(&mesh, &[&lost, &other])).await);
    (mesh, [lost, other])
}

#[tokio::test]
async fn errors_of_the_clients_own_leave_nobody_out() {
    let workers = [failing(0, u32::MAX), failing(0, u32::MAX)];
    for worker in &workers {
        let own = tonic::Code::InvalidArgument as u32;
        worker.faults().set(|plan| plan.fail_code = own);
    }
    let mesh = mesh_of(&[&workers[0], &workers[1]]).await;
    for n in 0..20 {
        let answer = collect(mesh.generate(request(&[n], 3)).unwrap()).await;
        assert!(answer.error.is_some());
    }
    assert_eq!(mesh.counters().ejections.get(), 0);
    assert_eq!(mesh.sessions().live, 2);
}

#[tokio::test]
async fn a_stuck_engine_under_beating_loads_loses_its_streams() {
    let stick = |stuck| move |worker: &MockWorker| worker.faults().set(|plan| plan.stuck = stuck);
    survives(stick(true), stick(false)).await;
}

#[tokio::test]
async fn a_hole_closes_the_session_and_the_stream_goes_on() {
    let both = worker(Role::Both);
    both.faults().set(|plan| plan.hole_at = Some(3));
    let mesh = mesh_of(&[&both]).await;
    let mut stream = mesh.generate(request(&[1], 10)).unwrap();
    let mut answer = first_tokens(&mut stream).await;
    assert!(until(|| mesh.counters().violations.get() > 0).await);
    both.faults().set(|plan| plan.hole_at = None);
    answer.rest(stream).await;
    assert_eq!(answer.error, None);
    assert_eq!(answer.ids, both.tokens().expected(&[1], 10));
    assert!(both.counters().sessions_opened >= 2);
}

#[tokio::test]
async fn attempts_that_fail_again_and_again_end_the_request() {
    let both = failing(4, 1_000);
    let mesh = mesh_of(&[&both]).await;
    let answer = collect(mesh.generate(request(&[1], 10)).unwrap()).await;
    let Some(RequestError::WorkerLost { next_index, .. }) = answer.error else {
        panic!("{:?}", answer.error)
    };
    assert_eq!((next_index, answer.ids.len()), (4, 4));
    assert_eq!(both.counters().failed, 8);
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

#[tokio::test]
async fn over_the_bound_of_all_who_holds_more_than_its_share_is_given_up() {
    let config = MockConfig {
        step: Duration::from_millis(1),
        ..MockConfig::default()
    };
    let both = MockWorker::start(config).unwrap();
    let bound = MeshSettings {
        // So much that who reads is far from it, also where its reading is held up.
        undelivered_ids: 3_000,
        slow_client_timeout: Duration::from_secs(3_600),
        ..settings(&[&both])
    };
    let mesh = mesh_with(bound).await;
    let mut idle = mesh.generate(request(&[9], 1_000_000)).unwrap();
    let mut answer = first_tokens(&mut idle).await;
    let readers: Vec<_> = (1..3)
        .map(|n| tokio::spawn(collect(mesh.generate(request(&[n], 5_000)).unwrap())))
        .collect();
    assert!(until(|| mesh.counters().slow_clients.get() == 1).await);
    // It came of what it left unread: those who read go on.
    for reader in readers {
        let answer = reader.await.unwrap();
        assert_eq!((answer.error, answer.ids.len()), (None, 5_000));
    }
    answer.rest(idle).await;
    let Some(RequestError::SlowClient { next_index }) = answer.error else {
        panic!("{:?}", answer.error)
    };
    // What was dropped is lacking, though it was made.
    assert_eq!(next_index as usize, answer.ids.len());
    assert_eq!(mesh.counters().slow_clients.get(), 1);
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn an_attempt_that_is_put_off_is_explained() {
    let both = failing(0, 6);
    let mesh = mesh_of(&[&both]).await;
    let stream = mesh.generate(request(&[2], 3)).unwrap();
    let id = stream.id();
    let waits = || mesh.explain(&id)?.waiting;
    let put_off = || waits().is_some_and(|now| now.reason.starts_with("put off after "));
    assert!(until(put_off).await);
    let answer = collect(stream).await;
    assert_eq!((answer.error, answer.ids.len()), (None, 3));
    assert_eq!(waits(), None);
    // That time is part of its wait: the third attempt is put off for 12.5 ms at least,
    // those after it for longer.
    let told = mesh.explain(&id).unwrap();
    let waited = |decision: &v1::Decision| decision.waited.as_ref().unwrap().ms;
    let waited: Vec<f64> = told.decisions.iter().map(waited).collect();
    assert_eq!(waited.len(), 7);
    assert!(waited[2..].iter().all(|ms| *ms >= 12.5), "{waited:?}");
}

/// A waker that panics: a bug in what the task that wakes it runs. Does
/// something before, in that task.
struct Bomb<F>(F);

impl<F: Fn() + Send + Sync> std::task::Wake for Bomb<F> {
    fn wake(self: Arc<Self>) {
        self.0();
        panic!("a bug");
    }
}

/// Takes what is there; the task that brings the next token panics.
fn bomb(
    stream: &mut GenerationStream,
    answer: &mut Answer,
    before: impl Fn() + Send + Sync + 'static,
) {
    let waker = Arc::new(Bomb(before)).into();
    let mut cx = std::task::Context::from_waker(&waker);
    while let std::task::Poll::Ready(item) = stream.poll_next_unpin(&mut cx) {
        answer.take(item.expect("it goes on"));
    }
}

#[tokio::test]
async fn a_panic_of_a_sessions_task_costs_no_stream() {
    let both = slow();
    let mesh = mesh_of(&[&both]).await;
    let mut streams = Vec::new();
    for n in 0..4 {
        let mut stream = mesh.generate(request(&[n, n], 1_000)).unwrap();
        let answer = first_tokens(&mut stream).await;
        streams.push((stream, answer));
    }
    // Again and again: the task is there each time.
    for panics in 1..=3 {
        let (stream, answer) = &mut streams[0];
        bomb(stream, answer, || {});
        assert!(until(|| mesh.counters().session_panics.get() == panics).await);
        assert!(until(|| mesh.sessions().live == 1).await);
        // It is placed anew; the others, too.
        let (stream, answer) = &mut streams[0];
        let before = answer.ids.len();
        while answer.ids.len() == before {
            let item = tokio::time::timeout(LIMIT, stream.next()).await.unwrap();
            answer.take(item.expect("it goes on"));
        }
    }
    for (n, (stream, mut answer)) in (0..).zip(streams) {
        answer.rest(stream).await;
        assert_eq!(answer.error, None);
        assert_eq!(answer.ids, both.tokens().expected(&[n, n], 1_000));
    }
    assert!(mesh.counters().migrations.broken.get() >= 4);
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn what_a_panicked_session_had_not_sent_is_lost_with_it() {
    let both = slow();
    let patient = MeshSettings {
        answer_timeout: Duration::from_secs(3_600),
        ..settings(&[&both])
    };
    let mesh = mesh_with(patient).await;
    let mut first = mesh.generate(request(&[1], 1_000)).unwrap();
    let mut answer = first_tokens(&mut first).await;
    let second = Arc::new(Mutex::new(None));
    let place = {
        let (mesh, second) = (Arc::clone(&mesh), Arc::clone(&second));
        move || *second.lock().unwrap() = mesh.generate(request(&[2], 20)).ok()
    };
    // Placed by the task itself, which panics before it sends anything.
    bomb(&mut first, &mut answer, place);
    assert!(until(|| mesh.counters().session_panics.get() == 1).await);
    let second = second.lock().unwrap().take().expect("it was placed");
    let placed = collect(second).await;
    assert_eq!(placed.ids, both.tokens().expected(&[2], 20));
    assert_eq!(placed.finished.unwrap().usage.unwrap().attempts, 2);
    answer.rest(first).await;
    assert_eq!(answer.ids, both.tokens().expected(&[1], 1_000));
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn a_generation_whose_machine_panicked_ends_for_all_who_know_of_it() {
    let (prefill, decode) = (worker(Role::Prefill), slow_as(Role::Decode));
    let mesh = mesh_of(&[&prefill, &decode]).await;
    let mut stream = mesh.generate(request(&[1, 2], 100_000)).unwrap();
    let mut answer = first_tokens(&mut stream).await;
    let open = mesh.core.all_open().remove(0);
    open.abandon(Some(WorkerIndex(0)));
    assert_eq!(mesh.booked(), 0);
    answer.rest(stream).await;
    let Some(RequestError::WorkerLost { next_index, .. }) = answer.error else {
        panic!("{:?}", answer.error)
    };
    assert_eq!(next_index as usize, answer.ids.len());
    assert!(until(|| nothing_left(&mesh, &[&prefill, &decode])).await);
    assert_eq!(decode.counters().cancelled, 1);
}

#[tokio::test]
async fn timers_outlive_a_panic_of_their_task() {
    // Nothing but its deadline wakes a client.
    let stuck = worker(Role::Both);
    stuck.faults().set(|plan| plan.stuck = true);
    let mesh = mesh_of(&[&stuck]).await;
    let mut streams = Vec::new();
    for n in 1..=3 {
        let asked = AdmittedRequest {
            deadline: Some(Instant::now() + Duration::from_millis(1_500 * u64::from(n))),
            ..request(&[n], 10)
        };
        streams.push(mesh.generate(asked).unwrap());
    }
    for (panics, mut stream) in (1..).zip(streams) {
        let mut answer = Answer::default();
        bomb(&mut stream, &mut answer, || {});
        assert!(until(|| mesh.counters().task_panics.get() == panics).await);
        answer.rest(stream).await;
        let late = RequestError::DeadlineExceeded { next_index: 0 };
        assert_eq!(answer.error, Some(late));
    }
    assert!(until(|| nothing_left(&mesh, &[&stuck])).await);
}

#[tokio::test]
async fn a_path_for_kv_that_heals_while_attempts_wait_costs_no_stream() {
    let (prefill, decode) = (worker(Role::Prefill), worker(Role::Decode));
    let mesh = mesh_of(&[&prefill, &decode]).await;
    decode.faults().set(|plan| plan.fail_pulls = true);
    let stream = mesh.generate(request(&[1, 2], 5)).unwrap();
    let answer = tokio::spawn(collect(stream));
    assert!(until(|| mesh.counters().transfers_failed.get() >= 5).await);
    // Three are left, and none of them has begun.
    decode.faults().set(|plan| plan.fail_pulls = false);
    let answer = answer.await.unwrap();
    assert_eq!(answer.error, None);
    assert_eq!(answer.ids, decode.tokens().expected(&[1, 2], 5));
    assert!(until(|| nothing_left(&mesh, &[&prefill, &decode])).await);
}

#[tokio::test]
async fn a_client_that_leaves_while_its_attempt_is_put_off_leaves_nothing() {
    let (prefill, decode) = (worker(Role::Prefill), worker(Role::Decode));
    let mesh = mesh_of(&[&prefill, &decode]).await;
    decode.faults().set(|plan| plan.fail_pulls = true);
    let stream = mesh.generate(request(&[1, 2], 5)).unwrap();
    assert!(until(|| mesh.counters().transfers_failed.get() >= 5).await);
    drop(stream);
    assert!(until(|| nothing_left(&mesh, &[&prefill, &decode])).await);
    assert_eq!(mesh.counters().cancelled.get(), 1);
}
