//! Which worker is chosen, by which policy, and what is told of it.

use kvmesh_scheduler::{Columns, Rule, ScoreError, Scorer};

use super::*;

async fn with_policy(workers: &[&MockWorker], policy: PolicySettings) -> Arc<Mesh> {
    mesh_with(MeshSettings {
        policy,
        ..settings(workers)
    })
    .await
}

fn explained(mesh: &Mesh, answer: &Answer) -> v1::Decision {
    let id = &answer.accepted.as_ref().unwrap().generation_id;
    let mut known = mesh.explain(id).unwrap();
    assert_eq!(known.decisions.len(), 1);
    known.decisions.remove(0)
}

#[tokio::test]
async fn salted_prompts_go_to_workers_that_take_salts_and_else_it_is_said_what_to_do() {
    let takes_salts = |no_cache_salt| {
        MockWorker::start(MockConfig {
            no_cache_salt,
            ..MockConfig::default()
        })
        .unwrap()
    };
    let (bare, able) = (takes_salts(true), takes_salts(false));
    let salted = |at: u32| AdmittedRequest {
        cache_salt: "shop\u{1f}".to_owned(),
        ..request(&[at; 64], 5)
    };
    let mesh = mesh_of(&[&bare, &able]).await;
    for at in 1..9 {
        let answer = collect(mesh.generate(salted(at)).unwrap()).await;
        assert_eq!((answer.error, answer.ids.len()), (None, 5));
        // At the first try: its record says what it refuses.
        assert_eq!(answer.placed.len(), 1);
        assert_eq!(answer.placed[0].decode_worker, able.worker_id());
    }
    let alone = mesh_of(&[&bare]).await;
    let answer = collect(alone.generate(request(&[1; 64], 5)).unwrap()).await;
    assert_eq!((answer.error, answer.ids.len()), (None, 5));
    let refused = alone.generate(salted(1)).err().expect("nobody takes it");
    let told = refused.to_string();
    assert!(
        told.contains("hints.cache_salt") && told.contains("--salted-prompts"),
        "{told}"
    );
    assert_eq!(refused.code_and_reason().1, "UNSUPPORTED");
}

#[tokio::test]
async fn a_decision_shows_every_plan_with_its_terms_and_what_came_of_it() {
    let workers = [Role::Prefill, Role::Prefill, Role::Decode, Role::Decode].map(|role| {
        MockWorker::start(MockConfig {
            role,
            step: Duration::from_millis(1),
            ..MockConfig::default()
        })
        .unwrap()
    });
    let mesh = mesh_of(&workers.each_ref()).await;
    let answer = collect(mesh.generate(request(&[1; 64], 5)).unwrap()).await;
    let decision = explained(&mesh, &answer);
    assert_eq!(decision.policy, COST);
    assert_eq!((decision.weighed, decision.plans.len()), (4, 4));
    let names: Vec<&str> = workers.iter().map(MockWorker::worker_id).collect();
    let mut pairs = Vec::new();
    for plan in &decision.plans {
        let sum: f64 = plan.terms.iter().map(|term| term.ms).sum();
        assert!((sum - plan.total_ms).abs() < 1e-6, "{plan:?}");
        assert!(names[..2].contains(&plan.prefill_worker.as_str()));
        assert!(names[2..].contains(&plan.decode_worker.as_str()));
        pairs.push((&plan.prefill_worker, &plan.decode_worker));
    }
    pairs.sort();
    pairs.dedup();
    assert_eq!(pairs.len(), 4);
    let chosen = &decision.plans[decision.chosen as usize];
    assert_eq!(chosen.ttft_ms, decision.predicted_ttft_ms);
    assert_eq!(answer.placed[0].prefill_worker, chosen.prefill_worker);
    assert_eq!(answer.placed[0].decode_worker, chosen.decode_worker);
    let (predicted, actual) = (decision.predicted.unwrap(), decision.actual.unwrap());
    assert!(
        predicted.ttft_ms > 0.0 && actual.ttft_ms > 0.0,
        "{decision:?}"
    );
    assert_eq!(actual.ttft_ms, decision.actual_ttft_ms);
    let counters = mesh.counters();
    assert_eq!(counters.ttft_errors.read().1, 1);
    assert_eq!(
        (counters.plans_split.get(), counters.plans_whole.get()),
        (1, 0)
    );
}

#[tokio::test]
async fn no_more_plans_are_kept_than_the_setting_says() {
    let workers = [worker(Role::Both), worker(Role::Both), worker(Role::Both)];
    let mut policy = PolicySettings::default();
    policy.cost.plans_kept = 1;
    let mesh = with_policy(&workers.each_ref(), policy).await;
    let answer = collect(mesh.generate(request(&[1; 64], 5)).unwrap()).await;
    let decision = explained(&mesh, &answer);
    // The best one, and the chosen one where that is another.
    assert!((1..=2).contains(&decision.plans.len()));
    assert_eq!(decision.weighed, 3);
}

#[tokio::test]
async fn every_fixed_policy_serves() {
    for name in Rule::NAMES {
        let workers = [worker(Role::Prefill), worker(Role::Decode)];
        let policy = PolicySettings {
            name: name.to_owned(),
            ..PolicySettings::default()
        };
        let mesh = with_policy(&workers.each_ref(), policy).await;
        let answer = collect(mesh.generate(request(&[1; 64], 5)).unwrap()).await;
        assert_eq!((answer.error.as_ref(), answer.ids.len()), (None, 5));
        assert_eq!(explained(&mesh, &answer).policy, name);
        assert!(until(|| nothing_left(&mesh, &workers.each_ref())).await);
    }
}

/// Takes the worker with the highest number.
struct Last;

impl Scorer for Last {
    fn score(&self, plans: &Columns) -> Result<Vec<f64>, ScoreError> {
        let workers = plans.column("decode_worker").unwrap();
        Ok(workers.iter().map(|worker| -worker).collect())
    }

    fn failed(&self, error: &ScoreError) {
        panic!("{error}");
    }
}

#[tokio::test]
async fn a_scorer_chooses_instead_of_the_cost() {
    let workers = [worker(Role::Both), worker(Role::Both)];
    let policy = PolicySettings {
        scorer: Some(Arc::new(Last)),
        ..PolicySettings::default()
    };
    let mesh = with_policy(&workers.each_ref(), policy).await;
    let mut chosen = Vec::new();
    for n in 0..6 {
        let answer = collect(mesh.generate(request(&[n; 32], 3)).unwrap()).await;
        assert_eq!(explained(&mesh, &answer).policy, SCORED);
        chosen.push(answer.placed[0].decode_worker.clone());
    }
    chosen.dedup();
    assert_eq!(chosen.len(), 1);
}

#[tokio::test]
async fn tenants_of_a_class_take_turns() {
    let both = MockWorker::start(MockConfig {
        step: Duration::from_millis(20),
        prefill: Duration::from_millis(60),
        ..MockConfig::default()
    })
    .unwrap();
    let mesh = mesh_of(&[&both]).await;
    // 200 ms each by the mock's step model; no two share a prefix.
    let of = |n: u32, tenant| {
        let prompt: Vec<u32> = (n..n + 5_120).map(|id| id % 50).collect();
        AdmittedRequest {
            tenant,
            ..request(&prompt, 2)
        }
    };
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut all = Vec::new();
    // One tenant sends four, then another one.
    for (n, tenant) in [1, 1, 1, 1, 2].into_iter().enumerate() {
        let stream = mesh.generate(of(n as u32, tenant)).unwrap();
        let order = Arc::clone(&order);
        all.push(tokio::spawn(async move {
            assert_eq!(collect(stream).await.error, None);
            order.lock().unwrap().push(tenant);
        }));
    }
    // The first is under way.
    assert_eq!(mesh.queued(), 4);
    for one in all {
        one.await.unwrap();
    }
    let order: Vec<u128> = order.lock().unwrap().clone();
    let place = order.iter().position(|tenant| *tenant == 2).unwrap();
    assert!(place <= 2, "{order:?}");
    assert!(until(|| nothing_left(&mesh, &[&both])).await);
}
