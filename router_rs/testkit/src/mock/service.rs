//! The gRPC face of the mock worker.

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use kvmesh_rpc::v1::worker_server::Worker;
use kvmesh_wire::v1::{
    DrainRequest, DrainResponse, GetInfoRequest, GetInfoResponse, GetTokenizerRequest,
    GetTokenizerResponse, Role, RouterFrame, SetRoleRequest, SetRoleResponse, TokenizerFile,
    TokenizerHeader, WorkerFrame, get_tokenizer_response::Part,
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::{session, state::State};

/// Frames that wait for a router that reads slowly; then steps wait too.
const FRAMES_AHEAD: usize = 64;
/// Bytes of a tokeniser file in one message.
const PART_BYTES: usize = 1 << 20;
/// How often a held download looks whether it may go on.
const HELD: Duration = Duration::from_millis(1);

pub(super) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Serves `kvmesh.v1.Worker`.
pub(super) struct WorkerService(pub(super) Arc<State>);

#[tonic::async_trait]
impl Worker for WorkerService {
    type AttachStream = Answers<WorkerFrame>;
    type GetTokenizerStream = Answers<GetTokenizerResponse>;

    async fn attach(
        &self,
        request: Request<Streaming<RouterFrame>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let (out, frames) = mpsc::channel(FRAMES_AHEAD);
        // Ends with the session: when the router leaves, or with the worker,
        // whose runtime owns it.
        tokio::spawn(session::run(Arc::clone(&self.0), request.into_inner(), out));
        Ok(Response::new(Box::pin(ReceiverStream::new(frames))))
    }

    async fn get_info(
        &self,
        _: Request<GetInfoRequest>,
    ) -> Result<Response<GetInfoResponse>, Status> {
        Ok(Response::new(GetInfoResponse {
            record: Some(self.0.record.clone()),
            load: Some(self.0.whole_load()),
            routers: self.0.routers(),
            residue: Some(self.0.residue()),
        }))
    }

    async fn get_tokenizer(
        &self,
        request: Request<GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        // A router that leaves ends this call with it.
        while self.0.faults.plan().hold_tokenizer {
            tokio::time::sleep(HELD).await;
        }
        {
            let mut plan = self.0.faults.plan();
            if plan.fail_tokenizer_next > 0 {
                plan.fail_tokenizer_next -= 1;
                return Err(Status::unavailable("asked to fail"));
            }
        }
        let vocabulary = self.0.tokens.vocabulary();
        let header = TokenizerHeader {
            digest: vocabulary.digest().to_owned(),
            files: vocabulary
                .files()
                .iter()
                .map(|file| TokenizerFile {
                    name: file.name.clone(),
                    size: file.bytes.len() as u64,
                })
                .collect(),
        };
        let mut parts = vec![Part::Header(header)];
        if request.into_inner().known_digest != vocabulary.digest() {
            for file in vocabulary.files() {
                let chunks = file.bytes.chunks(PART_BYTES);
                parts.extend(chunks.map(|chunk| Part::Data(Bytes::copy_from_slice(chunk))));
            }
        }
        let answers = parts
            .into_iter()
            .map(|part| Ok(GetTokenizerResponse { part: Some(part) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(answers))))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        self.0.faults.call()?;
        self.0.set_draining(true);
        let running = self.0.counters.running.get() as u32;
        Ok(Response::new(DrainResponse { running }))
    }

    async fn set_role(
        &self,
        request: Request<SetRoleRequest>,
    ) -> Result<Response<SetRoleResponse>, Status> {
        self.0.faults.call()?;
        let role = request.into_inner().role();
        if role == Role::Unspecified {
            return Err(Status::invalid_argument("role"));
        }
        self.0.set_role(role);
        Ok(Response::new(SetRoleResponse { role: role as i32 }))
    }
}
