//! Wire messages of kvmesh, generated from `proto/`, and their conversion into
//! types that cannot be invalid. Knows nothing of sockets or gRPC.
#![forbid(unsafe_code)]

mod output;

pub use output::output_digest;

/// Messages of package `kvmesh.v1`, with the comments of the proto files.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/kvmesh.v1.rs"));
    include!(concat!(env!("OUT_DIR"), "/kvmesh.v1.serde.rs"));
}

/// Messages of vLLM's own gRPC API (package `vllm`), and of the service that SMG puts
/// in front of an engine (`vllm.grpc.engine`). Theirs, not ours.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod vllm {
    include!(concat!(env!("OUT_DIR"), "/vllm.rs"));

    /// SMG's service.
    pub mod grpc {
        /// Its messages.
        pub mod engine {
            include!(concat!(env!("OUT_DIR"), "/vllm.grpc.engine.rs"));
        }
    }
}

/// Messages that SMG's services share. Theirs, not ours.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod smg {
    /// As its package is named.
    pub mod grpc {
        /// The messages.
        pub mod common {
            include!(concat!(env!("OUT_DIR"), "/smg.grpc.common.rs"));
        }
    }
}

/// The compiled `proto/kvmesh` files as an encoded `FileDescriptorSet`, for gRPC
/// reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The compiled `proto/vllm` files in the same form.
pub const FOREIGN_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/foreign.bin"));
