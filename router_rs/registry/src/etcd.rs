//! The subset of etcd's v3 API that is called, generated from `proto/etcd`.

/// Keys, values and events.
#[allow(missing_docs, unreachable_pub, dead_code, clippy::all)]
pub(crate) mod mvccpb {
    include!(concat!(env!("OUT_DIR"), "/mvccpb.rs"));
}

/// Requests, answers and clients.
#[allow(missing_docs, unreachable_pub, dead_code, clippy::all)]
pub(crate) mod etcdserverpb {
    include!(concat!(env!("OUT_DIR"), "/etcdserverpb.rs"));
}
