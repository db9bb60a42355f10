//! What routers send to a worker: any commands in any order, over real sockets,
//! to the port before an engine that answers each placement.
//!
//! The port refuses or hands on; when the session is over nothing runs.
#![no_main]

use kvmesh_fuzz::messages;
use kvmesh_rpc::v1::worker_client::WorkerClient;
use kvmesh_wire::v1::{
    self, Opening, ProtocolVersion, Reserved, RouterFrame, RouterHello, StageEnd, opening::Answer,
    router_frame::Frame,
};
use kvmesh_worker_port::{EngineLoad, Event, Part, Port, Report, Settings, TokenizerFiles};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    runtime: Runtime,
    client: WorkerClient<Channel>,
}

static PORT: LazyLock<Port> = LazyLock::new(|| {
    let settings = Settings {
        orphan_ttl: Duration::from_millis(1),
        load_interval: Duration::from_millis(50),
        ..Settings::default()
    };
    let port = Port::bind("127.0.0.1:0", settings).expect("a free port on loopback");
    let record = v1::WorkerRecord {
        worker_id: "w".to_owned(),
        incarnation: 1,
        address: port.address().to_string(),
        role: v1::Role::Both.into(),
        ..Default::default()
    };
    let files = TokenizerFiles::default();
    port.serve(record, files).expect("it was not served before");
    std::thread::spawn(engine);
    port
});

/// Answers each placement, and ends it when it is told to.
fn engine() {
    while let Some(events) = PORT.wait(Duration::from_secs(1)) {
        let mut report = Report {
            load: EngineLoad::default(),
            ..Report::default()
        };
        for event in events {
            match event {
                Event::Placed { session, place, .. } => {
                    let part = Part {
                        openings: vec![Opening {
                            generation: place.generation.clone(),
                            owner: place.owner,
                            attempt: place.attempt,
                            stage: place.stage,
                            answer: Some(Answer::Reserved(Reserved::default())),
                        }],
                        ends: vec![StageEnd {
                            generation: place.generation.clone(),
                            owner: place.owner,
                            attempt: place.attempt,
                            stage: place.stage,
                            timings: None,
                            end: Some(v1::stage_end::End::Cancelled(v1::Cancelled::default())),
                        }],
                        ..Part::default()
                    };
                    report.parts.push((session, part));
                }
                Event::SnapshotWanted { session } => {
                    if PORT.begin_snapshot(&session) {
                        // False: the session is gone, which may be.
                        let _ = PORT.add_snapshot(&session, None);
                    }
                }
                Event::InfoWanted { call } => PORT.answer_info(call, v1::Residue::default()),
                _ => {}
            }
        }
        if !report.parts.is_empty() {
            PORT.step(report).expect("its columns fit");
        }
    }
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let url = format!("http://{}", PORT.address());
    let connected = runtime.block_on(WorkerClient::connect(url));
    let client = connected.expect("the port answers");
    World { runtime, client }
});

fn hello() -> RouterFrame {
    RouterFrame {
        number: 0,
        frame: Some(Frame::Hello(RouterHello {
            version: Some(ProtocolVersion { major: 1, minor: 0 }),
            router_id: "r".to_owned(),
            router_incarnation: 7,
            ..Default::default()
        })),
    }
}

async fn talk(mut client: WorkerClient<Channel>, data: &[u8]) {
    let Some((how, rest)) = data.split_first() else {
        return;
    };
    let mut frames: Vec<_> = messages(rest)
        .filter_map(|message| RouterFrame::decode(message).ok())
        .collect();
    if how % 4 != 0 {
        frames.insert(0, hello());
    }
    let Ok(answer) = client.attach(tokio_stream::iter(frames)).await else {
        return;
    };
    let mut answer = answer.into_inner();
    // Its side ends when ours has: with a status, or without.
    while let Ok(Some(_)) = answer.message().await {}
}

fuzz_target!(|data: &[u8]| {
    let world = &*WORLD;
    let talked = async { tokio::time::timeout(PATIENCE, talk(world.client.clone(), data)).await };
    world.runtime.block_on(talked).expect("the session ends");
    let until = Instant::now() + PATIENCE;
    while PORT.running() > 0 {
        assert!(
            Instant::now() < until,
            "{} attempts are left",
            PORT.running()
        );
        let _ = PORT.wait_idle(Duration::from_millis(1));
    }
});
