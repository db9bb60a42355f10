//! The mock worker keeps the protocol that routers are written against.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kvmesh_rpc::v1::{inference_client::InferenceClient, worker_client::WorkerClient};
use kvmesh_testkit::{
    mock::{MockConfig, MockWorker},
    tokens::TokenFunction,
};
use kvmesh_wire::v1::{
    Cancel, Continuation, FinishReason, GenerateRequest, HandOff, MeshHandOff, Place,
    ProtocolVersion, RefusalReason, RouterFrame, RouterHello, Stage, StepOutput, Stopping,
    TokenIds, WorkerFrame, generate_request::Input, generate_response::Event, hand_off, opening,
    router_frame, stage_end::End, worker_frame,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(20);

/// A router that does nothing by itself.
struct Router {
    commands: mpsc::Sender<RouterFrame>,
    frames: Streaming<WorkerFrame>,
    number: u64,
}

impl Router {
    async fn attach(worker: &MockWorker, id: &str) -> Self {
        let mut client = WorkerClient::connect(format!("http://{}", worker.addr()))
            .await
            .unwrap();
        let (commands, outbound) = mpsc::channel(256);
        let hello = RouterHello {
            version: Some(ProtocolVersion { major: 1, minor: 0 }),
            router_id: id.to_owned(),
            router_incarnation: 7,
            ..Default::default()
        };
        let hello = RouterFrame {
            number: 0,
            frame: Some(router_frame::Frame::Hello(hello)),
        };
        commands.send(hello).await.unwrap();
        let frames = client
            .attach(ReceiverStream::new(outbound))
            .await
            .unwrap()
            .into_inner();
        let mut router = Self {
            commands,
            frames,
            number: 0,
        };
        let first = router.frame().await.unwrap();
        assert!(matches!(first, worker_frame::Frame::Hello(_)));
        router
    }

    async fn send(&mut self, frame: router_frame::Frame) {
        self.number += 1;
        let frame = RouterFrame {
            number: self.number,
            frame: Some(frame),
        };
        self.commands.send(frame).await.unwrap();
    }

    async fn frame(&mut self) -> Result<worker_frame::Frame, Status> {
        let frame = tokio::time::timeout(PATIENCE, self.frames.message())
            .await
            .expect("a frame in time")?;
        Ok(frame.expect("not the end").frame.unwrap())
    }

    async fn step(&mut self) -> StepOutput {
        loop {
            if let worker_frame::Frame::Step(step) = self.frame().await.unwrap() {
                return step;
            }
        }
    }

    /// Reads until one stage has ended; gives all its tokens with indices.
    async fn until_end(&mut self) -> (Vec<(u32, u32)>, End) {
        let mut tokens = Vec::new();
        loop {
            let step = self.step().await;
            if let Some(rows) = &step.tokens {
                assert_eq!(rows.generations.len(), 16 * rows.counts.len());
                tokens.extend(rows.first_indices.iter().copied().zip(rows.ids.clone()));
            }
            if let Some(end) = step.ends.into_iter().next() {
                return (tokens, end.end.unwrap());
            }
        }
    }
}

fn place(generation: u8, prompt: &[u32], max_tokens: u32, stage: Stage) -> Place {
    Place {
        generation: vec![generation; 16].into(),
        owner: 1,
        attempt: 1,
        continuation: Some(Continuation {
            model: "mock".to_owned(),
            prompt_ids: prompt.to_vec(),
            max_tokens,
            ..Default::default()
        }),
        stage: stage as i32,
        ..Default::default()
    }
}

fn mesh(sender: &MockWorker) -> HandOff {
    HandOff {
        kind: Some(hand_off::Kind::Mesh(MeshHandOff {
            transfer_id: vec![9; 16].into(),
            sender_worker: sender.worker_id().to_owned(),
            sender_incarnation: sender.record().incarnation,
            sender_address: sender.record().transfer_address.clone(),
        })),
    }
}

fn indexed(tokens: &TokenFunction, prompt: &[u32], count: u32) -> Vec<(u32, u32)> {
    (0..).zip(tokens.expected(prompt, count)).collect()
}

#[tokio::test]
async fn a_whole_stage_is_reserved_streams_and_finishes() {
    let worker = MockWorker::start(MockConfig::default()).unwrap();
    let mut router = Router::attach(&worker, "r").await;
    let stage = place(1, &[4, 5, 6], 40, Stage::Whole);
    router.send(router_frame::Frame::Place(stage)).await;
    let first = router.step().await;
    let opening = first.openings.first().unwrap();
    assert!(matches!(opening.answer, Some(opening::Answer::Reserved(_))));
    let rows = first.tokens.unwrap();
    let mut tokens: Vec<(u32, u32)> = rows.first_indices.into_iter().zip(rows.ids).collect();
    let (rest, end) = router.until_end().await;
    tokens.extend(rest);
    assert_eq!(tokens, indexed(worker.tokens(), &[4, 5, 6], 40));
    let End::Finished(finished) = end else {
        panic!("{end:?}")
    };
    assert_eq!(finished.reason(), FinishReason::Length);
    let counters = worker.counters();
    assert_eq!((counters.running, counters.held_blocks), (0, 0));
    assert_eq!((counters.placed, counters.finished), (1, 1));
}

#[tokio::test]
async fn a_hand_off_passes_the_output_from_prefill_to_decode() {
    let prefill = MockWorker::start(MockConfig::default()).unwrap();
    let decode = MockWorker::start(MockConfig::default()).unwrap();
    let mut to_prefill = Router::attach(&prefill, "r").await;
    let mut to_decode = Router::attach(&decode, "r").await;
    let stage = |stage| Place {
        hand_off: Some(mesh(&prefill)),
        ..place(1, &[8; 100], 20, stage)
    };
    to_decode
        .send(router_frame::Frame::Place(stage(Stage::Decode)))
        .await;
    let opening = to_decode.step().await.openings.remove(0);
    assert!(matches!(opening.answer, Some(opening::Answer::Reserved(_))));
    to_prefill
        .send(router_frame::Frame::Place(stage(Stage::Prefill)))
        .await;
    let (first, end) = to_prefill.until_end().await;
    assert_eq!(first, indexed(prefill.tokens(), &[8; 100], 1));
    assert!(matches!(end, End::HandedOff(h) if h.tokens_committed == 1 && h.engine.is_none()));
    let (tokens, end) = to_decode.until_end().await;
    assert_eq!(tokens, indexed(decode.tokens(), &[8; 100], 20));
    assert!(matches!(end, End::Finished(_)));
    assert_eq!(prefill.counters().transfers, 0);
    assert_eq!(decode.counters().transfers, 0);
}

#[tokio::test]
async fn a_killed_sender_is_a_failed_transfer() {
    let config = MockConfig {
        prefill: Duration::from_secs(3_600),
        ..Default::default()
    };
    let mut prefill = MockWorker::start(config).unwrap();
    let decode = MockWorker::start(MockConfig::default()).unwrap();
    let mut to_prefill = Router::attach(&prefill, "r").await;
    let mut to_decode = Router::attach(&decode, "r").await;
    for (router, stage) in [
        (&mut to_decode, Stage::Decode),
        (&mut to_prefill, Stage::Prefill),
    ] {
        let place = Place {
            hand_off: Some(mesh(&prefill)),
            ..place(1, &[8; 10], 20, stage)
        };
        router.send(router_frame::Frame::Place(place)).await;
        router.step().await;
    }
    prefill.kill();
    assert!(to_prefill.frames.message().await.is_err() || prefill.is_dead());
    let (tokens, end) = to_decode.until_end().await;
    assert!(tokens.is_empty());
    assert!(matches!(end, End::TransferFailed(_)), "{end:?}");
    assert_eq!(decode.counters().held_blocks, 0);
}

#[tokio::test]
async fn cancel_ends_an_attempt_and_frees_its_blocks() {
    let config = MockConfig {
        step: Duration::from_millis(1),
        ..Default::default()
    };
    let worker = MockWorker::start(config).unwrap();
    let mut router = Router::attach(&worker, "r").await;
    router
        .send(router_frame::Frame::Place(place(
            3,
            &[1],
            1_000_000,
            Stage::Whole,
        )))
        .await;
    router.step().await;
    assert!(worker.counters().held_blocks > 0);
    let cancel = Cancel {
        generation: vec![3; 16].into(),
        owner: 1,
        attempt: 1,
    };
    router.send(router_frame::Frame::Cancel(cancel)).await;
    let (_, end) = router.until_end().await;
    assert!(matches!(end, End::Cancelled(_)));
    let counters = worker.counters();
    assert_eq!((counters.running, counters.held_blocks), (0, 0));
}

#[tokio::test]
async fn a_lost_session_drops_what_it_held() {
    let config = MockConfig {
        step: Duration::from_millis(1),
        ..Default::default()
    };
    let worker = MockWorker::start(config).unwrap();
    let mut router = Router::attach(&worker, "r").await;
    let stage = place(3, &[1], 1_000_000, Stage::Whole);
    router.send(router_frame::Frame::Place(stage)).await;
    router.step().await;
    drop(router);
    let counters = worker.wait_for(PATIENCE, |c| c.running == 0).await;
    assert_eq!((counters.running, counters.held_blocks), (0, 0));
    assert_eq!((counters.dropped, counters.sessions), (1, 0));
}

#[tokio::test]
async fn a_second_attach_of_the_same_router_replaces_the_first() {
    let worker = MockWorker::start(MockConfig::default()).unwrap();
    let mut first = Router::attach(&worker, "r").await;
    let _second = Router::attach(&worker, "r").await;
    let status = loop {
        match first.frame().await {
            Ok(_) => {}
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable);
    let counters = worker.wait_for(PATIENCE, |c| c.sessions == 1).await;
    assert_eq!(counters.sessions, 1);
}

#[tokio::test]
async fn faults_refuse_skip_and_leave_holes() {
    let worker = MockWorker::start(MockConfig::default()).unwrap();
    let mut router = Router::attach(&worker, "r").await;
    worker.faults().set(|plan| plan.refuse_next = 1);
    router
        .send(router_frame::Frame::Place(place(1, &[1], 4, Stage::Whole)))
        .await;
    let opening = router.step().await.openings.remove(0);
    let Some(opening::Answer::Refused(refused)) = opening.answer else {
        panic!("{opening:?}")
    };
    assert_eq!(refused.reason(), RefusalReason::NoRoom);

    worker.faults().set(|plan| {
        plan.skip_openings = 1;
        plan.hole_at = Some(2);
    });
    router
        .send(router_frame::Frame::Place(place(2, &[1], 4, Stage::Whole)))
        .await;
    let (tokens, _) = router.until_end().await;
    let indices: Vec<u32> = tokens.iter().map(|(index, _)| *index).collect();
    assert_eq!(indices, [0, 1, 3]);
}

#[tokio::test]
async fn a_frozen_worker_is_silent_and_goes_on_when_thawed() {
    let worker = MockWorker::start(MockConfig::default()).unwrap();
    let mut router = Router::attach(&worker, "r").await;
    worker.freeze();
    // Frames sent before the freeze may still come; then there is silence for
    // longer than the interval of load frames.
    let silence = loop {
        let next = tokio::time::timeout(Duration::from_millis(600), router.frames.message());
        if next.await.is_err() {
            break true;
        }
    };
    assert!(silence);
    worker.thaw();
    assert!(router.frame().await.is_ok());
}

#[tokio::test]
async fn direct_streams_carry_the_same_tokens_and_their_text() {
    for step in [Duration::ZERO, Duration::from_millis(1)] {
        let config = MockConfig {
            step,
            ..Default::default()
        };
        direct_stream(&MockWorker::start(config).unwrap()).await;
    }
}

async fn direct_stream(worker: &MockWorker) {
    let mut client = InferenceClient::connect(format!("http://{}", worker.addr()))
        .await
        .unwrap();
    let request = GenerateRequest {
        input: Some(Input::TokenIds(TokenIds { ids: vec![4, 5] })),
        stopping: Some(Stopping {
            max_tokens: 30,
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let (mut ids, mut text, mut finished) = (Vec::new(), String::new(), false);
    while let Some(message) = stream.message().await.unwrap() {
        match message.event.unwrap() {
            Event::Tokens(tokens) => {
                assert_eq!(tokens.first_index as usize, ids.len());
                ids.extend(tokens.ids);
                text.push_str(&tokens.text);
            }
            Event::Finished(_) => finished = true,
            _ => {}
        }
    }
    assert!(finished);
    assert_eq!(ids, worker.tokens().expected(&[4, 5], 30));
    assert_eq!(text, worker.tokens().expected_text(&[4, 5], 30));
}
