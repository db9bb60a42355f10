//! Order, dispatch and admission of what waits.

use super::*;

/// A prompt that computes for 200 ms by the mock's step model, from `first` on.
fn long(first: u32, max_tokens: u32) -> AdmittedRequest {
    let prompt: Vec<u32> = (first..first + 5_120).map(|id| id % 50).collect();
    request(&prompt, max_tokens)
}

fn of_class(class: v1::RequestClass, request: AdmittedRequest) -> AdmittedRequest {
    AdmittedRequest { class, ..request }
}

/// Steps of 20 ms, prompts that take a while.
fn slow_prompts() -> MockWorker {
    MockWorker::start(MockConfig {
        step: Duration::from_millis(20),
        prefill: Duration::from_millis(300),
        ..MockConfig::default()
    })
    .unwrap()
}

/// Room for one request of 32 tokens at a time.
fn room_for_one() -> MockWorker {
    MockWorker::start(MockConfig {
        pool_blocks: 8,
        step: Duration::from_millis(1),
        ..MockConfig::default()
    })
    .unwrap()
}

#[tokio::test]
async fn urgent_requests_leave_the_queue_first() {
    let both = room_for_one();
    let mesh = mesh_of(&[&both]).await;
    let mut first = mesh.generate(request(&[1; 32], 100_000)).unwrap();
    first_tokens(&mut first).await;
    let order = Arc::new(Mutex::new(Vec::new()));
    let classes = [
        v1::RequestClass::Batch,
        v1::RequestClass::Standard,
        v1::RequestClass::Interactive,
    ];
    let mut all = Vec::new();
    for class in classes {
        let stream = mesh
            .generate(of_class(class, request(&[2; 32], 5)))
            .unwrap();
        let order = Arc::clone(&order);
        all.push(tokio::spawn(async move {
            let answer = collect(stream).await;
            assert_eq!(answer.error, None);
            order.lock().unwrap().push(class);
        }));
    }
    assert_eq!(mesh.queued(), 3);
    drop(first);
    for one in all {
        one.await.unwrap();
    }
    let order: Vec<_> = order.lock().unwrap().clone();
    assert_eq!(order, [classes[2], classes[1], classes[0]]);
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn a_request_without_room_does_not_hold_up_those_that_have_it() {
    let both = MockWorker::start(MockConfig {
        pool_blocks: 64,
        step: Duration::from_millis(1),
        ..MockConfig::default()
    })
    .unwrap();
    let mesh = mesh_of(&[&both]).await;
    let mut first = mesh.generate(request(&[1; 32], 100_000)).unwrap();
    first_tokens(&mut first).await;
    // All of the pool: it waits for the first one's end.
    let large = tokio::spawn(collect(mesh.generate(request(&[2; 940], 5)).unwrap()));
    assert_eq!(mesh.queued(), 1);
    let small = collect(mesh.generate(request(&[3; 32], 5)).unwrap()).await;
    assert_eq!(small.error, None);
    assert_eq!((small.ids.len(), mesh.queued()), (5, 1));
    drop(first);
    assert_eq!(large.await.unwrap().ids.len(), 5);
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn a_request_stays_until_its_worker_would_start_it_or_it_would_preempt() {
    let both = slow_prompts();
    let mesh = mesh_of(&[&both]).await;
    let first = mesh.generate(long(1, 3)).unwrap();
    assert_eq!(mesh.queued(), 0);
    // As urgent and later: predicted to start in 200 ms.
    let second = mesh.generate(long(2, 3)).unwrap();
    assert_eq!(mesh.queued(), 1);
    // More urgent than what was sent: it goes before that.
    let urgent = of_class(v1::RequestClass::Interactive, long(3, 3));
    let urgent = mesh.generate(urgent).unwrap();
    assert_eq!(mesh.queued(), 1);
    for stream in [first, second, urgent] {
        let answer = collect(stream).await;
        assert_eq!((answer.error, answer.ids.len()), (None, 3));
    }
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn a_first_token_lets_the_next_one_go_where_reports_are_old() {
    let both = slow_prompts();
    hold(&[&both], Some(0));
    let mesh = mesh_of(&[&both]).await;
    let first = mesh.generate(long(1, 100_000)).unwrap();
    let shown = || {
        let loads = mesh.workers().into_iter().filter_map(|worker| worker.load);
        loads.filter_map(|load| load.own).any(|own| own.queued == 1)
    };
    assert!(until(shown).await, "no report shows the first prompt");
    let second = mesh.generate(long(2, 3)).unwrap();
    assert_eq!(mesh.queued(), 1);
    // From now on every report shows the first prompt as waiting.
    both.faults().set(|plan| {
        plan.old_loads = true;
        plan.hold_at = None;
    });
    let answer = collect(second).await;
    assert_eq!((answer.error, answer.ids.len()), (None, 3));
    assert!(shown(), "a true report came");
    drop(first);
    both.faults().set(|plan| plan.old_loads = false);
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

/// The first message of a stream, and the id in it.
async fn accepted(stream: &mut GenerationStream) -> (Answer, String) {
    let mut answer = Answer::default();
    answer.take(stream.next().await.unwrap());
    let id = answer.accepted.as_ref().unwrap().generation_id.clone();
    (answer, id)
}

/// What is known of a generation that was tried and waits; while it is being
/// tried once more it does not.
async fn explained_wait(mesh: &Mesh, id: &str) -> v1::ExplainResponse {
    let end = Instant::now() + LIMIT;
    loop {
        match mesh.explain(id) {
            Some(known) if known.waiting.as_ref().is_some_and(|wait| wait.tries > 0) => {
                return known;
            }
            known => assert!(Instant::now() < end, "it does not wait: {known:?}"),
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_wait_in_the_router_is_explained_while_it_lasts_and_afterwards() {
    let both = slow_prompts();
    hold(&[&both], Some(0));
    let mesh = mesh_of(&[&both]).await;
    let first = mesh.generate(long(1, 3)).unwrap();
    let mut second = mesh.generate(long(2, 3)).unwrap();
    assert_eq!(mesh.queued(), 1);
    let (mut answer, id) = accepted(&mut second).await;
    let now = explained_wait(&mesh, &id).await;
    let waiting = now.waiting.unwrap();
    assert!(now.decisions.is_empty() && now.predicted_wait_ms > 0.0);
    assert!(waiting.ms > 0.0, "{waiting:?}");
    assert_eq!(waiting.reason, "its worker would not start it soon");
    hold(&[&both], None);
    answer.rest(second).await;
    assert_eq!(answer.error, None);
    let then = mesh.explain(&id).unwrap();
    let waited = then.decisions[0].waited.clone().unwrap();
    assert_eq!(then.waiting, None);
    assert_eq!(then.predicted_wait_ms, now.predicted_wait_ms);
    assert!(
        waited.ms > waiting.ms && waited.tries >= waiting.tries,
        "{waited:?}"
    );
    assert_eq!(waited.reason, waiting.reason);
    // The first one found the worker idle.
    let first = collect(first).await.accepted.unwrap().generation_id;
    let went = mesh.explain(&first).unwrap().decisions.remove(0);
    let at_once = went.waited.unwrap();
    assert_eq!((at_once.tries, at_once.reason.as_str()), (0, ""));
    assert!(at_once.ms <= went.at_ms, "{at_once:?}");
}

#[tokio::test]
async fn what_waits_for_room_says_so() {
    let both = room_for_one();
    let mesh = mesh_of(&[&both]).await;
    let mut first = mesh.generate(request(&[1; 32], 100_000)).unwrap();
    first_tokens(&mut first).await;
    let mut second = mesh.generate(request(&[2; 32], 5)).unwrap();
    let (mut answer, id) = accepted(&mut second).await;
    let waiting = explained_wait(&mesh, &id).await.waiting.unwrap();
    assert_eq!(waiting.reason, "no worker has room");
    drop(first);
    answer.rest(second).await;
    assert_eq!((answer.error, answer.ids.len()), (None, 5));
}

#[tokio::test]
async fn who_would_wait_too_long_is_told_when_to_come_back() {
    let both = slow_prompts();
    let bound = MeshSettings {
        queue_timeout: Duration::from_millis(100),
        ..settings(&[&both])
    };
    let mesh = mesh_with(bound).await;
    let first = mesh.generate(long(1, 3)).unwrap();
    let Some(RequestError::Overloaded { retry_after, .. }) = mesh.generate(long(2, 3)).err() else {
        panic!("it was let in")
    };
    // Predicted are what is left of a step of 20 ms, and 200 ms of the prompt;
    // 100 are allowed.
    let left = Duration::from_millis(100)..=Duration::from_millis(120);
    assert!(left.contains(&retry_after), "{retry_after:?}");
    assert_eq!(collect(first).await.error, None);
    assert_eq!(
        collect(mesh.generate(long(2, 3)).unwrap()).await.error,
        None
    );
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn a_deadline_that_cannot_be_met_is_refused_at_entry() {
    let both = slow_prompts();
    let mesh = mesh_of(&[&both]).await;
    let deadline = Some(Instant::now() + Duration::from_millis(150));
    let hurried = AdmittedRequest {
        deadline,
        ..long(1, 3)
    };
    // RESOURCE_EXHAUSTED, with the time that is missing (PROTOCOLS 5).
    let refused = mesh.generate(hurried).err();
    let Some(RequestError::Overloaded { retry_after, .. }) = refused else {
        panic!("it was let in: {refused:?}")
    };
    assert!(retry_after >= Duration::from_millis(100));
    assert_eq!(both.counters().placed, 0);
}

#[tokio::test]
async fn a_deadline_is_looked_at_again_when_it_could_go() {
    // 4 s of work by the mock's step model, and room for it alone.
    let prompt: Vec<u32> = (0..102_400).map(|id| id % 50).collect();
    let both = MockWorker::start(MockConfig {
        pool_blocks: (102_400 + 64) / 16,
        step: Duration::from_millis(20),
        ..MockConfig::default()
    })
    .unwrap();
    let mesh = mesh_of(&[&both]).await;
    let mut first = mesh.generate(request(&[1; 32], 100_000)).unwrap();
    first_tokens(&mut first).await;
    let deadline = Instant::now() + Duration::from_secs(6);
    let hurried = AdmittedRequest {
        deadline: Some(deadline),
        ..request(&prompt, 3)
    };
    let hurried = mesh.generate(hurried).unwrap();
    assert_eq!(mesh.queued(), 1);
    // Room comes when it is too late for the first token, and not for the client.
    tokio::time::sleep_until((deadline - Duration::from_millis(3_500)).into()).await;
    drop(first);
    let ended = collect(hurried).await.error;
    assert!(
        matches!(ended, Some(RequestError::Overloaded { .. })),
        "{ended:?}"
    );
    assert_eq!(both.counters().placed, 1);
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn who_waits_for_a_decode_worker_goes_when_it_has_time() {
    let decode = MockWorker::start(MockConfig {
        role: Role::Decode,
        step: Duration::from_millis(20),
        prefill: Duration::from_millis(300),
        ..MockConfig::default()
    })
    .unwrap();
    let shipped = MeshSettings {
        policy: PolicySettings::default(),
        ..settings(&[&decode])
    };
    let mesh = mesh_with(shipped).await;
    let streams: Vec<_> = (1..4)
        .map(|first| mesh.generate(long(first, 3)).unwrap())
        .collect();
    assert_eq!(mesh.queued(), 2);
    for stream in streams {
        assert_eq!(collect(stream).await.error, None);
    }
    assert!(until(|| nothing_left(&mesh, &[&decode])).await);
}

#[tokio::test]
async fn a_full_queue_refuses_new_work() {
    let both = slow_prompts();
    let bound = MeshSettings {
        queue_length: 1,
        ..settings(&[&both])
    };
    let mesh = mesh_with(bound).await;
    let running = mesh.generate(long(1, 3)).unwrap();
    let waiting = mesh.generate(long(2, 3)).unwrap();
    assert_eq!(mesh.queued(), 1);
    assert!(matches!(
        mesh.generate(long(3, 3)).err(),
        Some(RequestError::Overloaded { .. })
    ));
    for stream in [running, waiting] {
        assert_eq!(collect(stream).await.error, None);
    }
}

#[tokio::test]
async fn who_leaves_while_waiting_takes_nobodys_place_from_then_on() {
    let both = slow_prompts();
    let bound = MeshSettings {
        queue_length: 1,
        ..settings(&[&both])
    };
    let mesh = mesh_with(bound).await;
    let running = mesh.generate(long(1, 3)).unwrap();
    // Nothing is awaited meanwhile, so that no sweep can have made room.
    for client in 2..5 {
        let waiting = mesh.generate(long(client, 3)).unwrap();
        assert_eq!(mesh.queued(), 1);
        drop(waiting);
        assert_eq!(mesh.queued(), 0);
    }
    assert_eq!(collect(running).await.error, None);
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn what_is_turned_away_for_want_of_room_came_all_the_same() {
    // Ten steps of a prompt take longer there than any deadline. None comes so far.
    let both = MockWorker::start(MockConfig {
        step: LIMIT / 4,
        ..MockConfig::default()
    })
    .unwrap();
    let bound = MeshSettings {
        queue_length: 0,
        queue_timeout: Duration::from_secs(3_600),
        ..settings(&[&both])
    };
    let mesh = mesh_with(bound).await;
    let at_once = AdmittedRequest {
        deadline: Some(Instant::now() + LIMIT),
        ..of_class(v1::RequestClass::Interactive, long(2, 3))
    };
    let never = request(&vec![1; 1 << 20], 3);
    assert!(matches!(
        mesh.generate(long(1, 3)).err(),
        Some(RequestError::Overloaded { .. })
    ));
    assert!(matches!(
        mesh.generate(at_once).err(),
        Some(RequestError::Overloaded { .. })
    ));
    assert!(matches!(
        mesh.generate(never).err(),
        Some(RequestError::PromptTooLong { .. })
    ));
    let demand = mesh.core.pools.demands()["mock"];
    assert_eq!(demand.requests, [1.0, 1.0, 0.0]);
    for class in 0..2 {
        assert!(demand.prompt_ms[class] > 100.0, "{demand:?}");
        let output = demand.output_tokens[class];
        let attended = output * (5_120.0 + output / 2.0);
        assert!(output > 0.0, "{demand:?}");
        assert_eq!(demand.attended_tokens[class], attended);
    }
}

/// Room for one request of 64 tokens at a time.
fn narrow(model: &str, digest: &str) -> MockWorker {
    MockWorker::start(MockConfig {
        model: model.to_owned(),
        model_digest: digest.repeat(64),
        pool_blocks: 8,
        step: Duration::from_millis(1),
        ..MockConfig::default()
    })
    .unwrap()
}

#[tokio::test]
async fn a_model_does_not_wait_for_another_ones_queue() {
    let (full, free) = (narrow("mock", "0"), narrow("other", "1"));
    let mesh = mesh_of(&[&full, &free]).await;
    let both = || mesh.models().iter().filter(|model| model.ready).count() == 2;
    assert!(until(both).await);
    let other = |max_tokens| AdmittedRequest {
        model: "other".to_owned(),
        ..request(&[3; 64], max_tokens)
    };
    let mut first = mesh.generate(request(&[1; 64], 100_000)).unwrap();
    first_tokens(&mut first).await;
    let mut of_other = mesh.generate(other(100_000)).unwrap();
    first_tokens(&mut of_other).await;
    // 64 with earlier keys, then one whose worker will soon have room.
    let waiting: Vec<_> = (0..64)
        .map(|_| mesh.generate(request(&[2; 64], 5)).unwrap())
        .collect();
    let last = mesh.generate(other(5)).unwrap();
    assert_eq!(mesh.queued(), 65);
    drop(of_other);
    let answer = collect(last).await;
    assert_eq!((answer.error, answer.ids.len()), (None, 5));
    assert_eq!(mesh.queued(), 64);
    drop((first, waiting));
    assert!(until(|| nothing_left(&mesh, &[&full, &free])).await);
}

#[tokio::test]
async fn a_full_queue_is_one_of_a_model_and_of_those_as_urgent() {
    let (full, free) = (narrow("mock", "0"), narrow("other", "1"));
    let bound = MeshSettings {
        queue_length: 2,
        ..settings(&[&full, &free])
    };
    let mesh = mesh_with(bound).await;
    let both = || mesh.models().iter().filter(|model| model.ready).count() == 2;
    assert!(until(both).await);
    let asks = |class, model: &str| {
        mesh.generate(AdmittedRequest {
            model: model.to_owned(),
            ..of_class(class, request(&[2; 64], 5))
        })
    };
    let mut running = Vec::new();
    for model in ["mock", "other"] {
        let asked = AdmittedRequest {
            model: model.to_owned(),
            ..request(&[1; 64], 100_000)
        };
        let mut stream = mesh.generate(asked).unwrap();
        first_tokens(&mut stream).await;
        running.push(stream);
    }
    use v1::RequestClass::{Batch, Interactive, Standard};
    let mut waiting = Vec::new();
    // Each class finds room whatever of less urgent ones waits; then it is full, too.
    for (class, fits) in [(Batch, 2), (Standard, 2), (Interactive, 2)] {
        waiting.extend((0..fits).map(|_| asks(class, "mock").unwrap()));
        let refused = asks(class, "mock").err();
        let Some(RequestError::Overloaded { reason, .. }) = refused else {
            panic!("{class:?}: {refused:?}");
        };
        assert_eq!(reason, "the queue is full");
    }
    assert_eq!(mesh.queued(), 6);
    // The backlog of one model is no other one's.
    waiting.push(asks(Batch, "other").unwrap());
    drop(running);
    for stream in waiting {
        let answer = collect(stream).await;
        assert_eq!((answer.error, answer.ids.len()), (None, 5));
    }
    assert!(until(|| nothing_left(&mesh, &[&full, &free])).await);
}

#[tokio::test]
async fn who_can_be_run_by_nobody_any_more_is_told_so_at_once() {
    let both = worker(Role::Both);
    let mesh = mesh_of(&[&both]).await;
    both.faults().set(|plan| {
        plan.refuse_next = u32::MAX;
        plan.refuse_reason = v1::RefusalReason::Unsupported;
    });
    let refused = collect(mesh.generate(request(&[1; 32], 5)).unwrap()).await;
    let why = refused.error;
    assert!(
        matches!(why, Some(RequestError::Unsupported { .. })),
        "{why:?}"
    );
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}
