//! Wire messages of kvmesh, generated from `proto/`, and their conversion into
//! types that cannot be invalid. Knows nothing of sockets or gRPC.
#![forbid(unsafe_code)]

/// Messages of package `kvmesh.v1`, with the comments of the proto files.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/kvmesh.v1.rs"));
    include!(concat!(env!("OUT_DIR"), "/kvmesh.v1.serde.rs"));
}

/// The compiled `proto/` files as an encoded `FileDescriptorSet`, for gRPC
/// reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
