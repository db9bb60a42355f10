//! What a generation was, for its spans.

use kvmesh_wire::v1;

use super::Open;
use crate::request::class_name;

/// A generation as it is told to a collector of spans: counts, times and names, no
/// text and no token.
#[derive(Debug, Default)]
pub(crate) struct Traced {
    /// Its id, as `Accepted` tells it.
    pub(crate) generation: String,
    pub(crate) model: String,
    /// Its class, as settings write it.
    pub(crate) class: &'static str,
    /// Whether it was asked for as a chat.
    pub(crate) chat: bool,
    pub(crate) max_tokens: u32,
    /// Worker that it was decoded on at last; empty for none.
    pub(crate) decode_worker: String,
    pub(crate) usage: v1::Usage,
    pub(crate) timings: v1::Timings,
    /// As `Finished.trace`.
    pub(crate) rows: Vec<v1::TraceSpan>,
}

impl Traced {
    /// Whether there was a time between two messages with tokens.
    pub(crate) fn has_gap(&self) -> bool {
        self.timings.longest_gap_ms > 0.0
    }
}

impl Open {
    /// What it was until now; `output_tokens` is what the client got.
    pub(in crate::mesh) fn traced(&self, output_tokens: u32) -> Traced {
        let request = &self.request;
        let prompt = u32::try_from(request.prompt_ids.len()).unwrap_or(u32::MAX);
        let (decode, traced) = {
            let state = self.lock();
            let (figures, attempts) = (&state.figures, state.machine.fence().attempt);
            let traced = Traced {
                usage: figures.usage(prompt, output_tokens, attempts),
                timings: figures.timings(request),
                rows: figures.trace(request),
                ..Traced::default()
            };
            (figures.decode(), traced)
        };
        Traced {
            generation: self.id.to_string(),
            model: request.model.clone(),
            class: class_name(request.class),
            chat: request.chat,
            max_tokens: request.max_tokens,
            decode_worker: decode.map_or_else(String::new, |worker| self.core.table.name(worker)),
            ..traced
        }
    }
}
