//! What `vllm.Inference` answers.

use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::{
    v1::RequestClass,
    vllm::{
        CandidateTokens, FinishInfo, GenerateRequest, GenerateResponse, KvCacheParameters,
        RandomSampling, ResponseOptions, SequenceOutput, StoppingCriteria, TokenIds,
        candidate_tokens::Select,
        finish_info::{FinishReason, StopReason},
        generate_request::Prompt,
    },
};
use serde_json::json;
use tonic::Status;

use crate::{
    calls::{PROMPT, streamed, tokenized, unary},
    common::Mesh,
};

pub(crate) const WHOLE: &str = "/vllm.Inference/Generate";
pub(crate) const STREAM: &str = "/vllm.Inference/GenerateStream";

async fn mesh(end_of_text_at: Option<u32>) -> Mesh {
    let config = MockConfig {
        max_logprobs: 20,
        end_of_text_at,
        ..MockConfig::default()
    };
    Mesh::start(vec![config], json!({})).await
}

pub(crate) fn asked(max_new_tokens: u32, response: ResponseOptions) -> GenerateRequest {
    GenerateRequest {
        model: "mock".to_owned(),
        prompt: Some(Prompt::TokenIds(TokenIds {
            ids: PROMPT.to_vec(),
        })),
        stopping: Some(StoppingCriteria {
            max_new_tokens,
            ..StoppingCriteria::default()
        }),
        response: Some(response),
        ..GenerateRequest::default()
    }
}

async fn whole(mesh: &Mesh, request: GenerateRequest) -> GenerateResponse {
    unary(mesh, WHOLE, request).await.unwrap()
}

async fn stream(mesh: &Mesh, request: GenerateRequest) -> Result<Vec<GenerateResponse>, Status> {
    let mut stream = streamed::<_, GenerateResponse>(mesh, STREAM, request).await?;
    let mut all = Vec::new();
    while let Some(message) = stream.message().await? {
        all.push(message);
    }
    Ok(all)
}

fn end(output: &SequenceOutput) -> &FinishInfo {
    output.finish_info.as_ref().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_is_the_same_streamed_and_whole() {
    let mesh = mesh(None).await;
    let made = mesh.workers[0].tokens();
    let (ids, text) = (made.expected(&PROMPT, 30), made.expected_text(&PROMPT, 30));
    let options = ResponseOptions {
        output_token_ids: true,
        prompt_token_ids: true,
        ..ResponseOptions::default()
    };
    let answer = whole(&mesh, asked(30, options.clone())).await;
    let prompt = answer.prompt_info.unwrap();
    assert_eq!(
        (prompt.num_prompt_tokens, prompt.token_ids),
        (3, PROMPT.to_vec())
    );
    let output = answer.outputs.unwrap();
    assert_eq!((&output.token_ids, &output.text), (&ids, &text));
    assert_eq!((output.index, output.num_tokens), (0, 30));
    assert_eq!(end(&output).finish_reason(), FinishReason::Length);
    assert_eq!(end(&output).num_output_tokens, 30);
    assert!(end(&output).stop_reason.is_none());

    let all = stream(&mesh, asked(30, options)).await.unwrap();
    // Of the prompt first, then of the output alone.
    assert_eq!(all[0].prompt_info.as_ref().unwrap().token_ids, PROMPT);
    assert!(all[0].outputs.is_none());
    assert!(all[1..].iter().all(|message| message.prompt_info.is_none()));
    let outputs: Vec<_> = all[1..].iter().filter_map(|m| m.outputs.clone()).collect();
    let streamed: Vec<u32> = outputs
        .iter()
        .flat_map(|one| one.token_ids.clone())
        .collect();
    assert_eq!(streamed, ids);
    let said: String = outputs.iter().map(|one| one.text.as_str()).collect();
    assert_eq!(said, text);
    let (last, others) = outputs.split_last().unwrap();
    assert!(others.iter().all(|one| one.finish_info.is_none()));
    assert_eq!(end(last).num_output_tokens, 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_asked_for_is_not_sent() {
    let mesh = mesh(None).await;
    let answer = whole(&mesh, asked(5, ResponseOptions::default())).await;
    assert!(answer.prompt_info.unwrap().token_ids.is_empty());
    let output = answer.outputs.unwrap();
    assert!(output.token_ids.is_empty() && output.logprobs.is_empty());
    assert_eq!(output.num_tokens, 5);
    assert!(!output.text.is_empty());
    // No text, and yet a stop string is found in it.
    let made = mesh.workers[0].tokens();
    let stop = made
        .vocabulary()
        .text(made.expected(&PROMPT, 1)[0])
        .to_owned();
    let options = ResponseOptions {
        output_text: Some(false),
        ..ResponseOptions::default()
    };
    let mut request = asked(5, options);
    request.stopping.as_mut().unwrap().stop_strings = vec![stop.clone()];
    let output = whole(&mesh, request).await.outputs.unwrap();
    assert_eq!((output.text.as_str(), output.num_tokens), ("", 1));
    let reason = end(&output).stop_reason.clone();
    assert_eq!(reason, Some(StopReason::StopString(stop)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_models_own_end_and_the_requests_are_told_apart() {
    let mesh = mesh(Some(4)).await;
    let options = ResponseOptions {
        output_token_ids: true,
        ..ResponseOptions::default()
    };
    let output = whole(&mesh, asked(30, options.clone()))
        .await
        .outputs
        .unwrap();
    assert_eq!(end(&output).finish_reason(), FinishReason::Stop);
    let Some(StopReason::EosTokenId(id)) = end(&output).stop_reason else {
        panic!("{output:?}");
    };
    assert_eq!(output.token_ids.last(), Some(&id));
    let mut request = asked(30, options);
    request.stopping.as_mut().unwrap().stop_token_ids = vec![id];
    let output = whole(&mesh, request).await.outputs.unwrap();
    assert_eq!(end(&output).stop_reason, Some(StopReason::StopTokenId(id)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_probabilities_and_other_tokens_are_told_as_far_as_they_are_asked_for() {
    let mesh = mesh(None).await;
    let options = |count: Option<u32>| ResponseOptions {
        output_logprobs: true,
        output_candidates: count.map(|count| CandidateTokens {
            select: Some(Select::TopN(count)),
        }),
        ..ResponseOptions::default()
    };
    let output = whole(&mesh, asked(3, options(None))).await.outputs.unwrap();
    assert_eq!(output.logprobs, [-0.5; 3]);
    assert!(output.candidate_tokens.is_empty());
    let output = whole(&mesh, asked(3, options(Some(2))))
        .await
        .outputs
        .unwrap();
    assert_eq!(output.candidate_tokens.len(), 3);
    for place in &output.candidate_tokens {
        // The likeliest is the one that was drawn: it is told of apart.
        let told: Vec<_> = place.tokens.iter().map(|t| (t.rank, t.logprob)).collect();
        assert_eq!(told, [(2, -1.5)]);
    }
    let drawn = mesh.workers[0].tokens().expected(&PROMPT, 3);
    let others = output
        .candidate_tokens
        .iter()
        .map(|place| place.tokens[0].id);
    assert!(others.zip(drawn).all(|(other, drawn)| other != drawn));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_answers_are_streamed_by_their_numbers() {
    let mesh = mesh(None).await;
    let ids = mesh.workers[0].tokens().expected(&PROMPT, 7);
    let options = ResponseOptions {
        output_token_ids: true,
        ..ResponseOptions::default()
    };
    let mut request = asked(7, options);
    request.sampling = Some(RandomSampling {
        num_sequences: 3,
        ..RandomSampling::default()
    });
    let all = stream(&mesh, request).await.unwrap();
    let outputs: Vec<_> = all.iter().filter_map(|m| m.outputs.as_ref()).collect();
    for index in 0..3 {
        let own = outputs.iter().filter(|one| one.index == index);
        let (mut tokens, mut ends) = (Vec::new(), 0);
        for one in own {
            tokens.extend(one.token_ids.clone());
            ends += usize::from(one.finish_info.is_some());
        }
        assert_eq!((tokens, ends), (ids.clone(), 1));
    }
    assert_eq!(all.iter().filter(|m| m.prompt_info.is_some()).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_has_the_token_ids_that_are_told_of_it_and_hints_reach_the_worker() {
    let mesh = mesh(None).await;
    let options = ResponseOptions {
        prompt_token_ids: true,
        ..ResponseOptions::default()
    };
    let request = GenerateRequest {
        prompt: Some(Prompt::Text("hello world".to_owned())),
        priority: 3,
        kv: Some(KvCacheParameters {
            cache_salt: "salt".to_owned(),
            ..KvCacheParameters::default()
        }),
        ..asked(2, options)
    };
    let answer = whole(&mesh, request).await;
    let told = mesh.workers[0].last_place().unwrap().continuation.unwrap();
    let prompt = answer.prompt_info.unwrap();
    let ids = tokenized(&mesh, "hello world").await;
    assert_eq!(prompt.token_ids, ids);
    assert_eq!(prompt.num_prompt_tokens as usize, ids.len());
    assert_eq!(told.request_class(), RequestClass::Batch);
    assert_eq!(told.cache_salt, "salt");
    // Greedy where nobody says otherwise: other than over our own API.
    assert_eq!(told.sampling.unwrap().temperature, 0.0);
}
