//! Hash scheme 1: names of prompt prefixes.

use xxhash_rust::xxh3::xxh3_64;

/// Tokens a chain value stands for, whatever a worker's block size is.
pub const UNIT_TOKENS: usize = 16;

/// Number of the scheme below, as `Capabilities.hash_scheme`.
pub const HASH_SCHEME: u32 = 1;

/// The value that a prompt's first unit has as its parent: XXH3-64 (seed 0)
/// over model digest, adapter digest and cache salt, in this order, each as
/// its length in bytes (8 bytes, little-endian) and its bytes. Lengths make
/// the encoding unambiguous: no two triples have the same bytes.
///
/// `model_digest` is the digest's 64 hexadecimal digits in lower case, as
/// `ModelRecord.digest`; `adapter` its digest as text, empty for the base
/// model; `salt` as `Continuation.cache_salt`.
pub fn namespace_root(model_digest: &str, adapter: &str, salt: &str) -> u64 {
    let parts = [model_digest, adapter, salt];
    let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.len() + 8).sum());
    for part in parts {
        bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
        bytes.extend_from_slice(part.as_bytes());
    }
    xxh3_64(&bytes)
}

/// Chain values of a prompt: one for each full unit of 16 ids, a rest of
/// fewer has none. Value i is XXH3-64 (seed 0) over 72 bytes: value i - 1
/// (for the first: `root`) as 8 bytes little-endian, then the unit's 16 ids
/// as u32 little-endian. A block of 16 k tokens is named by the value at its
/// end.
pub fn chain_values(root: u64, ids: &[u32]) -> Vec<u64> {
    let mut values = Vec::with_capacity(ids.len() / UNIT_TOKENS);
    chain_values_into(root, ids, &mut values);
    values
}

/// As [`chain_values`], appended to `values`.
pub fn chain_values_into(root: u64, ids: &[u32], values: &mut Vec<u64>) {
    let mut parent = root;
    let mut bytes = [0u8; 8 + 4 * UNIT_TOKENS];
    for unit in ids.chunks_exact(UNIT_TOKENS) {
        bytes[..8].copy_from_slice(&parent.to_le_bytes());
        for (place, id) in bytes[8..].chunks_exact_mut(4).zip(unit) {
            place.copy_from_slice(&id.to_le_bytes());
        }
        parent = xxh3_64(&bytes);
        values.push(parent);
    }
}
