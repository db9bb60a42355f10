//! Files of keys.

use std::{fmt::Write, path::PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A file of keys; gone with the test.
pub(crate) struct KeyFile(pub(crate) PathBuf);

impl KeyFile {
    pub(crate) fn new(text: &str) -> Self {
        let name = format!(
            "kvmesh-keys-{}-{:x}",
            std::process::id(),
            rand::random::<u64>()
        );
        let file = Self(std::env::temp_dir().join(name));
        file.write(text);
        file
    }

    /// As those do who deploy: in one piece, by another name.
    pub(crate) fn write(&self, text: &str) {
        let new = self.0.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &self.0).unwrap();
    }

    pub(crate) fn settings(&self) -> Value {
        json!({"api_keys": self.0.to_str().unwrap()})
    }
}

impl Drop for KeyFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A tenant's section, for a key that is its own name.
pub(crate) fn tenant(name: &str, rest: &str) -> String {
    format!(
        "[tenants.{name}]\nkeys_sha256 = ['{}']\n{rest}\n",
        sha256(name)
    )
}

/// A key's digest, as files have it.
pub(crate) fn sha256(key: &str) -> String {
    Sha256::digest(key)
        .iter()
        .fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap();
            text
        })
}
