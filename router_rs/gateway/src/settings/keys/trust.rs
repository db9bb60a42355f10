//! Settings of trust: who may call, and how it is known who calls.

use crate::settings::key::{HOUR, Key, Kind, key};

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
        "admin_listen",
        Kind::AddressOrNone,
        "",
        "Address where Admin and /metrics are answered, and there only. Empty: they are answered on listen, Admin to callers of this machine. Set it where a proxy on this machine brings clients to listen: all of them come from this machine.",
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
        "jwt_keys",
        Kind::Text,
        "",
        "JWKS file of the keys that sign clients' tokens (JWT: HS256, RS256, ES256, EdDSA); read again when it changes. Given: calls for inference need such a token or, with api_keys, a key. Needs jwt_issuer and jwt_audience.",
    ),
    key(
        "jwt_issuer",
        Kind::Text,
        "",
        "What a token's iss has to be.",
    ),
    key(
        "jwt_audience",
        Kind::Text,
        "",
        "What a token's aud has to be or to have.",
    ),
    key(
        "jwt_tenant_claim",
        Kind::Text,
        "sub",
        "Claim of a token that names the tenant, a text.",
    ),
    key(
        "jwt_leeway",
        Kind::Time(0, HOUR),
        "30s",
        "How far clocks may be apart: a token holds so much longer than its exp, and so much before its nbf.",
    ),
    key(
        "tls_cert",
        Kind::Text,
        "",
        "PEM file of the certificate chain that clients are shown; read again when it changes, as its key. Needs tls_key.",
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
        "PEM file of the authorities that etcd's certificate must come from. Given: etcd is spoken to over TLS. Read again when it changes, as etcd_cert and etcd_key are.",
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
