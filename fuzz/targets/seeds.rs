//! Writes the inputs that fuzzing begins with: `seeds FOLDER` makes a folder for
//! each target, with messages as they really come.

use kvmesh_fuzz::input;
use kvmesh_wire::v1;
use prost::Message;
use std::path::Path;

fn generate() -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: "mock".to_owned(),
        input: Some(v1::generate_request::Input::Prompt(
            "Hello there".to_owned(),
        )),
        stopping: Some(v1::Stopping {
            max_tokens: 4,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn router_frames() -> Vec<Vec<u8>> {
    let place = v1::Place {
        generation: vec![1; 16].into(),
        owner: 1,
        attempt: 1,
        stage: v1::Stage::Whole.into(),
        ..Default::default()
    };
    let cancel = v1::Cancel {
        generation: vec![1; 16].into(),
        owner: 1,
        attempt: 1,
        ..Default::default()
    };
    let frames = [
        v1::router_frame::Frame::Place(place),
        v1::router_frame::Frame::Cancel(cancel),
    ];
    let numbered = frames.into_iter().zip(1..);
    numbered
        .map(|(frame, number)| {
            let frame = Some(frame);
            v1::RouterFrame { number, frame }.encode_to_vec()
        })
        .collect()
}

fn worker_frames() -> Vec<Vec<u8>> {
    let (generation, owner, attempt) = (vec![1_u8; 16], 1, 1);
    let stage = v1::Stage::Whole.into();
    let opening = v1::Opening {
        generation: generation.clone().into(),
        owner,
        attempt,
        stage,
        answer: Some(v1::opening::Answer::Reserved(v1::Reserved::default())),
    };
    let rows = v1::TokenRows {
        generations: generation.clone().into(),
        owners: vec![owner],
        attempts: vec![attempt],
        first_indices: vec![0],
        counts: vec![2],
        ids: vec![5, 6],
        logprobs: Vec::new(),
    };
    let end = v1::StageEnd {
        generation: generation.into(),
        owner,
        attempt,
        stage,
        timings: None,
        end: Some(v1::stage_end::End::Finished(v1::StageFinished {
            reason: v1::FinishReason::Stop.into(),
            stop_token_id: None,
        })),
    };
    let steps = [
        v1::StepOutput {
            openings: vec![opening],
            ..Default::default()
        },
        v1::StepOutput {
            tokens: Some(rows),
            ..Default::default()
        },
        v1::StepOutput {
            ends: vec![end],
            ..Default::default()
        },
    ];
    let frame = |step| v1::WorkerFrame {
        frame: Some(v1::worker_frame::Frame::Step(step)),
    };
    steps.map(|step| frame(step).encode_to_vec()).to_vec()
}

fn with_head(head: &[u8], rest: &[u8]) -> Vec<u8> {
    [head, rest].concat()
}

fn session() -> Vec<u8> {
    let planned = vec![2_u8];
    let frames = worker_frames();
    let frames = frames.into_iter().map(|frame| with_head(&[0], &frame));
    input(std::iter::once(planned).chain(frames))
}

fn transfer() -> Vec<u8> {
    let pull = v1::Pull {
        transfer_id: vec![1; 16].into(),
        ..Default::default()
    };
    let frame = v1::TransferFrame {
        frame: Some(v1::transfer_frame::Frame::Pull(pull)),
    };
    with_head(&[2], &input([frame.encode_to_vec()]))
}

fn text() -> Vec<Vec<u8>> {
    let template = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}\
        {% if add_generation_prompt %}<|assistant|>{% endif %}";
    let tokenizer = include_str!("../../router_rs/text/tests/data/metaspace.json");
    let said = "What is the capital of France? é 世界";
    vec![
        input([
            Vec::new(),
            Vec::new(),
            template.into(),
            said.into(),
            b"{\"a\": 1}".to_vec(),
        ]),
        input([
            tokenizer.into(),
            b"{\"bos_token\": \"<s>\"}".to_vec(),
            template.into(),
            said.into(),
        ]),
    ]
}

fn front() -> Vec<Vec<u8>> {
    let http = |path: u8, body: &str| with_head(&[path << 2 | 3, 0], body.as_bytes());
    let grpc = |call: u8, message: &[u8]| with_head(&[call << 2 | 1, 0], message);
    let chat = r#"{"model": "mock", "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 3, "stream": true, "stop": ["x"], "logit_bias": {"5": 1}}"#;
    let completion = r#"{"model": "mock", "prompt": [5, 6, 7], "max_tokens": 3, "n": 2}"#;
    let timed = with_head(&[1, 3, 0, b'5', b'S'], &generate().encode_to_vec());
    vec![
        with_head(&[0], b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"),
        with_head(
            &[0],
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        ),
        grpc(0, &generate().encode_to_vec()),
        timed,
        http(0, chat),
        http(1, completion),
        http(3, r#"{"model": "mock", "prompt": "Hi"}"#),
        http(4, r#"{"model": "mock", "tokens": [5, 6]}"#),
    ]
}

fn records() -> Vec<Vec<u8>> {
    let worker = r#"{"workerId": "worker", "incarnation": "5", "address": "10.0.0.1:4000",
        "role": "ROLE_BOTH", "model": {"name": "m", "digest": "ab"}}"#;
    let mut all = vec![
        with_head(&[0], worker.as_bytes()),
        with_head(&[1], br#"{"Addr": "10.0.0.1:4000"}"#),
        with_head(&[2], &generate().encode_to_vec()),
    ];
    all.extend(router_frames().iter().map(|frame| with_head(&[3], frame)));
    all.extend(worker_frames().iter().map(|frame| with_head(&[4], frame)));
    all
}

fn main() -> std::io::Result<()> {
    let folder = std::env::args().nth(1).ok_or_else(|| {
        let what = "the folder to write to is missing: seeds FOLDER";
        std::io::Error::new(std::io::ErrorKind::InvalidInput, what)
    })?;
    let all = [
        ("records", records()),
        ("session", vec![session()]),
        ("text", text()),
        ("events", vec![(0..=255).collect()]),
        ("transfer", vec![transfer()]),
        ("port", vec![with_head(&[1], &input(router_frames()))]),
        ("front", front()),
    ];
    for (target, inputs) in all {
        let folder = Path::new(&folder).join(target);
        std::fs::create_dir_all(&folder)?;
        for (number, input) in inputs.iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{number}")), input)?;
        }
    }
    Ok(())
}
