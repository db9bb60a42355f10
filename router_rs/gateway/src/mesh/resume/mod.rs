//! Generations that a client goes on with after it lost its stream (PROTOCOLS 2, Resume):
//! here, where this router has them, else by Find and Claim from the workers.

mod asked;
mod fit;
mod rate;
mod taking;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use kvmesh_session::GenerationId;
use kvmesh_text::TextStream;

pub(crate) use asked::ResumeAsked;
#[cfg(test)]
pub(super) use asked::tests::asked as asked_for;
use rate::Rate;
#[cfg(test)]
pub(super) use taking::PANICS_IN_ITS_TAKEOVER;
pub(super) use taking::Taking;

use super::{GenerationStream, Mesh, open::Open, session::ById};
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

    /// It is over; another one of the same generation may be under way already.
    fn remove(&self, id: &GenerationId, taking: &Taking) {
        let mut all = self.lock();
        if all.get(id).is_some_and(|of| std::ptr::eq(&**of, taking)) {
            all.remove(id);
        }
    }
}

impl Mesh {
    /// Whether a tenant may make one more call of Resume: asked before anything of it is
    /// read.
    ///
    /// # Errors
    /// That it asks too often.
    pub(crate) fn may_resume(&self, tenant: u128) -> Result<(), RequestError> {
        let a_second = self.core.settings.streams.tenant_resumes_per_s;
        self.core
            .resumes
            .rate
            .take(tenant, a_second, Instant::now())
    }

    /// Goes on with a running generation from the index that the client names. `was_cut`
    /// says of a call that is dropped meanwhile whether its client may come back.
    ///
    /// # Errors
    /// [`RequestError::UnknownGeneration`] for whatever cannot be had;
    /// [`RequestError::NotYet`] where that cannot be said yet.
    pub(crate) async fn resume(
        &self,
        asked: ResumeAsked,
        was_cut: impl Fn() -> bool,
    ) -> Result<GenerationStream, RequestError> {
        let resumed = self.resume_any(asked, was_cut).await;
        if matches!(resumed, Err(RequestError::UnknownGeneration)) {
            self.core.counters.resumed.unknown.add(1);
        }
        resumed
    }

    /// Whether this router has what a call asks for, and would give it.
    pub(crate) fn has(&self, asked: &ResumeAsked) -> bool {
        let open = self.core.opened(asked.id);
        open.is_some_and(|open| open.gives(asked))
    }

    async fn resume_any(
        &self,
        asked: ResumeAsked,
        was_cut: impl Fn() -> bool,
    ) -> Result<GenerationStream, RequestError> {
        if let Some(open) = self.core.opened(asked.id) {
            // Looked at first: whoever reads it now loses it.
            let text = self.text_of(&open)?;
            let reader = open.attach(&asked)?;
            self.core.counters.resumed.here.add(1);
            return Ok(GenerationStream::resumed(open, reader, text, &asked));
        }
        let open = Taking::take(&self.core, &asked, was_cut).await?;
        match self.text_of(&open) {
            Ok(text) => Ok(GenerationStream::resumed(open, 0, text, &asked)),
            Err(error) => {
                // It runs, and another call may have better luck.
                open.leave(0, None);
                Err(error)
            }
        }
    }

    fn text_of(&self, open: &Open) -> Result<Option<TextStream>, RequestError> {
        let Some(settings) = &open.request.text else {
            return Ok(None);
        };
        let model = self.core.models.get(&open.request.model);
        let model = model.ok_or(RequestError::UnknownGeneration)?;
        let stream = model.text.stream(settings);
        stream
            .map(Some)
            .map_err(|_| RequestError::UnknownGeneration)
    }
}
