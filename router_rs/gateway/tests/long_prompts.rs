//! Long prompts beside short ones, over real sockets.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::sync::mpsc;

use common::{Mesh, get, read, request};
use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::v1::{self, generate_request::Input};
use serde_json::json;
use tokio::task::JoinSet;

/// Prompts of the report (GAIE #2928): 20 at once, 220 KB each.
const AT_ONCE: usize = 20;
const TEXT_BYTES: usize = 220_000;
/// Token ids that are not hashed at once: 64 of them count as a byte of text.
const IDS: usize = 300_000;

fn of(input: Input) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(input),
        ..request(2)
    }
}

/// Asks for all of them at once, each on a connection of its own.
async fn ask_all(mesh: &Mesh, asked: &v1::GenerateRequest) -> JoinSet<usize> {
    let mut all = JoinSet::new();
    for _ in 0..AT_ONCE {
        let mut client = mesh.client().await;
        let asked = asked.clone();
        all.spawn(async move {
            let stream = client.generate(asked).await.unwrap().into_inner();
            read(stream).await.0.len()
        });
    }
    all
}

#[test]
fn who_asks_little_is_answered_while_no_long_prompt_gets_on() {
    // One thread serves, and one has whatever takes long: the router's own settings would
    // let it have more of them.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let config = MockConfig {
            context_length: 1 << 20,
            ..MockConfig::default()
        };
        let mesh = Mesh::start(vec![config], json!({})).await;
        let text = "so it goes on. ".repeat(TEXT_BYTES / 15);
        let ids = (0..IDS as u32).map(|id| id % 50).collect();
        for long in [
            of(Input::Prompt(text)),
            of(Input::TokenIds(v1::TokenIds { ids })),
        ] {
            let (hold, gate) = mpsc::channel::<()>();
            let (begin, began) = tokio::sync::oneshot::channel();
            let held = tokio::task::spawn_blocking(move || {
                begin.send(()).unwrap();
                gate.recv().unwrap_or_default();
            });
            began.await.unwrap();
            let placed = mesh.workers[0].counters().placed;
            let mut all = ask_all(&mesh, &long).await;
            // All of them are read. That gives nothing back before a request is open.
            let bytes = prost::Message::encoded_len(&long) as u64 * AT_ONCE as u64;
            while mesh.figure("kvmesh_request_bytes_held ").await < bytes {
                assert!(all.try_join_next().is_none(), "one was answered");
            }
            let mut client = mesh.client().await;
            for short in [request(2), of(Input::Prompt("so it goes".to_owned()))] {
                let stream = client.generate(short).await.unwrap().into_inner();
                assert_eq!(read(stream).await.0.len(), 2);
            }
            assert!(get(&mesh, "/health").await.starts_with("HTTP/1.1 200"));
            assert!(mesh.figure("kvmesh_request_bytes_held ").await >= bytes);
            assert_eq!(mesh.workers[0].counters().placed, placed + 2);
            drop(hold);
            held.await.unwrap();
            while let Some(tokens) = all.join_next().await {
                assert_eq!(tokens.unwrap(), 2);
            }
            assert_eq!(
                mesh.workers[0].counters().placed,
                placed + 2 + AT_ONCE as u64
            );
        }
    });
}
