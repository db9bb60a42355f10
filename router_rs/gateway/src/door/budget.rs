//! The budget for what requests hold before they are admitted.

use std::{sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::RequestError;

/// Bytes that one permit stands for.
pub(super) const PERMIT_BYTES: u64 = 1_024;
/// When to try again where bytes were the limit: bodies are read and admitted in well under this.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Bytes that all requests may hold together.
#[derive(Clone)]
pub(crate) struct Budget {
    free: Arc<Semaphore>,
    all: usize,
}

impl Budget {
    pub(super) fn new(bytes: u64) -> Self {
        let permits = usize::try_from(bytes / PERMIT_BYTES).unwrap_or(usize::MAX);
        let all = permits.min(Semaphore::MAX_PERMITS);
        Self {
            free: Arc::new(Semaphore::new(all)),
            all,
        }
    }

    /// What is free, and how much there is, in permits.
    pub(super) fn permits(&self) -> (&Arc<Semaphore>, usize) {
        (&self.free, self.all)
    }

    /// Takes so many bytes, now or not at all.
    pub(super) fn take(&self, bytes: u64) -> Result<OwnedSemaphorePermit, RequestError> {
        let permits = u32::try_from(bytes / PERMIT_BYTES + 1).unwrap_or(u32::MAX);
        Arc::clone(&self.free)
            .try_acquire_many_owned(permits)
            .map_err(|_| RequestError::Overloaded {
                reason: "the budget for bytes of requests is spent",
                retry_after: RETRY_AFTER,
            })
    }

    /// Takes what a message becomes, if that is anything: where it is more than there is, to try
    /// again is of no use.
    pub(super) fn take_for(
        &self,
        bytes: usize,
        field: &str,
    ) -> Result<Option<OwnedSemaphorePermit>, RequestError> {
        if bytes == 0 {
            return Ok(None);
        }
        let bytes = bytes as u64;
        let all = self.all as u64 * PERMIT_BYTES;
        if bytes / PERMIT_BYTES >= self.all as u64 {
            let allowed = format!(
                "as JSON it takes up to {bytes} bytes of memory; all requests together have {all}"
            );
            return Err(RequestError::invalid(field, allowed));
        }
        self.take(bytes).map(Some)
    }
}
