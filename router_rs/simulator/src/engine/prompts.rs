//! Prompts that are not computed yet, most urgent first.

use super::Sequence;

/// The prompts of a worker.
#[derive(Debug, Clone, Default)]
pub(super) struct Prompts {
    /// By key, then request.
    waiting: Vec<Sequence>,
    started: usize,
}

impl Prompts {
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// How many have their room.
    pub(super) fn started(&self) -> usize {
        self.started
    }

    pub(super) fn at(&self, at: usize) -> &Sequence {
        &self.waiting[at]
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.waiting.iter()
    }

    pub(super) fn add(&mut self, sequence: Sequence) {
        let at = self.waiting.partition_point(|other| {
            other
                .key
                .total_cmp(&sequence.key)
                .then(other.request.cmp(&sequence.request))
                .is_lt()
        });
        self.started += usize::from(sequence.started);
        self.waiting.insert(at, sequence);
    }

    pub(super) fn get_mut(&mut self, request: u32) -> Option<&mut Sequence> {
        self.waiting
            .iter_mut()
            .find(|sequence| sequence.request == request)
    }

    pub(super) fn remove(&mut self, request: u32) -> Option<Sequence> {
        let at = self
            .waiting
            .iter()
            .position(|sequence| sequence.request == request)?;
        let sequence = self.waiting.remove(at);
        self.started -= usize::from(sequence.started);
        Some(sequence)
    }

    /// The one at this place has its room now.
    pub(super) fn start(&mut self, at: usize) -> &mut Sequence {
        self.started += 1;
        let sequence = &mut self.waiting[at];
        sequence.started = true;
        sequence
    }

    /// The one at this place has lost its room.
    pub(super) fn stop(&mut self, at: usize) -> &mut Sequence {
        self.started -= 1;
        let sequence = &mut self.waiting[at];
        sequence.started = false;
        sequence
    }
}
