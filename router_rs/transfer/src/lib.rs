//! KV blocks between workers: one copy on a host, TCP between hosts.
