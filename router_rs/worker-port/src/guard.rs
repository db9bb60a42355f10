//! Who may call the worker.

use std::sync::Arc;

use http::{Extensions, Request};
use kvmesh_trust::{ClusterToken, Followed, Role, TOKEN_HEADER};
use tonic::Status;

use crate::{incoming::Caller, settings::Settings};

/// Looks at a call before anything of it is read.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    token: Option<Arc<Followed<ClusterToken>>>,
    by_certificate: bool,
}

impl Guard {
    pub(crate) fn new(settings: &Settings) -> Self {
        Self {
            token: settings.token.clone(),
            by_certificate: settings.tls.is_some(),
        }
    }

    /// Whether a call may be answered. Why not says nothing of the cluster.
    pub(crate) fn admit<B>(&self, method: &str, call: &Request<B>) -> Result<(), Status> {
        if self.by_certificate {
            admit_certified(method, call.extensions())?;
        }
        let Some(token) = &self.token else {
            return Ok(());
        };
        // The same without a token as with a wrong one.
        let shown = call.headers().get(TOKEN_HEADER);
        match shown.is_some_and(|shown| token.now().accepts(shown.as_bytes())) {
            true => Ok(()),
            false => Err(Status::unauthenticated(
                "the cluster's token is needed (setting cluster_token_file of routers)",
            )),
        }
    }
}

/// What moves a worker or its requests is for routers and administrators; what it is
/// may be asked by anybody of the cluster.
fn admit_certified(method: &str, extensions: &Extensions) -> Result<(), Status> {
    let identity = extensions
        .get::<Caller>()
        .and_then(|caller| caller.0.as_ref());
    let Some(identity) = identity else {
        return Err(Status::unauthenticated(
            "a certificate of this cluster is needed (settings worker_cert and worker_key of \
             routers)",
        ));
    };
    match (method, identity.role) {
        (_, Role::Router | Role::Admin) | ("GetInfo" | "GetTokenizer", Role::Worker) => Ok(()),
        (_, Role::Worker) => Err(Status::permission_denied(
            "this is for certificates of role router or admin",
        )),
    }
}
