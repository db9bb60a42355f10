//! What a stream that was claimed takes of its worker.

use kvmesh_session::WorkerIndex;

use super::{Booking, class_of};
use crate::{mesh::Core, request::AdmittedRequest};

impl Core {
    /// Books a stream that runs on a worker already.
    pub(in crate::mesh) fn book_claimed(
        &self,
        worker: WorkerIndex,
        request: &AdmittedRequest,
        made: usize,
    ) -> Booking {
        let tokens = (request.prompt_ids.len() + made) as u64;
        let class = class_of(request.class);
        let booked = self.dispatcher.placer().book_stream(worker, tokens, class);
        Booking {
            loads: booked.map(|load| (worker, load)).into_iter().collect(),
        }
    }
}
