//! The span of a call that resumes, over real sockets.
#![allow(missing_docs, clippy::unwrap_used)]

#[allow(dead_code)]
mod collector;
mod common;

use std::time::Duration;

use collector::{Collector, SAMPLED, below, hex, text};
use common::{Mesh, request};
use kvmesh_testkit::mock::MockConfig;
use kvmesh_wire::v1::{self, generate_response::Event};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use serde_json::json;
use tonic::{Code, Status};

/// Reads a stream until there are tokens: its id, and what it brought.
async fn begun(stream: &mut tonic::Streaming<v1::GenerateResponse>) -> (String, Vec<u32>) {
    let mut id = String::new();
    loop {
        match stream.message().await.unwrap().unwrap().event.unwrap() {
            Event::Accepted(accepted) => id = accepted.generation_id,
            Event::Tokens(tokens) => return (id, tokens.ids),
            _ => {}
        }
    }
}

/// How the rest of a stream ends.
async fn end(mut stream: tonic::Streaming<v1::GenerateResponse>) -> Result<(), Status> {
    while stream.message().await?.is_some() {}
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_resumes_is_part_of_the_trace_that_the_request_is_in() {
    let other = format!("00-{}-00f067aa0ba902b9-01", "ab".repeat(16));
    for given in [None, Some(&other)] {
        let mut collector = Collector::start().await;
        let worker = MockConfig {
            step: Duration::from_millis(2),
            ..MockConfig::default()
        };
        // Of those that name no parent none.
        let settings = json!({"otlp_endpoint": collector.address(), "otlp_share": 0});
        let mut mesh = Mesh::start(vec![worker], settings).await;
        let mut client = mesh.client().await;
        let mut asked = request(200);
        asked.hints.get_or_insert_default().resumable = true;
        let first = client.generate(below(SAMPLED, asked)).await.unwrap();
        let mut first = first.into_inner();
        let (generation_id, token_ids) = begun(&mut first).await;
        let again = v1::ResumeRequest {
            generation_id,
            next_index: token_ids.len() as u32,
            token_ids,
        };
        let again = match given {
            Some(parent) => below(parent, again),
            None => tonic::Request::new(again),
        };
        let resumed = client.resume(again).await.unwrap();
        let told = resumed.metadata().get("traceparent").unwrap().clone();
        end(resumed.into_inner()).await.unwrap();
        let taken_over = end(first).await.unwrap_err();
        assert_eq!(taken_over.code(), Code::Aborted);

        let mut spans = Vec::new();
        let servers = |spans: &[Span]| {
            let servers = spans.iter().filter(|span| span.kind() == SpanKind::Server);
            servers.cloned().collect::<Vec<_>>()
        };
        while servers(&spans).len() < 2 {
            spans.extend(collector.request().await);
        }
        let named = |method: &str| {
            let all = servers(&spans).into_iter();
            let mut all = all.filter(|span| text(span, "rpc.method") == method);
            all.next().unwrap()
        };
        let (first, resumed) = (named("Generate"), named("Resume"));
        assert_eq!(resumed.name, "kvmesh.v1.Inference/Resume");
        let (trace, own) = (hex(&resumed.trace_id), hex(&resumed.span_id));
        match given {
            None => {
                assert_eq!(told.to_str().unwrap(), format!("00-{trace}-{own}-01"));
                assert_eq!(resumed.trace_id, first.trace_id);
                assert_eq!(resumed.parent_span_id, first.span_id);
                assert!(resumed.links.is_empty());
            }
            Some(_) => {
                assert_eq!(told.to_str().unwrap(), other, "as it was sent");
                assert_eq!(trace, &other[3..35]);
                let link = (&resumed.links[0].trace_id, &resumed.links[0].span_id);
                assert_eq!(link, (&first.trace_id, &first.span_id));
            }
        }
        let below: Vec<_> = spans
            .iter()
            .filter(|span| span.parent_span_id == resumed.span_id)
            .collect();
        assert!(below.iter().any(|span| span.name == "decode"));
        for span in below {
            assert!(span.start_time_unix_nano >= resumed.start_time_unix_nano);
        }
        // One that resumes nothing is of no trace that is told.
        let nothing = client.resume(v1::ResumeRequest {
            generation_id: "07".repeat(16),
            ..v1::ResumeRequest::default()
        });
        assert_eq!(nothing.await.unwrap_err().code(), Code::NotFound);
        mesh.stop().await;
        assert!(servers(&collector.all()).is_empty());
    }
}
