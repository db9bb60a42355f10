//! Generated tonic clients and servers over the messages of `kvmesh-wire`.
#![forbid(unsafe_code)]

/// Services of package `kvmesh.v1`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/kvmesh.v1.rs"));
}
