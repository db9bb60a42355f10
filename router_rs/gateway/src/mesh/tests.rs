//! The mesh against mock workers over real sockets.
#![allow(clippy::unwrap_used)]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use kvmesh_testkit::mock::{MockConfig, MockWorker};
use kvmesh_text::TextSettings;
use kvmesh_wire::v1::{self, Role, generate_response::Event as Message};

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

/// What a client's stream came to.
#[derive(Default)]
struct Answer {
    accepted: Option<v1::Accepted>,
    placed: Vec<v1::Placed>,
    ids: Vec<u32>,
    text: String,
    finished: Option<v1::Finished>,
    error: Option<RequestError>,
}

fn settings(workers: &[&MockWorker]) -> MeshSettings {
    MeshSettings {
        workers: workers
            .iter()
            .map(|worker| worker.addr().to_string())
            .collect(),
        ..MeshSettings::default()
    }
}

fn worker(role: Role) -> MockWorker {
    MockWorker::start(MockConfig {
        role,
        ..MockConfig::default()
    })
    .unwrap()
}

/// Waits for a state that the mesh reaches by itself; the caller's assertion
/// says what was missed.
async fn until(reached: impl Fn() -> bool) -> bool {
    let end = Instant::now() + LIMIT;
    while !reached() && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    reached()
}

async fn mesh_of(workers: &[&MockWorker]) -> Arc<Mesh> {
    mesh_with(settings(workers)).await
}

async fn mesh_with(settings: MeshSettings) -> Arc<Mesh> {
    let count = settings.workers.len() as u64;
    let mesh = Mesh::start(settings, None);
    let ready = || mesh.sessions().live == count && mesh.models().iter().any(|model| model.ready);
    assert!(
        until(ready).await,
        "not ready: {:?} {:?}",
        mesh.workers(),
        mesh.models()
    );
    mesh
}

pub(super) fn request(prompt: &[u32], max_tokens: u32) -> AdmittedRequest {
    AdmittedRequest {
        request_id: "test".to_owned(),
        traceparent: String::new(),
        tracestate: String::new(),
        model: "mock".to_owned(),
        prompt_ids: prompt.into(),
        sampling: v1::ResolvedSampling {
            top_p: 1.0,
            ..v1::ResolvedSampling::default()
        },
        max_tokens,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        text: Some(TextSettings::default()),
        logprobs: None,
        grammar: None,
        placements: true,
        trace: false,
        admin: true,
        tenant: 0,
        class: v1::RequestClass::Standard,
        itl_target_ms: 0.0,
        cache_salt: String::new(),
        adapter: String::new(),
        expected_output_tokens: 0,
        arrived: Instant::now(),
        deadline: None,
        tokenize_ms: 0.0,
    }
}

impl Answer {
    fn take(&mut self, item: Result<v1::GenerateResponse, RequestError>) {
        match item.map(|response| response.event.unwrap()) {
            Ok(Message::Accepted(accepted)) => self.accepted = Some(accepted),
            Ok(Message::Placed(placed)) => self.placed.push(placed),
            Ok(Message::Tokens(tokens)) => {
                assert_eq!(tokens.first_index as usize, self.ids.len(), "a hole");
                self.ids.extend(tokens.ids);
                self.text.push_str(&tokens.text);
            }
            Ok(Message::Finished(finished)) => {
                self.text.push_str(&finished.text);
                self.finished = Some(finished);
            }
            Err(error) => self.error = Some(error),
        }
    }
}

async fn collect(mut stream: GenerationStream) -> Answer {
    let mut answer = Answer::default();
    let all = async {
        while let Some(item) = stream.next().await {
            answer.take(item);
        }
    };
    tokio::time::timeout(LIMIT, all)
        .await
        .expect("the stream ends");
    answer
}

async fn first_tokens(stream: &mut GenerationStream) -> Answer {
    let mut answer = Answer::default();
    while answer.ids.is_empty() {
        let item = tokio::time::timeout(LIMIT, stream.next()).await.unwrap();
        answer.take(item.expect("tokens come"));
    }
    answer
}

fn nothing_left(mesh: &Mesh, workers: &[&MockWorker]) -> bool {
    let counters = mesh.counters();
    counters.open_streams.get() == 0
        && counters.undelivered_ids.get() == 0
        && mesh.booked() == 0
        && mesh.queued() == 0
        && workers.iter().all(|worker| {
            let held = worker.counters();
            held.running == 0 && held.held_blocks == 0
        })
}

#[tokio::test]
async fn one_worker_answers_a_request() {
    let both = worker(Role::Both);
    let mesh = mesh_of(&[&both]).await;
    let answer = collect(mesh.generate(request(&[1, 2, 3], 20)).unwrap()).await;
    assert_eq!(answer.error, None);
    assert_eq!(answer.ids, both.tokens().expected(&[1, 2, 3], 20));
    assert_eq!(answer.text, both.tokens().expected_text(&[1, 2, 3], 20));
    assert_eq!(answer.accepted.unwrap().prompt_tokens, 3);
    let finished = answer.finished.unwrap();
    assert_eq!(finished.reason(), v1::FinishReason::Length);
    let usage = finished.usage.unwrap();
    assert_eq!((usage.output_tokens, usage.attempts), (20, 1));
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
    mesh.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn prefill_and_decode_share_a_request() {
    let (prefill, decode) = (worker(Role::Prefill), worker(Role::Decode));
    let mesh = mesh_of(&[&prefill, &decode]).await;
    let answer = collect(mesh.generate(request(&[5, 6], 50)).unwrap()).await;
    assert_eq!(answer.error, None);
    assert_eq!(answer.ids, decode.tokens().expected(&[5, 6], 50));
    assert_eq!(prefill.counters().handed_off, 1);
    assert_eq!(decode.counters().finished, 1);
    assert_eq!(answer.placed[0].prefill_worker, prefill.worker_id());
    assert_eq!(answer.placed[0].decode_worker, decode.worker_id());
    assert!(until(|| nothing_left(&mesh, &[&prefill, &decode])).await);
    let id = answer.accepted.unwrap().generation_id;
    let why = mesh.explain(&id).unwrap();
    assert_eq!(why.decisions.len(), 1);
    assert!(why.finished.is_some());
}

#[tokio::test]
async fn an_engine_hand_off_goes_prefill_first() {
    for emits in [true, false] {
        let config = |role| MockConfig {
            role,
            engine_connector: "mock".to_owned(),
            prefill_emits_first_token: emits,
            ..MockConfig::default()
        };
        let prefill = MockWorker::start(config(Role::Prefill)).unwrap();
        let decode = MockWorker::start(config(Role::Decode)).unwrap();
        let mesh = mesh_of(&[&prefill, &decode]).await;
        let answer = collect(mesh.generate(request(&[9, 8, 7], 30)).unwrap()).await;
        assert_eq!(answer.error, None);
        assert_eq!(answer.ids, decode.tokens().expected(&[9, 8, 7], 30));
        assert_eq!(prefill.counters().handed_off, 1);
    }
}

#[tokio::test]
async fn a_request_of_one_token_stays_on_one_worker() {
    let (prefill, decode) = (worker(Role::Prefill), worker(Role::Decode));
    let mesh = mesh_of(&[&prefill, &decode]).await;
    let answer = collect(mesh.generate(request(&[5, 6], 1)).unwrap()).await;
    assert_eq!(answer.ids.len(), 1);
    assert_eq!(prefill.counters().finished, 1);
    assert_eq!(decode.counters().placed, 0);
}

#[tokio::test]
async fn many_streams_are_each_whole() {
    let config = |role| MockConfig {
        role,
        step: Duration::from_millis(2),
        ..Default::default()
    };
    let prefill = MockWorker::start(config(Role::Prefill)).unwrap();
    let decode = MockWorker::start(config(Role::Decode)).unwrap();
    let both = MockWorker::start(config(Role::Both)).unwrap();
    let mesh = mesh_of(&[&prefill, &decode, &both]).await;
    let streams: Vec<_> = (0..64)
        .map(|n| tokio::spawn(collect(mesh.generate(request(&[n, n + 1], 40)).unwrap())))
        .collect();
    for (n, stream) in (0..64).zip(streams) {
        let answer = stream.await.unwrap();
        assert_eq!(answer.error, None);
        assert_eq!(answer.ids, both.tokens().expected(&[n, n + 1], 40));
    }
    assert!(until(|| nothing_left(&mesh, &[&prefill, &decode, &both])).await);
    assert_eq!(mesh.counters().stale_frames.get(), 0);
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
async fn a_dropped_stream_cancels_on_both_workers() {
    let slow = |role| MockConfig {
        role,
        step: Duration::from_millis(5),
        ..MockConfig::default()
    };
    let prefill = MockWorker::start(slow(Role::Prefill)).unwrap();
    let decode = MockWorker::start(slow(Role::Decode)).unwrap();
    let mesh = mesh_of(&[&prefill, &decode]).await;
    let mut stream = mesh.generate(request(&[1, 2], 100_000)).unwrap();
    first_tokens(&mut stream).await;
    drop(stream);
    assert!(until(|| nothing_left(&mesh, &[&prefill, &decode])).await);
    assert_eq!(decode.counters().cancelled, 1);
    assert_eq!(mesh.counters().cancelled.get(), 1);
}

#[tokio::test]
async fn a_deadline_ends_the_stream_and_its_worker() {
    let config = MockConfig {
        step: Duration::from_millis(5),
        ..MockConfig::default()
    };
    let both = MockWorker::start(config).unwrap();
    let mesh = mesh_of(&[&both]).await;
    let deadline = Some(Instant::now() + Duration::from_millis(100));
    let asked = AdmittedRequest {
        deadline,
        ..request(&[3], 100_000)
    };
    let answer = collect(mesh.generate(asked).unwrap()).await;
    let next_index = u32::try_from(answer.ids.len()).unwrap();
    assert_eq!(
        answer.error,
        Some(RequestError::DeadlineExceeded { next_index })
    );
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}

#[tokio::test]
async fn a_stop_string_ends_the_output_across_tokens() {
    let config = MockConfig {
        step: Duration::from_millis(1),
        ..MockConfig::default()
    };
    let both = MockWorker::start(config).unwrap();
    let mesh = mesh_of(&[&both]).await;
    let whole = both.tokens().expected_text(&[4, 4], 40);
    let from = whole
        .char_indices()
        .nth(whole.chars().count() / 2)
        .unwrap()
        .0;
    let stop: String = whole[from..].chars().take(9).collect();
    let text = Some(TextSettings {
        stops: vec![stop.clone()],
        ..TextSettings::default()
    });
    let asked = AdmittedRequest {
        text,
        ..request(&[4, 4], 1_000)
    };
    let answer = collect(mesh.generate(asked).unwrap()).await;
    let finished = answer.finished.unwrap();
    assert_eq!(finished.reason(), v1::FinishReason::Stop);
    assert_eq!(finished.stop_string, stop);
    assert_eq!(answer.text, whole[..whole.find(&stop).unwrap()]);
    assert_eq!(
        finished.usage.unwrap().output_tokens as usize,
        answer.ids.len()
    );
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
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
    assert!(matches!(
        mesh.model("mock"),
        Err(RequestError::UnknownModel { .. })
    ));
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

mod index;
mod queue;
