//! What `VllmEngine` answers: the tokens that our own API would bring.

use std::collections::HashMap;

use kvmesh_testkit::mock::{MockConfig, MockWorker};
use kvmesh_wire::vllm::grpc::engine::{
    GenerateRequest, generate_complete::MatchedStop, generate_request::Input,
};
use serde_json::json;
use tonic::Code;

use crate::{
    calls::{GENERATE, PROMPT, asked, generate, ids, params, streamed, tokenized, with},
    common::Mesh,
};

async fn mesh(change: impl FnOnce(&mut MockConfig)) -> Mesh {
    let mut config = MockConfig {
        max_logprobs: 20,
        ..MockConfig::default()
    };
    change(&mut config);
    Mesh::start(vec![config], json!({})).await
}

fn expected(worker: &MockWorker, prompt: &[u32], count: u32) -> Vec<u32> {
    worker.tokens().expected(prompt, count)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_is_the_same_streamed_and_whole() {
    let mesh = mesh(|_| {}).await;
    let expected = expected(&mesh.workers[0], &PROMPT, 40);
    let (chunks, ends) = generate(&mesh, asked(40, true)).await.unwrap();
    assert_eq!(ids(&chunks, 0), expected);
    for chunk in &chunks {
        assert_eq!(chunk.prompt_tokens, 3);
        // What is new, and not what there is.
        assert_eq!(chunk.completion_tokens as usize, chunk.token_ids.len());
        assert!(chunk.output_logprobs.is_none());
    }
    assert_eq!(ends.len(), 1);
    assert_eq!(ends[0].finish_reason, "length");
    assert_eq!((ends[0].prompt_tokens, ends[0].completion_tokens), (3, 40));
    assert!(ends[0].output_ids.is_empty() && ends[0].matched_stop.is_none());

    let (chunks, ends) = generate(&mesh, asked(40, false)).await.unwrap();
    assert!(chunks.is_empty());
    assert_eq!(ends.len(), 1);
    assert_eq!(ends[0].output_ids, expected);
    assert_eq!((ends[0].prompt_tokens, ends[0].completion_tokens), (3, 40));
    let ok = "kvmesh_calls_total{method=\"VllmEngine/Generate\",outcome=\"OK\"}";
    mesh.wait_figure(ok, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_is_tokenised_as_our_own_api_would() {
    let mesh = mesh(|_| {}).await;
    let request = GenerateRequest {
        input: Some(Input::Text("hello world".to_owned())),
        ..asked(8, false)
    };
    let (_, ends) = generate(&mesh, request).await.unwrap();
    let prompt = tokenized(&mesh, "hello world").await;
    assert_eq!(ends[0].prompt_tokens as usize, prompt.len());
    assert_eq!(ends[0].output_ids, expected(&mesh.workers[0], &prompt, 8));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_several_answers_has_its_number_and_its_end() {
    let mesh = mesh(|_| {}).await;
    let expected = expected(&mesh.workers[0], &PROMPT, 12);
    for stream in [true, false] {
        let request = params(asked(12, stream), |params| params.n = 3);
        let (chunks, mut ends) = generate(&mesh, request).await.unwrap();
        ends.sort_by_key(|end| end.index);
        let indices: Vec<u32> = ends.iter().map(|end| end.index).collect();
        assert_eq!(indices, [0, 1, 2]);
        for end in &ends {
            let whole = match stream {
                true => ids(&chunks, end.index),
                false => end.output_ids.clone(),
            };
            assert_eq!(whole, expected);
            assert_eq!(end.completion_tokens, 12);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_stopped_an_answer_is_named_where_the_request_asked_for_it() {
    let mesh = mesh(|config| config.end_of_text_at = Some(20)).await;
    let all = expected(&mesh.workers[0], &PROMPT, 20);
    let text = |id: u32| mesh.workers[0].tokens().vocabulary().text(id).to_owned();
    let stop = text(all[11]);
    let first = all.iter().position(|id| text(*id).contains(&stop)).unwrap();
    for stream in [true, false] {
        let request = params(asked(40, stream), |params| params.stop = vec![stop.clone()]);
        let (chunks, ends) = generate(&mesh, request).await.unwrap();
        let whole = match stream {
            true => ids(&chunks, 0),
            false => ends[0].output_ids.clone(),
        };
        // The token that completes the string is the last.
        assert_eq!(whole, all[..=first]);
        assert_eq!(ends[0].finish_reason, "stop");
        let matched = Some(MatchedStop::MatchedStopStr(stop.clone()));
        assert_eq!(ends[0].matched_stop, matched);
    }
    // The model's own end is a stop, and nobody's wish.
    let (_, ends) = generate(&mesh, asked(40, false)).await.unwrap();
    assert_eq!(ends[0].finish_reason, "stop");
    assert_eq!(ends[0].matched_stop, None);
    let end = *ends[0].output_ids.last().unwrap();
    assert!(!all.contains(&end));
    // The same token, asked for.
    let request = params(asked(40, false), |params| {
        params.stop_token_ids = vec![end];
        params.ignore_eos = true;
    });
    let (_, ends) = generate(&mesh, request).await.unwrap();
    assert_eq!(ends[0].matched_stop, Some(MatchedStop::MatchedTokenId(end)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_probabilities_come_beside_the_tokens_that_they_are_of() {
    let mesh = mesh(|_| {}).await;
    let expected = expected(&mesh.workers[0], &PROMPT, 4);
    for stream in [true, false] {
        let request = params(asked(4, stream), |params| params.logprobs = Some(2));
        let (chunks, ends) = generate(&mesh, request).await.unwrap();
        let told: Vec<_> = match stream {
            true => chunks
                .iter()
                .filter_map(|c| c.output_logprobs.clone())
                .collect(),
            false => ends[0].output_logprobs.iter().cloned().collect(),
        };
        let ids: Vec<u32> = told.iter().flat_map(|one| one.token_ids.clone()).collect();
        assert_eq!(ids, expected);
        let values: Vec<f32> = told
            .iter()
            .flat_map(|one| one.token_logprobs.clone())
            .collect();
        assert_eq!(values, [-0.5; 4]);
        let top: Vec<_> = told
            .iter()
            .flat_map(|one| one.top_logprobs.clone())
            .collect();
        assert_eq!(top.len(), 4);
        assert!(
            top.iter()
                .all(|top| top.values == [-0.5, -1.5] && top.token_ids.len() == 2)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_request_says_reaches_the_worker_with_its_name() {
    let mesh = mesh(|_| {}).await;
    let request = params(asked(2, false), |params| {
        params.temperature = Some(0.0);
        params.top_k = 5;
        params.seed = Some(77);
        params.logit_bias = HashMap::from([(9, 1.5)]);
        params.min_tokens = 1;
    });
    generate(&mesh, request).await.unwrap();
    let place = mesh.workers[0].last_place().unwrap();
    assert_eq!(place.request_id, "mine");
    let told = place.continuation.unwrap();
    let sampling = told.sampling.unwrap();
    assert_eq!(
        (sampling.temperature, sampling.top_k, sampling.seed),
        (0.0, 5, 77)
    );
    assert_eq!(sampling.top_p, 1.0);
    assert_eq!(sampling.logit_bias[0].token_id, 9);
    assert_eq!((told.min_tokens, told.max_tokens), (1, 2));
    // Metadata is the caller's better word.
    generate(&mesh, with(asked(1, false), "x-request-id", "theirs"))
        .await
        .unwrap();
    assert_eq!(mesh.workers[0].last_place().unwrap().request_id, "theirs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_there_are_several_models_metadata_names_one() {
    let named = |model: &str| MockConfig {
        model: model.to_owned(),
        worker_id: Some(model.to_owned()),
        ..MockConfig::default()
    };
    let mesh = Mesh::start(vec![named("one"), named("two")], json!({})).await;
    mesh.wait_figure("kvmesh_sessions{state=\"live\"}", 2).await;
    for model in ["one", "two"] {
        let call = with(asked(3, false), "x-kvmesh-model", model);
        let (_, ends) = generate(&mesh, call).await.unwrap();
        assert_eq!(ends[0].completion_tokens, 3);
        let place = mesh
            .workers
            .iter()
            .find(|worker| worker.worker_id() == model);
        let place = place.unwrap().last_place().unwrap();
        assert_eq!(place.continuation.unwrap().model, model);
    }
    let refused = streamed::<_, kvmesh_wire::vllm::grpc::engine::GenerateResponse>(
        &mesh,
        GENERATE,
        asked(3, false),
    );
    let status = refused.await.map(|_| ()).unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("one, two"), "{status}");
}
