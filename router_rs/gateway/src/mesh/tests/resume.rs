//! A stream that its client lost and takes up again, where this router has it.

use kvmesh_session::GenerationId;

use super::*;
use crate::mesh::{
    continuation::{continuation, resume_state, tenant_name},
    resume::{PANICS_IN_ITS_TAKEOVER, ResumeAsked},
};

fn resumable(prompt: &[u32], tokens: u32) -> AdmittedRequest {
    AdmittedRequest {
        resumable: true,
        ..request(prompt, tokens)
    }
}

fn asked(stream: &GenerationStream, had: &[u32]) -> ResumeAsked {
    ResumeAsked {
        id: GenerationId::from_hex(&stream.id()).unwrap(),
        ..super::super::resume::asked_for(had.len() as u32, had)
    }
}

fn slow(role: Role) -> MockWorker {
    let step = Duration::from_millis(2);
    MockWorker::start(MockConfig {
        role,
        step,
        ..MockConfig::default()
    })
    .unwrap()
}

/// What a stream brings from `had` on, and how it ends.
async fn after(had: &[u32], stream: GenerationStream) -> Answer {
    let mut answer = Answer {
        ids: had.to_vec(),
        ..Answer::default()
    };
    answer.rest(stream).await;
    answer
}

#[tokio::test]
async fn the_stream_that_asked_last_has_it() {
    let both = slow(Role::Both);
    hold(&[&both], Some(5));
    let mesh = mesh_of(&[&both]).await;
    let mut first = mesh.generate(resumable(&[1, 2], 200)).unwrap();
    let begun = first_tokens(&mut first).await;
    let second = mesh
        .resume(asked(&first, &begun.ids), || true)
        .await
        .unwrap();
    hold(&[&both], None);
    let (old, new) = tokio::join!(after(&begun.ids, first), after(&begun.ids, second));
    let taken_over = matches!(old.error, Some(RequestError::TakenOver { next_index })
        if next_index as usize == old.ids.len());
    assert!(taken_over, "{:?}", old.error);
    assert_eq!(new.error, None);
    assert_eq!(new.ids, both.tokens().expected(&[1, 2], 200));
    assert_eq!(new.finished.unwrap().usage.unwrap().output_tokens, 200);
    assert_eq!(mesh.counters().resumed.here.get(), 1);
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn one_whose_connection_is_gone_goes_on_for_a_while() {
    let both = slow(Role::Both);
    let mesh = mesh_of(&[&both]).await;
    let mut first = mesh.generate(resumable(&[1, 2], 60)).unwrap();
    let begun = first_tokens(&mut first).await;
    let asked = asked(&first, &begun.ids);
    first.leave(None);
    drop(first);
    // It is made to its end meanwhile.
    assert!(until(|| both.counters().finished == 1).await);
    let second = mesh.resume(asked, || true).await.unwrap();
    let whole = after(&begun.ids, second).await;
    assert_eq!(whole.ids, both.tokens().expected(&[1, 2], 60));
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn nobody_is_waited_for_beyond_that_while() {
    let both = slow(Role::Both);
    let mesh = mesh_with(MeshSettings {
        orphan_timeout: Duration::from_millis(1),
        ..settings(&[&both])
    })
    .await;
    let mut first = mesh.generate(resumable(&[1, 2], 1_000_000)).unwrap();
    let begun = first_tokens(&mut first).await;
    let asked = asked(&first, &begun.ids);
    first.leave(None);
    drop(first);
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
    assert_eq!(mesh.counters().cancelled.get(), 1);
    let gone = mesh.resume(asked, || true).await.map(|_| ());
    assert_eq!(gone, Err(RequestError::UnknownGeneration));
}

#[tokio::test]
async fn what_cannot_be_had_is_unknown_and_undisturbed() {
    let both = MockWorker::start(MockConfig {
        step: Duration::from_millis(2),
        max_logprobs: 1,
        ..MockConfig::default()
    })
    .unwrap();
    let mesh = mesh_of(&[&both]).await;
    let logprobs = AdmittedRequest {
        logprobs: Some(0),
        ..resumable(&[1, 2], 100)
    };
    for (request, had_all) in [
        (resumable(&[1, 2], 100), true),
        (request(&[1, 2], 100), false),
        (logprobs, false),
    ] {
        let mut stream = mesh.generate(request).unwrap();
        let begun = first_tokens(&mut stream).await;
        let fits = asked(&stream, &begun.ids);
        let foreign = ResumeAsked {
            tenant: 9,
            ..fits.clone()
        };
        let ahead = ResumeAsked {
            next_index: 101,
            token_ids: Vec::new().into(),
            ..fits.clone()
        };
        let mut another = fits.clone();
        let mut ids = another.token_ids.to_vec();
        ids[0] += 1;
        another.token_ids = ids.into();
        let mut wrong = vec![foreign, ahead, another];
        if !had_all {
            wrong.push(fits);
        }
        let refused = wrong.len() as u64;
        let before = mesh.counters().resumed.unknown.get();
        for asked in wrong {
            let refused = mesh.resume(asked, || true).await.map(|_| ());
            assert_eq!(refused, Err(RequestError::UnknownGeneration));
        }
        assert_eq!(mesh.counters().resumed.unknown.get(), before + refused);
        let whole = after(&begun.ids, stream).await;
        assert_eq!((whole.error, whole.ids.len()), (None, 100));
    }
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn workers_that_know_nothing_of_it_are_asked_and_nothing_is_left_of_that() {
    let (prefill, decode) = (worker(Role::Prefill), worker(Role::Decode));
    let mesh = mesh_of(&[&prefill, &decode]).await;
    for _ in 0..3 {
        let asked = super::super::resume::asked_for(0, &[]);
        let refused = mesh.resume(asked, || true).await.map(|_| ());
        assert_eq!(refused, Err(RequestError::UnknownGeneration));
    }
    assert!(nothing_left(&mesh, &[&prefill, &decode]));
    // Two at once are one too many, and neither stays.
    let one = || mesh.resume(super::super::resume::asked_for(0, &[]), || true);
    let (first, second) = tokio::join!(one(), one());
    assert_eq!(first.map(|_| ()), Err(RequestError::UnknownGeneration));
    let contested = second.map(|_| ());
    assert!(matches!(contested, Err(RequestError::NotYet { .. })));
    let again = one().await.map(|_| ());
    assert_eq!(again, Err(RequestError::UnknownGeneration));
}

#[tokio::test]
async fn a_router_that_ends_cancels_nothing_that_others_may_resume() {
    for (request, cancelled) in [(request(&[1, 2], 5_000), 1), (resumable(&[1, 2], 5_000), 0)] {
        let both = slow(Role::Both);
        let mesh = mesh_of(&[&both]).await;
        let mut stream = mesh.generate(request).unwrap();
        first_tokens(&mut stream).await;
        mesh.shutdown(Duration::ZERO).await;
        let mut answer = Answer {
            ids: (0..stream.delivered()).collect(),
            ..Answer::default()
        };
        answer.rest(stream).await;
        assert!(matches!(
            answer.error,
            Some(RequestError::ShuttingDown { .. })
        ));
        // A mock keeps nothing for a router that is gone; it was told nothing all the same.
        assert!(until(|| both.counters().running == 0).await);
        assert!(both.counters().cancelled <= cancelled);
    }
}

const HAD: usize = 5;

/// A worker that has a generation of 200 tokens which another router left after the first
/// few, and all its tokens.
fn leaves(model: &str) -> (MockWorker, Vec<u32>) {
    let all = worker(Role::Both).tokens().expected(&[1, 2], 200);
    let was = resumable(&[1, 2], 200);
    let placed = continuation(&was, &all[..HAD], 2_000.0, was.arrived);
    let left = v1::Place {
        generation: vec![7; 16].into(),
        owner: 1,
        attempt: 1,
        stage: v1::Stage::Whole.into(),
        tenant: tenant_name(0),
        resume_state: resume_state(&was, &placed),
        continuation: Some(v1::Continuation {
            model: model.to_owned(),
            ..placed
        }),
        ..v1::Place::default()
    };
    let worker = MockWorker::start(MockConfig {
        step: Duration::from_millis(2),
        left: Some(Box::new(left)),
        ..MockConfig::default()
    });
    (worker.unwrap(), all)
}

#[tokio::test]
async fn what_this_router_cannot_go_on_with_it_does_not_claim() {
    for (model, other) in [("mock", 1), ("another", 0)] {
        let (both, all) = leaves(model);
        let mesh = mesh_of(&[&both]).await;
        let mut had = all[..HAD].to_vec();
        had[HAD - 1] += other;
        let asked = super::super::resume::asked_for(HAD as u32, &had);
        let refused = mesh.resume(asked, || true).await.map(|_| ());
        assert_eq!(refused, Err(RequestError::UnknownGeneration));
        assert_eq!(both.counters().claims, 0, "{model}");
        assert!(until(|| nothing_left(&mesh, &[&both])).await);
    }
}

#[tokio::test]
async fn what_fits_is_claimed_and_goes_on() {
    for had in [0, HAD] {
        let (both, all) = leaves("mock");
        let mesh = mesh_of(&[&both]).await;
        let asked = super::super::resume::asked_for(had as u32, &all[..had]);
        let stream = mesh.resume(asked, || true).await.unwrap();
        assert_eq!(after(&all[..had], stream).await.ids, all);
        assert_eq!(mesh.counters().resumed.running.get(), 1);
        assert!(until(|| nothing_left(&mesh, &[&both])).await);
    }
}

/// A call of Resume that ends after its claim went out and before that is answered.
async fn breaks_off(mesh: &Arc<Mesh>, both: &MockWorker, asked: ResumeAsked, cut: bool) {
    both.faults().set(|plan| plan.hold_claims = true);
    let own = Arc::clone(mesh);
    let call = tokio::spawn(async move { own.resume(asked, move || cut).await.map(|_| ()) });
    assert!(until(|| both.counters().claims == 1).await);
    call.abort();
    assert!(call.await.is_err_and(|error| error.is_cancelled()));
    both.faults().set(|plan| plan.hold_claims = false);
}

#[tokio::test]
async fn a_call_that_breaks_between_claim_and_answer_leaves_it_to_the_next() {
    let (both, all) = leaves("mock");
    let mesh = mesh_of(&[&both]).await;
    let asked = super::super::resume::asked_for(HAD as u32, &all[..HAD]);
    breaks_off(&mesh, &both, asked.clone(), true).await;
    assert!(until(|| mesh.counters().resumed.running.get() == 1).await);
    let next = mesh.resume(asked, || true).await.unwrap();
    assert_eq!(after(&all[..HAD], next).await.ids, all);
    assert_eq!(mesh.counters().resumed.here.get(), 1);
    assert_eq!(both.counters().claims, 1);
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn what_nobody_comes_back_for_ends() {
    for (cut, orphan_timeout) in [(true, Duration::from_millis(1)), (false, LIMIT * 10)] {
        let (both, all) = leaves("mock");
        both.faults().set(|plan| plan.stuck = true);
        let mesh = mesh_with(MeshSettings {
            orphan_timeout,
            ..settings(&[&both])
        })
        .await;
        let asked = super::super::resume::asked_for(HAD as u32, &all[..HAD]);
        breaks_off(&mesh, &both, asked, cut).await;
        assert!(until(|| both.counters().cancelled == 1).await, "{cut}");
        assert!(until(|| nothing_left(&mesh, &[&both])).await);
    }
}

#[tokio::test]
async fn a_worker_that_was_not_reached_yet_may_have_it() {
    let (both, all) = leaves("mock");
    both.freeze();
    let mesh = Mesh::start(settings(&[&both]), None);
    let asked = super::super::resume::asked_for(HAD as u32, &all[..HAD]);
    let not_yet = mesh.resume(asked.clone(), || true).await.map(|_| ());
    assert!(matches!(not_yet, Err(RequestError::NotYet { .. })));
    assert_eq!(mesh.counters().resumed.unknown.get(), 0);
    both.thaw();
    let stream = loop {
        match mesh.resume(asked.clone(), || true).await {
            Err(RequestError::NotYet { .. }) => tokio::time::sleep(Duration::from_millis(1)).await,
            other => break other.unwrap(),
        }
    };
    assert_eq!(after(&all[..HAD], stream).await.ids, all);
}

#[tokio::test]
async fn one_that_has_died_is_not_waited_for() {
    let both = worker(Role::Both);
    let mut dead = worker(Role::Both);
    let mesh = mesh_of(&[&both, &dead]).await;
    dead.kill();
    let asked = || super::super::resume::asked_for(0, &[]);
    // Until it is known. What is asked for later than that is not waited for at all.
    let refused = loop {
        match mesh.resume(asked(), || true).await.map(|_| ()) {
            Err(RequestError::NotYet { .. }) => tokio::time::sleep(Duration::from_millis(1)).await,
            other => break other,
        }
    };
    assert_eq!(refused, Err(RequestError::UnknownGeneration));
}

#[tokio::test]
async fn a_live_worker_that_has_other_things_to_say_before_may_have_it() {
    let (both, all) = leaves("mock");
    both.faults().set(|plan| plan.hold_finds = true);
    let streams = StreamSettings {
        // Its loads come meanwhile.
        resume_timeout: Duration::from_millis(600),
        ..StreamSettings::default()
    };
    let mesh = mesh_with(MeshSettings {
        streams,
        ..settings(&[&both])
    })
    .await;
    let asked = super::super::resume::asked_for(HAD as u32, &all[..HAD]);
    let not_yet = mesh.resume(asked.clone(), || true).await.map(|_| ());
    assert!(
        matches!(not_yet, Err(RequestError::NotYet { .. })),
        "{not_yet:?}"
    );
    both.faults().set(|plan| plan.hold_finds = false);
    let stream = mesh.resume(asked, || true).await.unwrap();
    assert_eq!(after(&all[..HAD], stream).await.ids, all);
}

#[tokio::test]
async fn a_panic_in_a_takeover_ends_its_call_alone() {
    let (both, all) = leaves("mock");
    let mesh = mesh_of(&[&both]).await;
    let asked = super::super::resume::asked_for(HAD as u32, &all[..HAD]);
    let panics = ResumeAsked {
        request_id: PANICS_IN_ITS_TAKEOVER.to_owned(),
        ..asked.clone()
    };
    let call = tokio::time::timeout(LIMIT, mesh.resume(panics, || true));
    let ended = call.await.expect("the call ends").map(|_| ());
    let internal = RequestError::Internal {
        id: PANICS_IN_ITS_TAKEOVER.to_owned(),
        next_index: HAD as u32,
    };
    assert_eq!(ended, Err(internal));
    let counters = mesh.counters();
    assert_eq!(
        (counters.task_panics.get(), counters.session_panics.get()),
        (1, 0)
    );
    // The generation runs on, and its id is free.
    let next = mesh.resume(asked, || true).await.unwrap();
    assert_eq!(after(&all[..HAD], next).await.ids, all);
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}
