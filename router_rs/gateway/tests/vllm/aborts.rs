//! Requests that end before they are done: by their clients, or by their names.

use std::time::Duration;

use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::vllm::{
    self, ResponseOptions,
    finish_info::FinishReason,
    grpc::engine::{AbortRequest, AbortResponse, GenerateRequest, GenerateResponse},
};
use serde_json::json;

use crate::{
    calls::{ABORT, GENERATE, all_gone, asked, generate, ids, params, read, streamed, unary, with},
    common::{
        Mesh, h2_connection,
        keys::{KeyFile, tenant},
        with_key,
    },
    inference,
};

const HOUR: Duration = Duration::from_secs(3_600);
const CANCELLED: &str = "kvmesh_calls_total{method=\"VllmEngine/Generate\",outcome=\"CANCELLED\"}";

async fn paced() -> Mesh {
    let config = MockConfig {
        step: Duration::from_millis(1),
        ..MockConfig::default()
    };
    Mesh::start(vec![config], json!({})).await
}

async fn abort(mesh: &Mesh, names: &[&str]) {
    let request_ids = names.iter().map(ToString::to_string).collect();
    let done: AbortResponse = unary(mesh, ABORT, AbortRequest { request_ids })
        .await
        .unwrap();
    assert_eq!(done, AbortResponse {});
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_answer_ends_with_what_it_has() {
    let mesh = paced().await;
    for stream in [true, false] {
        let request = params(asked(100_000, stream), |params| params.n = 2);
        let call = streamed::<_, GenerateResponse>(&mesh, GENERATE, request);
        let answer = call.await.unwrap();
        mesh.wait_figure("kvmesh_open_attempts", 2).await;
        let reader = tokio::spawn(read(answer));
        // Names that nobody has are none.
        abort(&mesh, &["nobody", "mine"]).await;
        let (chunks, ends) = reader.await.unwrap().unwrap();
        assert_eq!(ends.len(), 2);
        for end in ends {
            assert_eq!(end.finish_reason, "abort");
            let count = match stream {
                true => ids(&chunks, end.index).len(),
                false => end.output_ids.len(),
            };
            assert_eq!(end.completion_tokens as usize, count);
        }
        all_gone(&mesh).await;
    }
    mesh.wait_figure(CANCELLED, 4).await;
    let counters = mesh.workers[0]
        .wait_for(Duration::from_secs(60), |counters| counters.cancelled == 4)
        .await;
    assert_eq!(counters.cancelled, 4, "{counters:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_is_aborted_before_its_first_token_too() {
    let mesh = paced().await;
    mesh.workers[0]
        .faults()
        .set(|plan| plan.delay_first_token = HOUR);
    let call = streamed::<_, GenerateResponse>(&mesh, GENERATE, asked(5, true));
    let answer = call.await.unwrap();
    mesh.wait_figure("kvmesh_open_attempts", 1).await;
    abort(&mesh, &["mine"]).await;
    let (chunks, ends) = read(answer).await.unwrap();
    assert!(chunks.is_empty());
    assert_eq!(ends[0].finish_reason, "abort");
    assert_eq!((ends[0].prompt_tokens, ends[0].completion_tokens), (3, 0));
    all_gone(&mesh).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vllms_own_control_aborts_as_well() {
    let mesh = paced().await;
    let options = ResponseOptions::default();
    let request = vllm::GenerateRequest {
        request_id: "mine".to_owned(),
        ..inference::asked(100_000, options)
    };
    let whole = unary::<_, vllm::GenerateResponse>(&mesh, inference::WHOLE, request);
    let control = async {
        mesh.wait_figure("kvmesh_open_attempts", 1).await;
        let request_ids = vec!["mine".to_owned()];
        let message = vllm::AbortRequest { request_ids };
        unary::<_, vllm::AbortResponse>(&mesh, "/vllm.Control/Abort", message)
            .await
            .unwrap()
    };
    let (answer, _) = tokio::join!(whole, control);
    let output = answer.unwrap().outputs.unwrap();
    let end = output.finish_info.unwrap();
    assert_eq!(end.finish_reason(), FinishReason::Aborted);
    assert_eq!(end.num_output_tokens, output.num_tokens);
    all_gone(&mesh).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tenant_aborts_its_own_requests_alone() {
    let keys = KeyFile::new(&format!("{}{}", tenant("shop", ""), tenant("other", "")));
    let config = MockConfig {
        step: Duration::from_millis(1),
        ..MockConfig::default()
    };
    let mesh = Mesh::start_for("shop", vec![config], keys.settings()).await;
    let call = with_key("shop", asked(100_000, true));
    let answer = streamed::<GenerateRequest, GenerateResponse>(&mesh, GENERATE, call)
        .await
        .unwrap();
    let reader = tokio::spawn(read(answer));
    mesh.wait_figure("kvmesh_open_attempts", 1).await;
    let names = || AbortRequest {
        request_ids: vec!["mine".to_owned()],
    };
    for key in ["other", "shop"] {
        assert!(!reader.is_finished());
        let call = with_key(key, names());
        let done = unary::<AbortRequest, AbortResponse>(&mesh, ABORT, call).await;
        done.unwrap();
        // Whoever asks next finds the other's request where it was.
        mesh.wait_figure("kvmesh_open_streams", u64::from(key == "other"))
            .await;
    }
    let (_, ends) = reader.await.unwrap().unwrap();
    assert_eq!(ends[0].finish_reason, "abort");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_reaches_the_worker_of_a_client_that_does_not_read() {
    let mesh = paced().await;
    let mut sender = h2_connection(&mesh).await.ready().await.unwrap();
    let head = http::Request::post(format!("http://router{GENERATE}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let message = prost::Message::encode_to_vec(&asked(100_000, true));
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend(message);
    let (response, mut upload) = sender.send_request(head, false).unwrap();
    upload.send_data(frame.into(), true).unwrap();
    let body = response.await.unwrap().into_body();
    // Its window is full: what comes now is kept for it.
    let filled = async {
        loop {
            if mesh.figure("kvmesh_undelivered_ids").await > 100 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    filled.await;
    abort(&mesh, &["mine"]).await;
    mesh.wait_figure("kvmesh_open_attempts", 0).await;
    let counters = mesh.workers[0]
        .wait_for(Duration::from_secs(60), |counters| counters.cancelled == 1)
        .await;
    assert_eq!(counters.cancelled, 1, "{counters:?}");
    drop((body, upload));
    all_gone(&mesh).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_dropped_is_cancelled_at_once_and_leaves_no_name() {
    let mesh = paced().await;
    for delay in [Duration::ZERO, HOUR] {
        mesh.workers[0]
            .faults()
            .set(|plan| plan.delay_first_token = delay);
        let call = streamed::<_, GenerateResponse>(&mesh, GENERATE, asked(100_000, true));
        let answer = call.await.unwrap();
        mesh.wait_figure("kvmesh_open_attempts", 1).await;
        drop(answer);
        all_gone(&mesh).await;
    }
    mesh.wait_figure(CANCELLED, 2).await;
    mesh.workers[0]
        .faults()
        .set(|plan| plan.delay_first_token = Duration::ZERO);
    // The next of that name is another.
    abort(&mesh, &["mine"]).await;
    let (_, ends) = generate(&mesh, asked(3, false)).await.unwrap();
    assert_eq!(ends[0].finish_reason, "length");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_without_a_name_goes_by_that_of_its_call() {
    let mesh = paced().await;
    let request = GenerateRequest {
        request_id: String::new(),
        ..asked(100_000, true)
    };
    let call = with(request, "x-request-id", "theirs");
    let answer = streamed::<GenerateRequest, GenerateResponse>(&mesh, GENERATE, call);
    let answer = answer.await.unwrap();
    let reader = tokio::spawn(read(answer));
    abort(&mesh, &[""]).await;
    mesh.wait_figure("kvmesh_open_streams", 1).await;
    abort(&mesh, &["theirs"]).await;
    let (_, ends) = reader.await.unwrap().unwrap();
    assert_eq!(ends[0].finish_reason, "abort");
    all_gone(&mesh).await;
}
