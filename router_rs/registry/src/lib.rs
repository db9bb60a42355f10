//! Who exists: workers and routers in etcd.
#![forbid(unsafe_code)]
