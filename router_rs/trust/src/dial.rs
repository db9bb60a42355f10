//! Calls to workers: what is shown with each one.

use std::sync::Arc;

use tonic::{
    Request, Status,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use crate::{
    followed::Followed,
    token::{ClusterToken, TOKEN_HEADER},
};

/// A connection over which calls show what they have to.
pub type Dialled = InterceptedService<Channel, Shown>;

/// What workers are shown.
#[derive(Clone, Debug, Default)]
pub struct Dialer {
    /// The cluster's token.
    pub token: Option<Arc<Followed<ClusterToken>>>,
}

impl Dialer {
    /// Connects to a worker.
    ///
    /// # Errors
    /// Where it cannot be reached.
    pub async fn connect(&self, endpoint: Endpoint) -> Result<Dialled, tonic::transport::Error> {
        let channel = endpoint.connect().await?;
        let shown = Shown(self.token.clone());
        Ok(InterceptedService::new(channel, shown))
    }

    /// Takes changed files, for as long as it is polled.
    pub async fn follow(self) {
        if let Some(token) = self.token {
            token.follow_and_log(|_| {}).await;
        }
    }
}

/// Adds the cluster's token to a call.
#[derive(Clone, Debug)]
pub struct Shown(Option<Arc<Followed<ClusterToken>>>);

impl Interceptor for Shown {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            let shown = token.now().shown().clone();
            request.metadata_mut().insert(TOKEN_HEADER, shown);
        }
        Ok(request)
    }
}
