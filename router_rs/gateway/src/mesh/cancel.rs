//! Ends generations by their ids, for those who did not open them.

use kvmesh_session::{
    GenerationId,
    generation::{Event, Stop},
};

use super::Mesh;

impl Mesh {
    /// Ends a generation as if its client had gone: its stream ends as cancelled.
    /// One that is not open is none.
    pub(crate) fn cancel(&self, id: &str) {
        let Some(id) = GenerationId::from_hex(id) else {
            return;
        };
        if let Some(open) = self.core.opened(id) {
            open.apply(Event::Stop(Stop::ClientGone));
        }
    }
}
