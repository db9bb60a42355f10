//! What operators wish of workers.

use std::sync::Arc;

use kvmesh_registry::Announced;
use kvmesh_rpc::v1::worker_client::WorkerClient;
use kvmesh_trust::Dialled;
use kvmesh_wire::v1;
use tonic::Code;

use super::{Mesh, asked::Asking, session, table::WorkerEntry};

impl Mesh {
    /// Drains a worker; its streams of this router go on elsewhere, where they can.
    ///
    /// # Errors
    /// [`MeshError`] for an unknown worker, for a drain that would empty a role
    /// and is not forced, and for what the worker answers.
    pub async fn drain(
        &self,
        ask: &v1::DrainWorkerRequest,
    ) -> Result<v1::DrainWorkerResponse, MeshError> {
        let worker = self.worker(&ask.worker_id)?;
        let asking = self.asking(&worker, None, ask.force).await?;
        let drain = v1::DrainRequest {
            grace_ms: ask.grace_ms,
            stop: ask.stop,
        };
        let answer = async { Ok(self.client(&worker).await?.drain(drain).await?) }.await;
        let answer = heard(answer, asking, || {}).await?;
        Ok(v1::DrainWorkerResponse {
            running: answer.into_inner().running,
            staying: self.core.staying(&worker),
        })
    }

    /// Changes a worker's role.
    ///
    /// # Errors
    /// As [`Mesh::drain`].
    pub async fn set_role(&self, ask: &v1::SetWorkerRoleRequest) -> Result<v1::Role, MeshError> {
        let worker = self.worker(&ask.worker_id)?;
        let role = ask.role();
        let asking = self.asking(&worker, Some(role), ask.force).await?;
        self.core.role_begins(&worker, role);
        let set = v1::SetRoleRequest { role: role.into() };
        let answer = async { Ok(self.client(&worker).await?.set_role(set).await?) }.await;
        let answer = heard(answer, asking, || self.core.role_refused(&worker)).await?;
        Ok(answer.into_inner().role())
    }

    /// Notes a change before its worker is asked for it, here and for other routers.
    async fn asking(
        &self,
        worker: &WorkerEntry,
        becomes: Option<v1::Role>,
        force: bool,
    ) -> Result<(Asking, Option<Announced>), MeshError> {
        let asking = self.core.ask_of(worker, becomes, force)?;
        match self.core.announce(worker, becomes, force).await {
            Ok(announced) => Ok((asking, announced)),
            Err(error) => {
                asking.refused();
                Err(error)
            }
        }
    }

    fn worker(&self, id: &str) -> Result<Arc<WorkerEntry>, MeshError> {
        self.core
            .table
            .by_name(id)
            .ok_or_else(|| MeshError::UnknownWorker(id.to_owned()))
    }

    async fn client(&self, worker: &WorkerEntry) -> Result<WorkerClient<Dialled>, MeshError> {
        let connection = session::connect(&self.core.settings, worker).await?;
        Ok(WorkerClient::new(connection.calls))
    }
}

/// What a worker answered. Where that says that nothing changes, what was asked for counts
/// no more; any other error leaves it open.
async fn heard<T>(
    answer: Result<T, MeshError>,
    (asking, announced): (Asking, Option<Announced>),
    refused: impl FnOnce(),
) -> Result<T, MeshError> {
    if answer.as_ref().is_err_and(MeshError::changes_nothing) {
        asking.refused();
        refused();
        if let Some(announced) = announced
            && let Err(error) = announced.withdraw().await
        {
            tracing::info!(%error, "a change that was refused counts until it lapses");
        }
    }
    answer
}

/// Why an administrator's wish was not followed.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    /// No worker of this id.
    #[error("no worker {0:?}")]
    UnknownWorker(String),
    /// It would leave a role empty.
    #[error("this would leave a role without a worker; force it if that is meant")]
    EmptiesRole,
    /// The worker cannot be reached.
    #[error("the worker cannot be reached: {0}")]
    Unreachable(#[from] tonic::transport::Error),
    /// The worker refused.
    #[error("{0}")]
    Worker(#[from] tonic::Status),
}

impl MeshError {
    /// Whether the worker is as it was before: it was not reached, or said no.
    fn changes_nothing(&self) -> bool {
        match self {
            Self::UnknownWorker(_) | Self::EmptiesRole | Self::Unreachable(_) => true,
            Self::Worker(status) => matches!(
                status.code(),
                Code::InvalidArgument
                    | Code::FailedPrecondition
                    | Code::Unimplemented
                    | Code::NotFound
                    | Code::PermissionDenied
                    | Code::Unauthenticated
                    | Code::ResourceExhausted
            ),
        }
    }
}
