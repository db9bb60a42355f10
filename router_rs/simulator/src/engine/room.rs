//! Who gets KV room, and who gives it back (DESIGN 4).

use super::streams::Stream;
use super::{Engine, Outcome, Sequence};
use crate::trace::Trace;

impl Engine {
    /// Takes room from started prompts behind place `before`, the last first,
    /// until so many units can be had. What they computed stays cached.
    pub(super) fn make_room(&mut self, units: u64, before: usize, trace: &Trace) -> bool {
        let mut last = self.prompts.len();
        while units > self.pool.available() && last > before + 1 {
            last -= 1;
            if self.prompts.at(last).started {
                self.stop(last, trace);
            }
        }
        units <= self.pool.available()
    }

    /// Room for the next tokens of the streams whose last unit is full.
    pub(super) fn grow(&mut self, trace: &Trace, out: &mut Vec<Outcome>) {
        loop {
            if self.pool.allocate(self.streams.growth()) {
                self.streams.grown();
                return;
            }
            if self.stop_last_prompt(trace) {
                continue;
            }
            // The youngest stream of the lowest class goes back to its router.
            let Some((stream, left)) = self.streams.take_victim() else {
                return;
            };
            out.push(Outcome::Returned {
                request: stream.sequence.request,
                left,
            });
            self.drop_stream(&stream, trace);
        }
    }

    /// Takes the room of the last prompt that has some.
    fn stop_last_prompt(&mut self, trace: &Trace) -> bool {
        let started = (0..self.prompts.len()).rfind(|at| self.prompts.at(*at).started);
        if let Some(at) = started {
            self.stop(at, trace);
        }
        started.is_some()
    }

    fn stop(&mut self, at: usize, trace: &Trace) {
        let sequence = self.prompts.stop(at);
        let blocks = trace.blocks(sequence.request as usize);
        self.pool.free(sequence.own_units);
        self.pool.release(&blocks[..sequence.held as usize]);
        sequence.own_units = 0;
        sequence.held = 0;
        sequence.computed = 0;
    }

    /// Makes blocks that became full shareable.
    pub(super) fn store(&mut self, sequence: &mut Sequence, trace: &Trace) {
        let blocks = trace.blocks(sequence.request as usize);
        let full = (sequence.computed / self.settings.block_tokens) as usize;
        for block in &blocks[(sequence.held as usize).min(blocks.len())..full.min(blocks.len())] {
            self.pool.store(*block);
            sequence.own_units -= self.pool.block_units();
            sequence.held += 1;
        }
    }

    pub(super) fn drop_room(&mut self, sequence: &Sequence, trace: &Trace) {
        let blocks = trace.blocks(sequence.request as usize);
        self.pool.free(sequence.own_units);
        self.pool.release(&blocks[..sequence.held as usize]);
    }

    pub(super) fn drop_stream(&mut self, stream: &Stream, trace: &Trace) {
        let grown = self.streams.grown_by(stream);
        self.pool.free(grown);
        self.drop_room(&stream.sequence, trace);
    }
}
