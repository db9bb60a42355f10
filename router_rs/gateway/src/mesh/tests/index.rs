//! Cache events into the index, and from there into the choice.

use kvmesh_kv_index::{chain_values, namespace_root};

use super::*;

fn telling(step: Duration) -> MockWorker {
    MockWorker::start(MockConfig {
        step,
        cache_events: true,
        ..MockConfig::default()
    })
    .unwrap()
}

fn prompt(first: u32) -> Vec<u32> {
    (first..first + 5_120).map(|id| id % 50).collect()
}

fn chain(worker: &MockWorker, prompt: &[u32]) -> Vec<u64> {
    let model = worker.record().model.as_ref().unwrap();
    chain_values(namespace_root(&model.digest, "", ""), prompt)
}

fn stored(first_event: u64, chain: &[u64]) -> v1::CacheEvents {
    let stored = v1::BlocksStored {
        chain: chain.to_vec(),
        ..v1::BlocksStored::default()
    };
    let kind = Some(v1::cache_event::Kind::Stored(stored));
    v1::CacheEvents {
        first_event,
        events: vec![v1::CacheEvent { kind }],
        snapshot: None,
    }
}

fn part(chain: &[u64], first: bool, last: bool) -> v1::CacheEvents {
    let as_of_event = 9;
    v1::CacheEvents {
        snapshot: Some(v1::SnapshotPart {
            first,
            last,
            as_of_event,
        }),
        ..stored(0, chain)
    }
}

fn indexed(mesh: &Mesh, worker: &MockWorker) -> u64 {
    let rows = mesh.workers();
    let own = |row: &&v1::WorkerStatus| {
        let record = row.record.as_ref();
        record.is_some_and(|record| record.worker_id == worker.worker_id())
    };
    rows.iter().find(own).map_or(0, |row| row.indexed_blocks)
}

#[tokio::test]
async fn a_stored_prefix_draws_its_requests() {
    let workers = [
        telling(Duration::from_millis(20)),
        telling(Duration::from_millis(20)),
    ];
    let mesh = mesh_of(&[&workers[0], &workers[1]]).await;
    for (worker, first) in workers.iter().zip([1, 2]) {
        let asked = prompt(first);
        worker.send_cache(stored(1, &chain(worker, &asked)));
        assert!(until(|| indexed(&mesh, worker) == 320).await);
        let answer = collect(mesh.generate(request(&asked, 2)).unwrap()).await;
        assert_eq!(answer.placed[0].decode_worker, worker.worker_id());
        assert!(answer.placed[0].cached_tokens >= 5_104);
    }
    let mut unknown = stored(2, &[]);
    unknown.events[0].kind = None;
    workers[0].send_cache(unknown);
    let dropped = || mesh.counters().cache_events_dropped.get() == 1;
    assert!(until(dropped).await);
    // A removed block is a hole: what is behind it does not count.
    let blocks = chain(&workers[0], &prompt(1));
    let removed = v1::BlocksRemoved {
        chain: vec![blocks[10]],
        ..v1::BlocksRemoved::default()
    };
    let mut frame = stored(3, &[]);
    frame.events[0].kind = Some(v1::cache_event::Kind::Removed(removed));
    workers[0].send_cache(frame);
    assert!(until(|| indexed(&mesh, &workers[0]) == 319).await);
    let answer = collect(mesh.generate(request(&prompt(1), 2)).unwrap()).await;
    assert!(answer.placed[0].cached_tokens <= 160);
}

#[tokio::test]
async fn the_old_view_stays_until_a_snapshot_is_whole() {
    let worker = telling(Duration::from_millis(1));
    let mesh = mesh_of(&[&worker]).await;
    let (old, new) = (chain(&worker, &prompt(1)), chain(&worker, &prompt(2)));
    worker.send_cache(stored(1, &old));
    assert!(until(|| indexed(&mesh, &worker) == 320).await);
    worker.send_cache(part(&new[..200], true, false));
    worker.send_cache(part(&new[200..300], false, false));
    assert!(until(|| mesh.counters().cache_frames.get() == 3).await);
    let answer = collect(mesh.generate(request(&prompt(1), 2)).unwrap()).await;
    assert!(answer.placed[0].cached_tokens >= 5_104);
    assert_eq!(indexed(&mesh, &worker), 320);
    worker.send_cache(part(&new[300..310], false, true));
    assert!(until(|| indexed(&mesh, &worker) == 310).await);
    let answer = collect(mesh.generate(request(&prompt(1), 2)).unwrap()).await;
    assert_eq!(answer.placed[0].cached_tokens, 0);
    let answer = collect(mesh.generate(request(&prompt(2), 2)).unwrap()).await;
    assert_eq!(answer.placed[0].cached_tokens, 310 * 16);
}

#[tokio::test]
async fn without_events_what_was_sent_counts_as_cached() {
    let both = worker(Role::Both);
    let mesh = mesh_of(&[&both]).await;
    let first = collect(mesh.generate(request(&prompt(1), 2)).unwrap()).await;
    assert_eq!(first.placed[0].cached_tokens, 0);
    let again = collect(mesh.generate(request(&prompt(1), 2)).unwrap()).await;
    assert!(again.placed[0].cached_tokens >= 5_104);
    assert_eq!(indexed(&mesh, &both), 320);
}

/// A worker that tells of its cache, in words that this router does not read.
async fn what_is_sent_counts(config: MockConfig) {
    let both = MockWorker::start(MockConfig {
        cache_events: true,
        ..config
    })
    .unwrap();
    let mesh = mesh_of(&[&both]).await;
    // What it tells is not looked at.
    both.send_cache(stored(1, &chain(&both, &prompt(9))));
    let first = collect(mesh.generate(request(&prompt(1), 2)).unwrap()).await;
    assert_eq!(first.placed[0].cached_tokens, 0);
    let again = collect(mesh.generate(request(&prompt(1), 2)).unwrap()).await;
    assert!(again.placed[0].cached_tokens >= 5_088);
    let other = collect(mesh.generate(request(&prompt(9), 2)).unwrap()).await;
    assert_eq!(other.placed[0].cached_tokens, 0);
    let detail = mesh.workers().remove(0).index_detail;
    assert!(detail.contains("what is sent there counts"), "{detail}");
}

#[tokio::test]
async fn a_worker_of_another_hash_scheme_is_known_by_what_was_sent() {
    what_is_sent_counts(MockConfig {
        hash_scheme: 7,
        ..MockConfig::default()
    })
    .await;
}

#[tokio::test]
async fn a_worker_whose_blocks_end_elsewhere_is_known_by_what_was_sent() {
    what_is_sent_counts(MockConfig {
        block_tokens: 24,
        ..MockConfig::default()
    })
    .await;
}
