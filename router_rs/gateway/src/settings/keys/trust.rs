//! Settings of trust: who may call, and how it is known who calls.

use crate::settings::key::{Key, Kind, key};

/// Who may call, and how it is known who calls.
pub(super) const TRUST: &[Key] = &[
    key(
        "insecure",
        Kind::Flag,
        "false",
        "Allow a bind that other machines can reach with neither TLS nor keys: whoever reaches the port can use the models.",
    ),
    key(
        "cluster_token_file",
        Kind::Text,
        "",
        "File of the token that this cluster's routers and workers show each other, a line of 16 characters or more; read again when it changes. Of several lines the first is shown and each is accepted.",
    ),
    key(
        "worker_ca",
        Kind::Text,
        "",
        "PEM file of the authorities that workers' certificates must come from; each has to name its worker as URI:kvmesh://CLUSTER/worker/ID. Given: workers are spoken to over TLS. Read again when it changes, as the two below.",
    ),
    key(
        "worker_cert",
        Kind::Text,
        "",
        "PEM file of the certificate that workers are shown, URI:kvmesh://CLUSTER/router/ID. Needs worker_key and worker_ca.",
    ),
    key(
        "worker_key",
        Kind::Text,
        "",
        "PEM file of that certificate's key.",
    ),
    key(
        "tls_cert",
        Kind::Text,
        "",
        "PEM file of the certificate chain. Needs tls_key.",
    ),
    key(
        "tls_key",
        Kind::Text,
        "",
        "PEM file of the certificate's key.",
    ),
    key(
        "api_keys",
        Kind::Text,
        "",
        "TOML file of tenants and digests of their keys; read again when it changes. Given: calls for inference need a key.",
    ),
    key(
        "tenant_requests_per_s",
        Kind::Real(0.0, 1e9),
        "0",
        "Requests a second of one tenant, on average; those of a second may come at once. 0: any. Without api_keys a tenant is an address.",
    ),
    key(
        "tenant_concurrency",
        Kind::Number(0, 1_000_000_000),
        "0",
        "Requests of one tenant at the same time. 0: any number.",
    ),
    key(
        "etcd_ca",
        Kind::Text,
        "",
        "PEM file of the authorities that etcd's certificate must come from. Given: etcd is spoken to over TLS.",
    ),
    key(
        "etcd_cert",
        Kind::Text,
        "",
        "PEM file of this router's certificate for etcd. Needs etcd_key and etcd_ca.",
    ),
    key(
        "etcd_key",
        Kind::Text,
        "",
        "PEM file of that certificate's key.",
    ),
    key(
        "etcd_server_name",
        Kind::Text,
        "",
        "Name that etcd's certificate has, where it is not the one in etcd's address.",
    ),
    key(
        "etcd_user",
        Kind::Text,
        "",
        "User at etcd. Needs etcd_password.",
    ),
    key(
        "etcd_password",
        Kind::Text,
        "",
        "Password at etcd. Best given by its variable: flags can be read by everyone on the machine.",
    ),
];
