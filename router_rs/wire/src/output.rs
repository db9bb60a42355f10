//! What output ids are known by before they are sent.

use xxhash_rust::xxh3::Xxh3Default;

/// Ids that are hashed at once.
const AT_ONCE: usize = 256;

/// Digest of output ids, as `Found.output_digest` has it. Tells outputs of one generation
/// apart; nobody who could make two meet has anything of it.
#[must_use]
pub fn output_digest(ids: &[u32]) -> u64 {
    let mut digest = Xxh3Default::new();
    let mut bytes = [0; 4 * AT_ONCE];
    for part in ids.chunks(AT_ONCE) {
        for (place, id) in bytes.chunks_exact_mut(4).zip(part) {
            place.copy_from_slice(&id.to_le_bytes());
        }
        digest.update(&bytes[..4 * part.len()]);
    }
    digest.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_of_the_ids_alone_however_many_there_are() {
        let ids: Vec<u32> = (0..1_000).map(|id| id * 77).collect();
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        for len in [0, 1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 1_000] {
            let whole = xxhash_rust::xxh3::xxh3_64(&bytes[..4 * len]);
            assert_eq!(output_digest(&ids[..len]), whole, "{len}");
        }
        assert_ne!(output_digest(&[1, 2]), output_digest(&[2, 1]));
    }
}
