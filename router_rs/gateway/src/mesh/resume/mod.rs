//! Generations that a client goes on with after it lost its stream (PROTOCOLS 2, Resume):
//! here, where this router has them, else by Find and Claim from the workers.

mod asked;
mod rate;
mod taking;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use kvmesh_session::GenerationId;

pub(crate) use asked::ResumeAsked;
#[cfg(test)]
pub(super) use asked::tests::asked as asked_for;
use rate::Rate;
pub(super) use taking::Taking;

use super::{Core, GenerationStream, Mesh, open::Open, session::ById};
use crate::error::RequestError;

/// Generations that are on their way here, and how often tenants ask for one.
#[derive(Default)]
pub(super) struct Resumes {
    takings: Mutex<ById<Arc<Taking>>>,
    rate: Rate,
}

impl Resumes {
    // An insert or a removal is whole.
    fn lock(&self) -> MutexGuard<'_, ById<Arc<Taking>>> {
        self.takings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The takeover of a generation that is under way.
    pub(super) fn get(&self, id: &GenerationId) -> Option<Arc<Taking>> {
        self.lock().get(id).cloned()
    }

    /// Whether it is the only one of its generation.
    fn add(&self, taking: &Arc<Taking>) -> bool {
        let mut all = self.lock();
        let alone = !all.contains_key(&taking.asked.id);
        if alone {
            all.insert(taking.asked.id, Arc::clone(taking));
        }
        alone
    }

    fn remove(&self, id: &GenerationId) {
        self.lock().remove(id);
    }
}

impl Mesh {
    /// Goes on with a running generation from the index that the client names.
    ///
    /// # Errors
    /// [`RequestError::UnknownGeneration`] for whatever cannot be had; that a tenant asks
    /// too often; that others claim it at the same time.
    pub(crate) async fn resume(
        &self,
        asked: ResumeAsked,
    ) -> Result<GenerationStream, RequestError> {
        let resumed = self.resume_any(asked).await;
        if matches!(resumed, Err(RequestError::UnknownGeneration)) {
            self.core.counters.resumed.unknown.add(1);
        }
        resumed
    }

    async fn resume_any(&self, asked: ResumeAsked) -> Result<GenerationStream, RequestError> {
        self.core.resumes.rate.take(asked.tenant, Instant::now())?;
        let here = self.core.open_as(&asked.id);
        let (open, reader) = match here {
            Some(open) => {
                let reader = open.attach(&asked)?;
                self.core.counters.resumed.here.add(1);
                (open, reader)
            }
            None => (Taking::take(&self.core, &asked).await?, 0),
        };
        self.stream(open, reader, &asked)
    }

    fn stream(
        &self,
        open: Arc<Open>,
        reader: u32,
        asked: &ResumeAsked,
    ) -> Result<GenerationStream, RequestError> {
        let text = match &open.request.text {
            None => Ok(None),
            Some(settings) => {
                let model = self.core.models.get(&open.request.model);
                let model = model.ok_or(RequestError::UnknownGeneration);
                model.and_then(|model| {
                    let stream = model.text.stream(settings);
                    stream
                        .map(Some)
                        .map_err(|_| RequestError::UnknownGeneration)
                })
            }
        };
        match text {
            Ok(text) => Ok(GenerationStream::resumed(open, reader, text, asked)),
            Err(error) => {
                open.close(reader);
                Err(error)
            }
        }
    }
}

impl Core {
    fn open_as(&self, id: &GenerationId) -> Option<Arc<Open>> {
        let all = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(id).cloned()
    }
}
