//! The published vectors of hash scheme 1 (proto/hash_vectors.json), which an
//! independent implementation of XXH3 wrote.
#![allow(clippy::unwrap_used)]

use kvmesh_kv_index::{HASH_SCHEME, chain_values, namespace_root};
use serde_json::Value;

fn numbers(list: &Value) -> Vec<u64> {
    let number = |text: &Value| u64::from_str_radix(text.as_str().unwrap(), 16).unwrap();
    list.as_array().unwrap().iter().map(number).collect()
}

#[test]
fn the_published_vectors_hold() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../proto/hash_vectors.json");
    let vectors: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(vectors["scheme"], HASH_SCHEME);
    let cases = vectors["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 6);
    for case in cases {
        let text = |key: &str| case[key].as_str().unwrap();
        let root = namespace_root(text("model_digest"), text("adapter"), text("salt"));
        assert_eq!(format!("{root:016x}"), text("root"), "{}", case["name"]);
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        let chain = chain_values(root, &ids);
        assert_eq!(chain, numbers(&case["chain"]), "{}", case["name"]);
        for (size, names) in case["blocks"].as_object().unwrap() {
            let units = size.parse::<usize>().unwrap() / 16;
            let blocks: Vec<u64> = chain
                .iter()
                .skip(units - 1)
                .step_by(units)
                .copied()
                .collect();
            assert_eq!(blocks, numbers(names), "{}, blocks of {size}", case["name"]);
        }
    }
}
