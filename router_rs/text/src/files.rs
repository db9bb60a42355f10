//! The files that a worker sends, and their digest.

use sha2::{Digest, Sha256};
use std::fmt::Write;

/// One tokeniser file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextFile {
    /// Name, without a path: "tokenizer.json", "tokenizer_config.json" or
    /// "chat_template.jinja".
    pub name: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Digest of the files in this order, as `TokenizerHeader.digest` in
/// worker.proto: SHA-256 over, for each file, its name, a zero byte, its size
/// as 8 bytes little-endian and its bytes; 64 lower-case hexadecimal digits.
pub fn digest_of(files: &[TextFile]) -> String {
    let mut hash = Sha256::new();
    for file in files {
        hash.update(file.name.as_bytes());
        hash.update([0]);
        hash.update((file.bytes.len() as u64).to_le_bytes());
        hash.update(&file.bytes);
    }
    let mut text = String::with_capacity(64);
    for byte in hash.finalize() {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
