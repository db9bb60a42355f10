//! Cache events of other engines (vLLM's), and the index that they go into.
#![no_main]

use arbitrary::{Arbitrary, Result, Unstructured};
use kvmesh_kv_index::{
    CacheChange, Foreign, ForeignBlocks, IndexSettings, Knowledge, KvIndex, Tier, chain_values,
    namespace_root,
};
use libfuzzer_sys::fuzz_target;

/// Names that the translator keeps: few, so that some are forgotten.
const NAMES: usize = 16;

#[derive(Debug)]
enum Event {
    Stored {
        parent: Option<u8>,
        hashes: Vec<u8>,
        ids: Vec<u8>,
        block_tokens: u8,
        group: u8,
    },
    Removed(Vec<u8>),
    Cleared,
    Sequence(u8),
}

impl<'a> Arbitrary<'a> for Event {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u8::arbitrary(u)? % 8 {
            0..=4 => Self::Stored {
                parent: Option::arbitrary(u)?,
                hashes: few(u)?,
                ids: few(u)?,
                block_tokens: u8::arbitrary(u)?,
                group: u8::arbitrary(u)? % 2,
            },
            5 | 6 => Self::Removed(few(u)?),
            _ if bool::arbitrary(u)? => Self::Cleared,
            _ => Self::Sequence(u8::arbitrary(u)?),
        })
    }
}

fn few(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let length = usize::from(u8::arbitrary(u)? % 24);
    Ok(u.bytes(length.min(u.len()))?.to_vec())
}

/// The ids of some blocks, in most cases as many as there should be.
fn ids_of(given: &[u8], wanted: usize, one_less: bool) -> Vec<u32> {
    let wanted = wanted - usize::from(one_less && wanted > 0);
    let ids = given
        .iter()
        .cycle()
        .take(if given.is_empty() { 0 } else { wanted });
    ids.map(|id| u32::from(*id)).collect()
}

fuzz_target!(|events: Vec<Event>| {
    let index = KvIndex::new(IndexSettings::default());
    let added = index.add_worker(16, Knowledge::Events);
    let worker = added.expect("there is room for one");
    let apply = |change: CacheChange<'_>| index.apply(worker, &[change]).expect("it is there");
    let root = namespace_root("model", "", "");
    let mut foreign = Foreign::new(NAMES, 0);
    for event in events {
        match event {
            Event::Stored {
                parent,
                hashes,
                ids,
                block_tokens,
                group,
            } => {
                let odd = block_tokens > 250;
                let block_tokens = usize::from(block_tokens % 4) * 16 + usize::from(odd);
                let hashes: Vec<u64> = hashes.into_iter().map(u64::from).collect();
                let blocks = ForeignBlocks {
                    parent: parent.map(u64::from),
                    hashes: &hashes,
                    ids: &ids_of(&ids, block_tokens * hashes.len(), group == 1),
                    block_tokens,
                    group: u32::from(group),
                    tier: Tier::Device,
                    extra_keys: false,
                };
                let Ok(own) = foreign.stored(root, &blocks) else {
                    continue;
                };
                assert_eq!(own.chain.len(), hashes.len());
                apply(CacheChange::StoredAfter {
                    parent: own.parent,
                    chain: &own.chain,
                    tier: Tier::Device,
                });
                for (value, tier) in own.forgotten {
                    let chain = &[value];
                    apply(CacheChange::Removed { chain, tier });
                }
            }
            Event::Removed(hashes) => {
                let hashes: Vec<u64> = hashes.into_iter().map(u64::from).collect();
                let chain = &foreign.removed(0, Tier::Device, &hashes);
                let tier = Tier::Device;
                apply(CacheChange::Removed { chain, tier });
            }
            Event::Cleared => {
                foreign.cleared(None);
                apply(CacheChange::Cleared);
            }
            Event::Sequence(number) => {
                let _ = foreign.hear(u64::from(number));
            }
        }
        assert!(foreign.stats().names <= NAMES);
    }
    // All that it was told of can be taken out again.
    apply(CacheChange::Cleared);
    assert_eq!(index.held(worker), 0);
    let chain = chain_values(root, &[7; 64]);
    assert_eq!(index.lookup(&chain).tokens(worker), 0);
});
