//! What the client of a request hears that overload ended after it was accepted.

use super::*;

/// One prompt takes far longer than was predicted.
fn stuck_prompts() -> MockWorker {
    MockWorker::start(MockConfig {
        step: Duration::from_millis(20),
        prefill: Duration::from_secs(3_600),
        ..MockConfig::default()
    })
    .unwrap()
}

/// A prompt that computes for 40 ms a thousand tokens by the mock's step model.
fn prompt(first: u32, tokens: u32) -> AdmittedRequest {
    let prompt: Vec<u32> = (first..first + tokens).map(|id| id % 50).collect();
    request(&prompt, 3)
}

async fn retry_after(stream: GenerationStream) -> Duration {
    match collect(stream).await.error {
        Some(RequestError::Overloaded { retry_after, .. }) => retry_after,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn who_would_miss_its_deadline_is_told_what_is_lacking() {
    let both = stuck_prompts();
    let mesh = mesh_of(&[&both]).await;
    let asked = Instant::now();
    let _first = mesh.generate(prompt(1, 51_200)).unwrap();
    // Its first token is predicted for 4 s from now, and stays so.
    let hurried = AdmittedRequest {
        deadline: Some(asked + Duration::from_millis(4_500)),
        ..prompt(2, 51_200)
    };
    let second = mesh.generate(hurried).unwrap();
    assert_eq!(mesh.queued(), 1);
    let told = retry_after(second).await;
    // It is found out with the first load after half a second; what is lacking is what has
    // passed since then, which is no more than has passed by now.
    assert!(told >= Duration::from_millis(100), "{told:?}");
    let lacking = asked.elapsed().saturating_sub(Duration::from_millis(500));
    let rounding = Duration::from_millis(100);
    assert!(told <= lacking + rounding, "{told:?} {lacking:?}");
}

#[tokio::test]
async fn who_waited_in_vain_is_told_the_estimate_but_never_to_come_back_at_once() {
    for (tokens, least, most) in [(5_120, 1_000, 1_000), (51_200, 1_500, 2_100)] {
        let both = stuck_prompts();
        let bound = MeshSettings {
            queue_timeout: Duration::from_millis(2_200),
            ..settings(&[&both])
        };
        let mesh = mesh_with(bound).await;
        let _first = mesh.generate(prompt(1, tokens)).unwrap();
        let second = mesh.generate(prompt(2, tokens)).unwrap();
        assert_eq!(mesh.queued(), 1);
        let told = retry_after(second).await;
        assert!(told >= Duration::from_millis(least), "{tokens}: {told:?}");
        assert!(told <= Duration::from_millis(most), "{tokens}: {told:?}");
    }
}

#[tokio::test]
async fn while_interactive_requests_are_refused_for_their_target_so_are_less_urgent_ones() {
    let both = stuck_prompts();
    let mesh = mesh_of(&[&both]).await;
    let of = |class, first, tokens| AdmittedRequest {
        class,
        ..prompt(first, tokens)
    };
    // Half a second each, and a first token within a second: one computes, one waits.
    let interactive = v1::RequestClass::Interactive;
    let _first = mesh.generate(of(interactive, 1, 12_000)).unwrap();
    let _second = mesh.generate(of(interactive, 2, 12_200)).unwrap();
    let refused = |request| match mesh.generate(request) {
        Err(RequestError::Overloaded { retry_after, .. }) => retry_after,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it is admitted"),
    };
    let told = refused(of(interactive, 3, 12_400));
    assert!(told >= Duration::from_millis(300), "{told:?}");
    assert!(told <= Duration::from_millis(700), "{told:?}");
    let second = Duration::from_secs(1);
    for class in [v1::RequestClass::Standard, v1::RequestClass::Batch] {
        assert_eq!(refused(of(class, 4, 512)), second);
    }
}

#[tokio::test]
async fn without_interactive_requests_others_may_wait_beyond_their_targets() {
    let both = stuck_prompts();
    let mesh = mesh_of(&[&both]).await;
    // Four wait, 8 s of work, and the target of their class is 5 s.
    let streams: Vec<_> = (1..6)
        .map(|first| mesh.generate(prompt(first, 51_200)).unwrap())
        .collect();
    assert_eq!((streams.len(), mesh.queued()), (5, 4));
}
