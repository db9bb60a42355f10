//! Who may call the worker.

use std::sync::Arc;

use http::HeaderMap;
use kvmesh_trust::{ClusterToken, Followed, TOKEN_HEADER};
use tonic::Status;

use crate::settings::Settings;

/// Looks at a call before anything of it is read.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    token: Option<Arc<Followed<ClusterToken>>>,
}

impl Guard {
    pub(crate) fn new(settings: &Settings) -> Self {
        Self {
            token: settings.token.clone(),
        }
    }

    /// Whether a call may be answered. Why not says nothing of the cluster, and is
    /// the same without a token as with a wrong one.
    pub(crate) fn admit(&self, headers: &HeaderMap) -> Result<(), Status> {
        let Some(token) = &self.token else {
            return Ok(());
        };
        let shown = headers.get(TOKEN_HEADER);
        match shown.is_some_and(|shown| token.now().accepts(shown.as_bytes())) {
            true => Ok(()),
            false => Err(Status::unauthenticated(
                "the cluster's token is needed (setting cluster_token_file of routers)",
            )),
        }
    }
}
