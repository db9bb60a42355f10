//! What a generation was, for its spans.

use std::time::Instant;

use kvmesh_wire::v1;

use super::Open;
use crate::{mesh::figures::ms, request::class_name};

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
    /// What came of it since then, with times from there and not from when it `began`.
    pub(in crate::mesh) fn since(mut self, began: Instant, since: Instant) -> Self {
        let before = ms(since.saturating_duration_since(began));
        self.rows
            .retain(|row| row.start_ms + row.duration_ms >= before);
        for row in &mut self.rows {
            let cut = (before - row.start_ms).max(0.0);
            row.start_ms = row.start_ms + cut - before;
            row.duration_ms -= cut;
        }
        let timings = &mut self.timings;
        timings.first_token_ms = (timings.first_token_ms - before).max(0.0);
        match timings.longest_gap_start_ms >= before {
            true => timings.longest_gap_start_ms -= before,
            false => timings.longest_gap_ms = 0.0,
        }
        self
    }

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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_later_call_tells_what_was_since_then() {
        let row = |start_ms, duration_ms| v1::TraceSpan {
            start_ms,
            duration_ms,
            ..v1::TraceSpan::default()
        };
        let whole = |gap_at| Traced {
            rows: vec![row(0.0, 50.0), row(60.0, 80.0), row(120.0, 5.0)],
            timings: v1::Timings {
                first_token_ms: 60.0,
                longest_gap_ms: 4.0,
                longest_gap_start_ms: gap_at,
                ..v1::Timings::default()
            },
            ..Traced::default()
        };
        let began = Instant::now();
        let since = began + Duration::from_millis(100);
        let told = whole(90.0).since(began, since);
        assert_eq!(told.rows, [row(0.0, 40.0), row(20.0, 5.0)]);
        assert_eq!(told.timings.first_token_ms, 0.0);
        assert!(!told.has_gap());
        let told = whole(110.0).since(began, since);
        assert_eq!(told.timings.longest_gap_start_ms, 10.0);
        // A takeover begins with its call.
        assert_eq!(whole(90.0).since(began, began).rows, whole(90.0).rows);
    }
}
