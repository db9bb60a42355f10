//! What tests and benchmarks of kvmesh stand on: a worker without an engine, a
//! TCP proxy that breaks connections in chosen ways, a checker of client
//! streams and a load client that costs little itself.
#![forbid(unsafe_code)]

pub mod certificates;
pub mod checker;
pub mod etcd;
pub mod fault_proxy;
pub mod load;
pub mod mock;
pub mod process;
pub mod tokens;
pub mod vocabulary;
