//! What is kept of a generation's spans, and what its client gets of them.

use super::*;

#[tokio::test]
async fn explain_has_the_spans_that_came_and_a_client_those_that_it_asked_for() {
    // By the share, by the client, by the collector.
    for (share, trace, traced) in [
        (0.0, false, false),
        (1.0, false, false),
        (0.0, true, false),
        (0.0, false, true),
    ] {
        let both = worker(Role::Both);
        let mesh = mesh_with(MeshSettings {
            explain_traces: share,
            ..settings(&[&both])
        })
        .await;
        let asked = AdmittedRequest {
            trace,
            traced,
            ..request(&[5, 6], 20)
        };
        let answer = collect(mesh.generate(asked).unwrap()).await;
        let told = answer.finished.unwrap();
        assert_eq!(told.trace.is_empty(), !trace);
        let id = answer.accepted.unwrap().generation_id;
        let kept = mesh.explain(&id).unwrap().finished.unwrap();
        let names: Vec<_> = kept.trace.iter().map(|span| span.name.as_str()).collect();
        let wanted = share > 0.0 || trace || traced;
        for name in ["decide", "prefill_chunk", "decode"] {
            assert_eq!(names.contains(&name), wanted, "{name} of {names:?}");
        }
        // All else is the same.
        let trace = told.trace.clone();
        assert_eq!(v1::Finished { trace, ..kept }, told);
        mesh.shutdown(Duration::ZERO).await;
    }
}
