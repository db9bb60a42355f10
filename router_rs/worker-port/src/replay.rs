//! What was said to a router, kept for a while: a session that breaks takes what
//! is on its way with it, and nobody knows how much that was.
//!
//! Frames are kept as they were encoded, so that nothing is done a token; only a
//! router that comes back has them read again.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use bytes::Bytes;
use kvmesh_wire::v1::{
    Opening, RowLogprobs, StageEnd, StepOutput, TokenRows, WorkerFrame, opening::Answer,
    worker_frame::Frame,
};
use prost::Message;

use crate::{
    attempt::{AttemptId, NamesAttempt},
    report::{Part, Rows},
    session::Held,
};

/// Step frames that were sent.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    frames: VecDeque<(Instant, Bytes)>,
    bytes: usize,
    /// When the youngest frame that is not kept any more was queued.
    gone: Option<Instant>,
}

impl Sent {
    /// Keeps a frame; the oldest go where that is more than `most` bytes.
    pub(crate) fn keep(&mut self, queued: Instant, frame: Bytes, most: usize) {
        self.bytes += frame.len();
        self.frames.push_back((queued, frame));
        while self.bytes > most
            && let Some((at, frame)) = self.frames.pop_front()
        {
            self.bytes -= frame.len();
            self.gone = Some(at);
        }
    }

    /// Keeps nothing: what was queued until then is not told again.
    pub(crate) fn forget(&mut self, until: Instant) {
        self.frames.clear();
        self.bytes = 0;
        self.gone = Some(until);
    }
}

/// What a router that comes back wants of an attempt.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// The attempt.
    pub(crate) id: AttemptId,
    /// First output index that the router lacks.
    pub(crate) next_index: u32,
}

/// Says again what the frames said of each attempt that is wanted and known, in
/// the order of `wanted`. What does not reach back to where its router is, is
/// unknown.
pub(crate) fn replay(
    sent: &Sent,
    waiting: &VecDeque<(Instant, Bytes)>,
    wanted: &[Wanted],
    held: &BTreeMap<AttemptId, Held>,
) -> Vec<(Wanted, Part)> {
    let mut told: BTreeMap<&AttemptId, Told> = wanted
        .iter()
        .map(|wanted| (&wanted.id, Told::default()))
        .collect();
    for (_, frame) in sent.frames.iter().chain(waiting) {
        // Our own bytes; anything but step output is of no interest.
        if let Ok(WorkerFrame {
            frame: Some(Frame::Step(step)),
        }) = WorkerFrame::decode(frame.clone())
        {
            read(step, &mut told);
        }
    }
    let known = |wanted: &Wanted| {
        let told = told.remove(&wanted.id)?;
        let part = told.part(wanted, held.get(&wanted.id), sent.gone)?;
        Some((wanted.clone(), part))
    };
    wanted.iter().filter_map(known).collect()
}

/// What frames said of one attempt.
#[derive(Debug, Default)]
struct Told {
    opening: Option<Opening>,
    rows: Vec<(u32, Vec<u32>, Option<RowLogprobs>)>,
    end: Option<StageEnd>,
}

fn read(step: StepOutput, told: &mut BTreeMap<&AttemptId, Told>) {
    for opening in step.openings {
        if let Some(of) = opening.attempt_id().and_then(|id| told.get_mut(&id)) {
            of.opening = Some(opening);
        }
    }
    if let Some(rows) = step.tokens {
        read_rows(&rows, told);
    }
    for end in step.ends {
        if let Some(of) = end.attempt_id().and_then(|id| told.get_mut(&id)) {
            of.end = Some(end);
        }
    }
}

fn read_rows(rows: &TokenRows, told: &mut BTreeMap<&AttemptId, Told>) {
    let mut ids = rows.ids.as_slice();
    let generations = rows.generations.chunks_exact(16);
    let columns = rows.owners.iter().zip(&rows.attempts);
    let places = rows.first_indices.iter().zip(&rows.counts);
    for (row, ((generation, (owner, attempt)), (first, count))) in
        (0_u32..).zip(generations.zip(columns).zip(places))
    {
        let (own, rest) = ids.split_at((*count as usize).min(ids.len()));
        ids = rest;
        let id = AttemptId::parse(generation, *owner, *attempt);
        if let Some(of) = id.and_then(|id| told.get_mut(&id)) {
            let logprobs = rows.logprobs.iter().find(|entry| entry.row == row);
            of.rows.push((*first, own.to_vec(), logprobs.cloned()));
        }
    }
}

impl Told {
    /// All of it from the wanted index on; `None`: it is not known, or not from
    /// there.
    fn part(self, wanted: &Wanted, held: Option<&Held>, gone: Option<Instant>) -> Option<Part> {
        let opening = held.and_then(|held| held.opening.clone()).or(self.opening);
        let refused = |opening: &Opening| matches!(opening.answer, Some(Answer::Refused(_)));
        if held.is_none() && self.end.is_none() && !opening.as_ref().is_some_and(refused) {
            return None;
        }
        let mut next = wanted.next_index;
        let after = |first: u32, ids: &[u32]| first.saturating_add(ids.len() as u32);
        // A row that ends where the router is, or frames that reach back to the
        // attempt's begin: none is missing.
        let reaches = self
            .rows
            .iter()
            .any(|(first, ids, _)| after(*first, ids) >= next)
            || gone.is_none_or(|gone| held.is_some_and(|held| held.placed > gone));
        if !reaches {
            return None;
        }
        let mut rows = Rows::default();
        for (first, ids, logprobs) in &self.rows {
            let end = after(*first, ids);
            if end <= next {
                continue;
            }
            if *first > next {
                return None;
            }
            let skip = (next - first) as usize;
            rows.generations.extend_from_slice(&wanted.id.generation);
            rows.owners.push(wanted.id.owner);
            rows.attempts.push(wanted.id.attempt);
            rows.first_indices.push(next);
            rows.counts.push(end - next);
            rows.ids.extend_from_slice(&ids[skip..]);
            if let Some(entry) = logprobs {
                rows.logprobs.push(RowLogprobs {
                    row: rows.counts.len() as u32 - 1,
                    tokens: entry.tokens.iter().skip(skip).cloned().collect(),
                });
            }
            next = end;
        }
        Some(Part {
            openings: opening.into_iter().collect(),
            tokens: (!rows.counts.is_empty()).then_some(rows),
            ends: self.end.into_iter().collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use kvmesh_wire::v1::{Reserved, StageFinished, stage_end::End};

    use super::*;
    use crate::frames::step_frames;

    fn id() -> AttemptId {
        AttemptId::parse(&[7; 16], 1, 2).unwrap()
    }

    fn tokens(first: u32, ids: &[u32]) -> Part {
        // A row of somebody else before it.
        let other = [[9; 16], id().generation].concat();
        Part {
            tokens: Some(Rows {
                generations: other,
                owners: vec![1, 1],
                attempts: vec![2, 2],
                first_indices: vec![0, first],
                counts: vec![1, ids.len() as u32],
                ids: [&[1_000], ids].concat(),
                logprobs: Vec::new(),
            }),
            ..Part::default()
        }
    }

    fn frame(part: Part) -> Bytes {
        step_frames(1, part, None, None).remove(0)
    }

    fn held(placed: Instant) -> BTreeMap<AttemptId, Held> {
        let opening = Opening {
            generation: vec![7; 16].into(),
            owner: 1,
            attempt: 2,
            answer: Some(Answer::Reserved(Reserved::default())),
            ..Opening::default()
        };
        let opening = Some(opening);
        let held = Held {
            placed,
            stage: 0,
            opening,
        };
        [(id(), held)].into()
    }

    fn ask(
        sent: &Sent,
        next_index: u32,
        held: &BTreeMap<AttemptId, Held>,
    ) -> Option<(u32, Vec<u32>)> {
        let wanted = [Wanted {
            id: id(),
            next_index,
        }];
        let (_, part) = replay(sent, &VecDeque::new(), &wanted, held).pop()?;
        assert_eq!(part.openings.len(), held.len());
        let rows = part.tokens.unwrap_or_default();
        let first = rows.first_indices.first().copied().unwrap_or(next_index);
        Some((first, rows.ids))
    }

    #[test]
    fn tokens_are_said_again_from_the_wanted_index_on() {
        let now = Instant::now();
        let mut sent = Sent::default();
        for (first, ids) in [(0, vec![10]), (1, vec![11, 12, 13]), (4, vec![14])] {
            sent.keep(now, frame(tokens(first, &ids)), 1 << 20);
        }
        let held = held(now);
        let all = [10, 11, 12, 13, 14];
        for next in 0..=5 {
            let (first, ids) = ask(&sent, next, &held).unwrap();
            assert_eq!((first, ids.as_slice()), (next, &all[next as usize..]));
        }
    }

    #[test]
    fn what_does_not_reach_back_is_unknown() {
        let now = Instant::now();
        let later = now + std::time::Duration::from_millis(1);
        let mut sent = Sent::default();
        let one = frame(tokens(0, &[10]));
        let most = one.len();
        sent.keep(now, one, most);
        sent.keep(later, frame(tokens(1, &[11])), most);
        // Index 0 is not kept any more; 1 is.
        assert_eq!(ask(&sent, 0, &held(now)), None);
        assert_eq!(ask(&sent, 1, &held(now)), Some((1, vec![11])));
        assert_eq!(ask(&sent, 2, &held(now)), Some((2, vec![])));
        // Of one that was placed after all that is gone nothing can be missing.
        let mut silent = Sent::default();
        silent.keep(now, frame(Part::default()), 0);
        assert_eq!(ask(&silent, 5, &held(now)), None);
        assert_eq!(ask(&silent, 5, &held(later)), Some((5, vec![])));
    }

    #[test]
    fn what_was_forgotten_leaves_no_hole() {
        let now = Instant::now();
        let mut sent = Sent::default();
        sent.keep(now, frame(tokens(0, &[10])), 1 << 20);
        assert_eq!(ask(&sent, 1, &held(now)), Some((1, vec![])));
        // Index 1 was never sent.
        sent.forget(now);
        assert_eq!(ask(&sent, 1, &held(now)), None);
        sent.keep(now, frame(tokens(2, &[12])), 1 << 20);
        assert_eq!(ask(&sent, 1, &held(now)), None);
        assert_eq!(ask(&sent, 2, &held(now)), Some((2, vec![12])));
    }

    #[test]
    fn an_attempt_that_ended_is_known_by_its_end() {
        let now = Instant::now();
        let mut sent = Sent::default();
        sent.keep(now, frame(tokens(0, &[10])), 1 << 20);
        assert_eq!(ask(&sent, 0, &BTreeMap::new()), None);
        let end = StageEnd {
            generation: vec![7; 16].into(),
            owner: 1,
            attempt: 2,
            end: Some(End::Finished(StageFinished::default())),
            ..StageEnd::default()
        };
        let ends = Part {
            ends: vec![end],
            ..Part::default()
        };
        sent.keep(now, frame(ends), 1 << 20);
        assert_eq!(ask(&sent, 0, &BTreeMap::new()), Some((0, vec![10])));
    }
}
