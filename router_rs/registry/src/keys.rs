//! Names of keys in etcd: part of the protocol (PROTOCOLS 4).

/// Where the keys of one cluster lie.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    workers: String,
    routers: String,
    changes: String,
}

impl Keys {
    pub(crate) fn new(cluster: &str) -> Self {
        Self {
            workers: format!("kvmesh/v1/{cluster}/workers/"),
            routers: format!("kvmesh/v1/{cluster}/routers/"),
            changes: format!("kvmesh/v1/{cluster}/changes/"),
        }
    }

    /// Prefix of all workers, with its closing slash.
    pub(crate) fn workers(&self) -> &str {
        &self.workers
    }

    /// Prefix of all routers, with its closing slash.
    pub(crate) fn routers(&self) -> &str {
        &self.routers
    }

    /// Prefix of all changes of workers, with its closing slash.
    pub(crate) fn changes(&self) -> &str {
        &self.changes
    }

    pub(crate) fn worker(&self, id: &str) -> String {
        format!("{}{id}", self.workers)
    }

    pub(crate) fn change(&self, worker: &str) -> String {
        format!("{}{worker}", self.changes)
    }

    pub(crate) fn router(&self, id: &str) -> String {
        format!("{}{id}", self.routers)
    }
}

/// First key after all that start with `prefix`.
pub(crate) fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // Prefixes end in '/', which has a successor.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// Whether a text may be a cluster's, worker's or router's name.
pub(crate) fn is_name(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}
