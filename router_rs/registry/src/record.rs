//! Records as they stand in etcd.

use kvmesh_wire::v1::WorkerRecord;
use serde::{Deserialize, Serialize};

use crate::keys::is_name;

/// A record that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not the JSON that it should be.
    #[error("record {key} cannot be read: {reason}")]
    Unreadable {
        /// Its key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A field has a value that is not allowed.
    #[error("record of {id:?}: {field} is {value:?}; allowed is {allowed}")]
    Field {
        /// Id in the record.
        id: String,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
}

/// A router as clients find it. The form is that of etcd's gRPC resolvers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterRecord {
    /// Name of the router: 1 to 128 characters of `[A-Za-z0-9._-]`.
    pub router_id: String,
    /// Address that clients connect to, "host:port".
    pub address: String,
}

#[derive(Serialize, Deserialize)]
struct ResolverEntry {
    #[serde(rename = "Addr")]
    address: String,
}

impl RouterRecord {
    /// The value under the router's key.
    ///
    /// # Errors
    /// [`RecordError`] for a name or an address that is none.
    pub fn to_json(&self) -> Result<Vec<u8>, RecordError> {
        check_id(&self.router_id, &self.router_id, "router id")?;
        check_address(&self.router_id, "address", &self.address)?;
        let entry = ResolverEntry {
            address: self.address.clone(),
        };
        serde_json::to_vec(&entry).map_err(|error| unreadable(&self.router_id, error))
    }

    /// Reads a router's value; `id` is the end of its key.
    ///
    /// # Errors
    /// [`RecordError`] for what cannot be used.
    pub fn from_json(id: &str, value: &[u8]) -> Result<Self, RecordError> {
        let entry: ResolverEntry =
            serde_json::from_slice(value).map_err(|error| unreadable(id, error))?;
        check_id(id, id, "router id")?;
        check_address(id, "address", &entry.address)?;
        Ok(Self {
            router_id: id.to_owned(),
            address: entry.address,
        })
    }
}

/// The value under a worker's key: protobuf JSON.
///
/// # Errors
/// [`RecordError`] for a record that cannot be used.
pub fn worker_to_json(record: &WorkerRecord) -> Result<Vec<u8>, RecordError> {
    check_worker(record)?;
    serde_json::to_vec(record).map_err(|error| unreadable(&record.worker_id, error))
}

/// Reads a worker's value; `id` is the end of its key.
///
/// # Errors
/// [`RecordError`] for what cannot be used.
pub fn worker_from_json(id: &str, value: &[u8]) -> Result<WorkerRecord, RecordError> {
    let record: WorkerRecord =
        serde_json::from_slice(value).map_err(|error| unreadable(id, error))?;
    check_worker(&record)?;
    if record.worker_id != id {
        return Err(RecordError::Field {
            id: id.to_owned(),
            field: "worker id",
            value: record.worker_id,
            allowed: "the end of its key",
        });
    }
    Ok(record)
}

fn check_worker(record: &WorkerRecord) -> Result<(), RecordError> {
    let id = &record.worker_id;
    check_id(id, id, "worker id")?;
    check_address(id, "address", &record.address)?;
    if !record.transfer_address.is_empty() {
        check_address(id, "transfer address", &record.transfer_address)?;
    }
    if record.incarnation == 0 {
        return Err(RecordError::Field {
            id: id.clone(),
            field: "incarnation",
            value: "0".to_owned(),
            allowed: "any other number",
        });
    }
    Ok(())
}

fn check_id(id: &str, value: &str, field: &'static str) -> Result<(), RecordError> {
    if is_name(value) {
        return Ok(());
    }
    Err(RecordError::Field {
        id: id.to_owned(),
        field,
        value: value.to_owned(),
        allowed: "1 to 128 characters of A-Z a-z 0-9 . _ -",
    })
}

fn check_address(id: &str, field: &'static str, value: &str) -> Result<(), RecordError> {
    let good = value.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty()
            && !host.contains(char::is_whitespace)
            && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if good {
        return Ok(());
    }
    Err(RecordError::Field {
        id: id.to_owned(),
        field,
        value: value.to_owned(),
        allowed: "\"host:port\"",
    })
}

pub(crate) fn unreadable(key: &str, error: serde_json::Error) -> RecordError {
    RecordError::Unreadable {
        key: key.to_owned(),
        reason: error.to_string(),
    }
}
