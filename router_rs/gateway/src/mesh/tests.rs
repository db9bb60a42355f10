//! The mesh against mock workers over real sockets.
#![allow(clippy::unwrap_used)]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use kvmesh_scheduler::{CostSettings, LocalPrefill};
use kvmesh_testkit::mock::{MockConfig, MockWorker};
use kvmesh_text::TextSettings;
use kvmesh_wire::v1::{self, Role, generate_response::Event as Message};

use super::{policy::PolicySettings, *};

/// A bound that only a failure reaches, on however busy a machine.
const LIMIT: Duration = Duration::from_secs(60);

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
    let shipped = MeshSettings::default();
    let cost = CostSettings {
        // A prefill worker is one for every prompt: those of tests are short.
        local_prefill: LocalPrefill::WithoutPrefillWorkers,
        ..shipped.policy.cost
    };
    MeshSettings {
        workers: workers
            .iter()
            .map(|worker| worker.addr().to_string())
            .collect(),
        policy: PolicySettings {
            cost,
            ..shipped.policy
        },
        streams: StreamSettings {
            resume_timeout: LIMIT,
            ..shipped.streams
        },
        ..shipped
    }
}

fn worker(role: Role) -> MockWorker {
    MockWorker::start(MockConfig {
        role,
        ..MockConfig::default()
    })
    .unwrap()
}

/// Streams of these workers stand still from an index on, or, with `None`, go on.
fn hold(workers: &[&MockWorker], at: Option<u32>) {
    for worker in workers {
        worker.faults().set(|plan| plan.hold_at = at);
    }
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
        resumes: String::new(),
        tracestate: String::new(),
        baggage: String::new(),
        model: "mock".to_owned(),
        prompt_ids: prompt.into(),
        output_ids: Vec::new(),
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
        traced: false,
        chat: false,
        admin: true,
        tenant: 0,
        resumable: false,
        class: v1::RequestClass::Standard,
        ttft_target_ms: 5_000.0,
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

    /// Takes all that is still to come.
    async fn rest(&mut self, mut stream: GenerationStream) {
        let all = async {
            while let Some(item) = stream.next().await {
                self.take(item);
            }
        };
        tokio::time::timeout(LIMIT, all)
            .await
            .expect("the stream ends");
    }
}

async fn collect(stream: GenerationStream) -> Answer {
    let mut answer = Answer::default();
    answer.rest(stream).await;
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

mod choice;
mod explain;
mod failures;
mod index;
mod leaving;
mod log;
mod overload;
mod probation;
mod queue;
mod resume;
mod streams;
mod workers;
