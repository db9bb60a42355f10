//! A request's way, where nothing goes wrong.

use super::*;

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
async fn only_an_admin_is_told_where_its_request_is_placed() {
    let (prefill, decode) = (worker(Role::Prefill), worker(Role::Decode));
    let mesh = mesh_of(&[&prefill, &decode]).await;
    let named = (
        prefill.worker_id().to_owned(),
        decode.worker_id().to_owned(),
    );
    for (admin, told) in [(true, named), (false, Default::default())] {
        let asked = AdmittedRequest {
            admin,
            ..request(&[5, 6], 5)
        };
        let mut answer = collect(mesh.generate(asked).unwrap()).await;
        assert_eq!(answer.ids.len(), 5);
        let placed = answer.placed.remove(0);
        assert_eq!(placed.attempt, 1);
        assert_eq!((placed.prefill_worker, placed.decode_worker), told);
    }
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
async fn an_engine_hand_off_that_crosses_a_cancel_is_dropped_by_decode() {
    let config = |role| MockConfig {
        role,
        engine_connector: "mock".to_owned(),
        ..MockConfig::default()
    };
    let prefill = MockWorker::start(config(Role::Prefill)).unwrap();
    let decode = MockWorker::start(config(Role::Decode)).unwrap();
    let mesh = mesh_of(&[&prefill, &decode]).await;
    let dropped = || mesh.counters().hand_offs_dropped.get();
    for crosses in [false, true] {
        prefill.faults().set(|plan| {
            plan.stuck = true;
            plan.late_cancels = crosses;
        });
        let placed = prefill.counters().placed;
        let resumable = AdmittedRequest {
            resumable: true,
            ..request(&[9, 8, 7], 100_000)
        };
        let stream = mesh.generate(resumable).unwrap();
        assert!(until(|| prefill.counters().placed > placed).await);
        drop(stream);
        assert!(until(|| mesh.counters().cancelled.get() == 1 + u64::from(crosses)).await);
        prefill.faults().set(|plan| plan.stuck = false);
        let cancelled = || decode.counters().cancelled == u64::from(crosses);
        assert!(until(cancelled).await);
        assert!(until(|| nothing_left(&mesh, &[&prefill, &decode])).await);
        // Decode's engine accepts it, and is told to leave it.
        let told = (prefill.counters().handed_off, decode.counters().placed);
        assert_eq!(told, (u64::from(crosses), u64::from(crosses)));
        assert_eq!(dropped(), u64::from(crosses));
    }
    let place = decode.last_place().unwrap();
    assert_eq!(place.stage(), v1::Stage::Decode);
    // Nobody is to resume what nobody wants.
    assert!(place.resume_state.is_empty());
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
    let deadline = Some(Instant::now() + Duration::from_secs(1));
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

/// Asks for text with a stop string that comes soon.
fn stopped(worker: &MockWorker, prompt: &[u32]) -> AdmittedRequest {
    let whole = worker.tokens().expected_text(prompt, 40);
    let text = Some(TextSettings {
        stops: vec![whole.chars().skip(6).take(9).collect()],
        ..TextSettings::default()
    });
    AdmittedRequest {
        text,
        trace: true,
        ..request(prompt, 100_000)
    }
}

#[tokio::test]
async fn a_stop_string_ends_with_the_figures_of_its_workers() {
    let slow = |role| {
        MockWorker::start(MockConfig {
            role,
            prefill: Duration::from_millis(20),
            step: Duration::from_millis(5),
            ..MockConfig::default()
        })
        .unwrap()
    };
    for pool in [
        vec![slow(Role::Both)],
        vec![slow(Role::Prefill), slow(Role::Decode)],
    ] {
        let workers: Vec<_> = pool.iter().collect();
        let mesh = mesh_of(&workers).await;
        let prompt = [4; 48];
        let answer = collect(mesh.generate(stopped(&pool[0], &prompt)).unwrap()).await;
        let finished = answer.finished.unwrap();
        assert!(!finished.stop_string.is_empty());
        let usage = finished.usage.unwrap_or_default();
        let timings = finished.timings.clone().unwrap_or_default();
        assert_eq!((usage.cached_tokens, usage.computed_tokens), (0, 48));
        assert!(timings.prefill_ms > 0.0, "{timings:?}");
        assert_eq!(timings.transfer_ms > 0.0, pool.len() > 1, "{timings:?}");
        let told = |name: &str| finished.trace.iter().any(|span| span.name == name);
        assert!(told("prefill_chunk") && told("decode"), "{finished:?}");
        // What was predicted of it is learnt from.
        let id = answer.accepted.unwrap().generation_id;
        let actual = mesh.explain(&id).unwrap().decisions.remove(0).actual;
        assert!(actual.is_some_and(|actual| actual.prefill_ms > 0.0));
        assert!(until(|| nothing_left(&mesh, &workers)).await);
        mesh.shutdown(Duration::ZERO).await;
    }
}

#[tokio::test]
async fn a_stop_string_ends_where_its_worker_says_nothing_more() {
    let config = MockConfig {
        step: Duration::from_millis(5),
        ..MockConfig::default()
    };
    let both = MockWorker::start(config).unwrap();
    both.faults().set(|plan| plan.untold_cancels = true);
    let mesh = mesh_of(&[&both]).await;
    for (id, broken) in [(4, false), (5, true)] {
        let mut stream = mesh.generate(stopped(&both, &[id; 48])).unwrap();
        let mut answer = first_tokens(&mut stream).await;
        if broken {
            // The text has ended; then the session that would tell breaks.
            let cancelled = both.counters().cancelled;
            let rest = tokio::spawn(async move {
                answer.rest(stream).await;
                answer
            });
            assert!(until(|| both.counters().cancelled > cancelled).await);
            both.break_sessions();
            answer = rest.await.unwrap();
        } else {
            answer.rest(stream).await;
        }
        let finished = answer.finished.unwrap();
        assert_eq!(finished.reason(), v1::FinishReason::Stop);
        // As it was planned.
        let usage = finished.usage.unwrap();
        assert_eq!((usage.cached_tokens, usage.computed_tokens), (0, 48));
        assert!(until(|| nothing_left(&mesh, &[&both])).await);
    }
}

#[tokio::test]
async fn attempts_and_transfers_are_counted_by_state() {
    let slow = |role| {
        MockWorker::start(MockConfig {
            role,
            step: Duration::from_millis(5),
            ..MockConfig::default()
        })
        .unwrap()
    };
    let (prefill, decode) = (slow(Role::Prefill), slow(Role::Decode));
    hold(&[&prefill], Some(0));
    let mesh = mesh_of(&[&prefill, &decode]).await;
    assert_eq!(mesh.attempts(), AttemptCounts::default());
    let mut stream = mesh.generate(request(&[1, 2], 100_000)).unwrap();
    let flowing = AttemptCounts {
        open: 1,
        flowing: 1,
        ..AttemptCounts::default()
    };
    assert!(
        until(|| mesh.attempts() == flowing).await,
        "{:?}",
        mesh.attempts()
    );
    hold(&[&prefill], None);
    let first = first_tokens(&mut stream).await;
    assert!(!first.ids.is_empty());
    // Decode has brought tokens of its own: the transfer is over.
    let decodes = AttemptCounts {
        open: 1,
        ..AttemptCounts::default()
    };
    assert!(
        until(|| mesh.attempts() == decodes).await,
        "{:?}",
        mesh.attempts()
    );
    drop(stream);
    assert_eq!(mesh.attempts(), AttemptCounts::default());
    assert!(until(|| nothing_left(&mesh, &[&prefill, &decode])).await);
}

#[tokio::test]
async fn an_output_that_the_client_has_in_part_goes_on_behind_it() {
    let both = worker(Role::Both);
    let mesh = mesh_of(&[&both]).await;
    let whole = collect(mesh.generate(request(&[1, 2], 40)).unwrap()).await;
    for had in [0, 1, 17, 39, 40] {
        let from = AdmittedRequest {
            output_ids: whole.ids[..had].to_vec(),
            ..request(&[1, 2], 40)
        };
        let mut answer = Answer {
            ids: whole.ids[..had].to_vec(),
            ..Answer::default()
        };
        answer.rest(mesh.generate(from).unwrap()).await;
        assert_eq!(answer.error, None);
        assert_eq!(answer.ids, whole.ids, "from {had} on");
        assert!(whole.text.ends_with(&answer.text), "{}", answer.text);
        let usage = answer.finished.unwrap().usage.unwrap();
        assert_eq!(usage.output_tokens, 40);
    }
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}
