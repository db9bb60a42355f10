//! The two indexes behind one face.

use crate::workload::Event;
use dynamo_kv_router::indexer::concurrent_radix_tree_compressed::ConcurrentRadixTreeCompressed;
use dynamo_kv_router::indexer::{SyncIndexer, ThreadPoolIndexer};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, RouterEvent,
};
use kvmesh_kv_index::{CacheChange, IndexSettings, Knowledge, KvIndex, Matches, Tier, WorkerSlot};
use std::sync::Arc;

/// An index under test. Events and queries are made ready before the clock
/// starts, each in the index's own types.
pub trait Side: Sync + Sized {
    type Event: Send;
    type Query: Sync;
    type Found: Default;

    fn new(workers: u64) -> Self;
    fn event(event: &Event, id: u64) -> Self::Event;
    fn query(chain: &[u64], local: &[u64]) -> Self::Query;
    /// Hands an event over; it may be applied later.
    fn apply(&self, event: Self::Event);
    /// Returns once everything handed over is applied.
    fn settle(&self);
    fn lookup(&self, query: &Self::Query, found: &mut Self::Found);
    /// Workers found, and the longest match in blocks.
    fn summary(found: &Self::Found) -> (usize, u32);
}

pub struct Ours(KvIndex);

pub struct OurEvent {
    worker: WorkerSlot,
    parent: Option<u64>,
    chain: Vec<u64>,
}

impl Side for Ours {
    type Event = OurEvent;
    type Query = Vec<u64>;
    type Found = Matches;

    fn new(workers: u64) -> Self {
        let index = KvIndex::new(IndexSettings { max_bytes: 1 << 33, ..IndexSettings::default() });
        for _ in 0..workers {
            index.add_worker(16, Knowledge::Events).expect("a slot is free");
        }
        Self(index)
    }

    fn event(event: &Event, _id: u64) -> OurEvent {
        OurEvent {
            worker: WorkerSlot(event.worker as u32),
            parent: event.parent,
            chain: event.chain.clone(),
        }
    }

    fn query(chain: &[u64], _local: &[u64]) -> Vec<u64> {
        chain.to_vec()
    }

    fn apply(&self, event: OurEvent) {
        let (chain, tier) = (event.chain.as_slice(), Tier::Device);
        let change = match event.parent {
            Some(parent) => CacheChange::StoredAfter { parent, chain, tier },
            None => CacheChange::Stored { chain, tier },
        };
        self.0.apply(event.worker, &[change]).expect("the worker is there");
    }

    fn settle(&self) {}

    fn lookup(&self, query: &Vec<u64>, found: &mut Matches) {
        self.0.lookup_into(query, found);
    }

    fn summary(found: &Matches) -> (usize, u32) {
        (found.iter().count(), found.by_slot().iter().max().map_or(0, |tokens| tokens / 16))
    }
}

/// NVIDIA's: the compressed concurrent tree, fed through its pool of threads
/// (the way that its own router takes) and read on the caller's thread.
pub struct Dynamo {
    pool: ThreadPoolIndexer<ConcurrentRadixTreeCompressed>,
    tree: Arc<ConcurrentRadixTreeCompressed>,
}

impl Side for Dynamo {
    type Event = RouterEvent;
    type Query = Vec<LocalBlockHash>;
    type Found = Option<dynamo_kv_router::protocols::OverlapScores>;

    fn new(_workers: u64) -> Self {
        let threads = std::env::var("DYNAMO_THREADS").ok().and_then(|text| text.parse().ok());
        let pool = ThreadPoolIndexer::new(ConcurrentRadixTreeCompressed::new(), threads.unwrap_or(1), 16);
        let tree = pool.backend_arc();
        Self { pool, tree }
    }

    fn event(event: &Event, id: u64) -> RouterEvent {
        let blocks = event.chain.iter().zip(&event.local);
        let data = KvCacheEventData::Stored(KvCacheStoreData {
            parent_hash: event.parent.map(ExternalSequenceBlockHash),
            start_position: None,
            blocks: blocks
                .map(|(chain, local)| KvCacheStoredBlockData {
                    block_hash: ExternalSequenceBlockHash(*chain),
                    tokens_hash: LocalBlockHash(*local),
                    mm_extra_info: None,
                })
                .collect(),
        });
        RouterEvent::new(event.worker, KvCacheEvent { event_id: id, data, dp_rank: 0 })
    }

    fn query(_chain: &[u64], local: &[u64]) -> Vec<LocalBlockHash> {
        local.iter().copied().map(LocalBlockHash).collect()
    }

    fn apply(&self, event: RouterEvent) {
        self.pool.enqueue_event(event).expect("the pool runs");
    }

    fn settle(&self) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(self.pool.flush_and_wait()).expect("the pool runs");
    }

    fn lookup(&self, query: &Vec<LocalBlockHash>, found: &mut Self::Found) {
        *found = Some(self.tree.find_matches(query, false));
    }

    fn summary(found: &Self::Found) -> (usize, u32) {
        let scores = found.as_ref().map(|found| &found.scores);
        let deepest = scores.and_then(|scores| scores.values().max().copied());
        (scores.map_or(0, |scores| scores.len()), deepest.unwrap_or(0))
    }
}
