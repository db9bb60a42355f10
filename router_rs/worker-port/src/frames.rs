//! From what a step brought to frames of at most 64 KiB.

use bytes::Bytes;
use kvmesh_wire::v1::{
    Load, RowLogprobs, StepOutput, StepSample, TokenRows, WorkerFrame, worker_frame::Frame,
};
use prost::Message;

use crate::report::{Part, Rows};

/// Largest step or cache frame (PROTOCOLS 1).
pub(crate) const FRAME_BYTES: usize = 64 * 1024;

/// Bytes that the fields around openings, tokens and ends take at most: sample,
/// load, numbers and lengths.
const AROUND: usize = 512;
/// Bytes that a row and a token id take at most, rounded up.
const ROW: usize = 48;
const ID: usize = 6;

/// Encodes what a step brought for one router.
///
/// Mostly one frame. A longer step is cut; openings, tokens and ends keep their
/// order over the cuts, and the last frame carries sample and load.
pub(crate) fn step_frames(
    step: u64,
    part: Part,
    sample: Option<StepSample>,
    load: Option<Load>,
) -> Vec<Bytes> {
    let mut pieces = if estimate(&part) + AROUND < FRAME_BYTES {
        vec![part]
    } else {
        cut(part)
    };
    let last = pieces.pop().unwrap_or_default();
    let mut frames: Vec<Bytes> = pieces
        .into_iter()
        .map(|piece| encode(step, piece, false, None, None))
        .collect();
    frames.push(encode(step, last, true, sample, load));
    frames
}

/// Encodes step output that is no step's.
pub(crate) fn encode_step(step: StepOutput) -> Bytes {
    let frame = WorkerFrame {
        frame: Some(Frame::Step(step)),
    };
    frame.encode_to_vec().into()
}

fn encode(
    step: u64,
    part: Part,
    last: bool,
    sample: Option<StepSample>,
    load: Option<Load>,
) -> Bytes {
    encode_step(StepOutput {
        step,
        last,
        openings: part.openings,
        tokens: part.tokens.map(|rows| TokenRows {
            generations: rows.generations.into(),
            owners: rows.owners,
            attempts: rows.attempts,
            first_indices: rows.first_indices,
            counts: rows.counts,
            ids: rows.ids,
            logprobs: rows.logprobs,
        }),
        ends: part.ends,
        found: Vec::new(),
        sample,
        load,
    })
}

fn estimate(part: &Part) -> usize {
    let openings: usize = part.openings.iter().map(message_bytes).sum();
    let ends: usize = part.ends.iter().map(message_bytes).sum();
    let rows = part.tokens.as_ref().map_or(0, |rows| {
        let logprobs: usize = rows.logprobs.iter().map(message_bytes).sum();
        ROW * rows.counts.len() + ID * rows.ids.len() + logprobs
    });
    openings + ends + rows
}

/// Bytes of a message within another one.
fn message_bytes(message: &impl Message) -> usize {
    message.encoded_len() + 6
}

/// Pieces that fit a frame, in wire order.
fn cut(part: Part) -> Vec<Part> {
    let mut pieces = Vec::new();
    for openings in runs(part.openings) {
        pieces.push(Part {
            openings,
            ..Part::default()
        });
    }
    for rows in part.tokens.iter().flat_map(cut_rows) {
        pieces.push(Part {
            tokens: Some(rows),
            ..Part::default()
        });
    }
    for ends in runs(part.ends) {
        pieces.push(Part {
            ends,
            ..Part::default()
        });
    }
    pieces
}

/// Runs of messages that fit a frame.
fn runs<M: Message>(messages: Vec<M>) -> Vec<Vec<M>> {
    let mut runs = Vec::new();
    let (mut run, mut bytes) = (Vec::new(), 0);
    for message in messages {
        let size = message_bytes(&message);
        if !run.is_empty() && bytes + size + AROUND > FRAME_BYTES {
            runs.push(std::mem::take(&mut run));
            bytes = 0;
        }
        bytes += size;
        run.push(message);
    }
    if !run.is_empty() {
        runs.push(run);
    }
    runs
}

fn cut_rows(rows: &Rows) -> Vec<Rows> {
    let mut logprobs = vec![None; rows.counts.len()];
    for entry in &rows.logprobs {
        if let Some(place) = logprobs.get_mut(entry.row as usize) {
            *place = Some(entry);
        }
    }
    let mut pieces = Vec::new();
    let (mut begin, mut begin_id, mut id, mut bytes) = (0, 0, 0, 0);
    for (row, count) in rows.counts.iter().enumerate() {
        let count = *count as usize;
        let size = ROW + ID * count + logprobs[row].map_or(0, message_bytes);
        if row > begin && bytes + size + AROUND > FRAME_BYTES {
            pieces.push(slice(rows, begin..row, begin_id..id, &logprobs));
            (begin, begin_id, bytes) = (row, id, 0);
        }
        bytes += size;
        id += count;
    }
    let end = rows.counts.len();
    pieces.push(slice(rows, begin..end, begin_id..id, &logprobs));
    pieces
}

fn slice(
    rows: &Rows,
    range: std::ops::Range<usize>,
    ids: std::ops::Range<usize>,
    logprobs: &[Option<&RowLogprobs>],
) -> Rows {
    let moved = |(row, entry): (u32, &Option<&RowLogprobs>)| {
        entry.map(|entry| RowLogprobs {
            row,
            tokens: entry.tokens.clone(),
        })
    };
    Rows {
        generations: rows.generations[16 * range.start..16 * range.end].to_vec(),
        owners: rows.owners[range.clone()].to_vec(),
        attempts: rows.attempts[range.clone()].to_vec(),
        first_indices: rows.first_indices[range.clone()].to_vec(),
        counts: rows.counts[range.clone()].to_vec(),
        ids: rows.ids[ids].to_vec(),
        logprobs: (0u32..).zip(&logprobs[range]).filter_map(moved).collect(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use kvmesh_wire::v1::{
        Cancelled, Opening, Reserved, StageEnd, TokenLogprobs, opening::Answer, stage_end::End,
    };
    use proptest::prelude::*;

    use super::*;

    fn generation(number: usize) -> [u8; 16] {
        (number as u128).to_be_bytes()
    }

    fn rows(counts: &[u32], with_logprobs: &[usize]) -> Rows {
        let all = 0..counts.len();
        Rows {
            generations: all.clone().flat_map(generation).collect(),
            owners: vec![1; counts.len()],
            attempts: all.clone().map(|i| i as u32 + 1).collect(),
            first_indices: all.clone().map(|i| 7 * i as u32).collect(),
            counts: counts.to_vec(),
            ids: (0..counts.iter().sum()).collect(),
            logprobs: all
                .filter(|row| with_logprobs.contains(row))
                .map(|row| RowLogprobs {
                    row: row as u32,
                    tokens: vec![
                        TokenLogprobs {
                            logprob: -1.0,
                            ..Default::default()
                        };
                        counts[row].min(50) as usize
                    ],
                })
                .collect(),
        }
    }

    fn steps(frames: &[Bytes]) -> Vec<StepOutput> {
        frames
            .iter()
            .map(
                |frame| match WorkerFrame::decode(&frame[..]).unwrap().frame {
                    Some(Frame::Step(step)) => step,
                    other => panic!("{other:?}"),
                },
            )
            .collect()
    }

    /// Generation, owner, attempt, first index, ids and entries with
    /// log-probabilities of each row.
    type Row = (Vec<u8>, u32, u32, u32, Vec<u32>, usize);

    fn rows_of(steps: &[StepOutput]) -> Vec<Row> {
        let mut all = Vec::new();
        for tokens in steps.iter().filter_map(|step| step.tokens.as_ref()) {
            let mut first = 0;
            for (i, count) in tokens.counts.iter().enumerate() {
                let end = first + *count as usize;
                let entries = tokens.logprobs.iter().find(|entry| entry.row == i as u32);
                all.push((
                    tokens.generations[16 * i..16 * i + 16].to_vec(),
                    tokens.owners[i],
                    tokens.attempts[i],
                    tokens.first_indices[i],
                    tokens.ids[first..end].to_vec(),
                    entries.map_or(0, |entry| entry.tokens.len()),
                ));
                first = end;
            }
            assert_eq!(first, tokens.ids.len());
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn nothing_is_lost_or_reordered(
            counts in prop::collection::vec(1u32..3_000, 1..40),
            with_logprobs in prop::collection::vec(0usize..40, 0..10),
            openings in 0u32..3_000,
            ends in 0usize..2_000,
        ) {
            let given = rows(&counts, &with_logprobs);
            let part = Part {
                openings: (0..openings)
                    .map(|i| Opening {
                        generation: generation(i as usize).to_vec().into(),
                        answer: Some(Answer::Reserved(Reserved {
                            tokens_reserved: i,
                            ..Default::default()
                        })),
                        ..Default::default()
                    })
                    .collect(),
                tokens: Some(given.clone()),
                ends: (0..ends)
                    .map(|i| StageEnd {
                        generation: generation(i).to_vec().into(),
                        end: Some(End::Cancelled(Cancelled {})),
                        ..Default::default()
                    })
                    .collect(),
            };
            let sample = StepSample { decode_batch: 9, ..Default::default() };
            let load = Load { step: 9, ..Default::default() };
            let frames = step_frames(9, part, Some(sample), Some(load));
            prop_assert!(frames.iter().all(|frame| frame.len() <= FRAME_BYTES));
            let steps = steps(&frames);

            let whole = StepOutput {
                tokens: Some(TokenRows {
                    generations: given.generations.clone().into(),
                    owners: given.owners.clone(),
                    attempts: given.attempts.clone(),
                    first_indices: given.first_indices.clone(),
                    counts: given.counts.clone(),
                    ids: given.ids.clone(),
                    logprobs: given.logprobs.clone(),
                }),
                ..Default::default()
            };
            prop_assert_eq!(rows_of(&steps), rows_of(&[whole]));
            let told: Vec<_> = steps.iter().flat_map(|s| &s.openings).collect();
            prop_assert_eq!(told.len(), openings as usize);
            for (i, opening) in told.iter().enumerate() {
                prop_assert_eq!(&opening.generation[..], &generation(i)[..]);
            }
            let told: Vec<_> = steps.iter().flat_map(|s| &s.ends).collect();
            prop_assert_eq!(told.len(), ends);
            for (i, end) in told.iter().enumerate() {
                prop_assert_eq!(&end.generation[..], &generation(i)[..]);
            }
            // Openings, then tokens, then ends, over all cuts.
            let kinds: Vec<u8> = steps
                .iter()
                .flat_map(|s| {
                    let there = [
                        (0, !s.openings.is_empty()),
                        (1, s.tokens.is_some()),
                        (2, !s.ends.is_empty()),
                    ];
                    there.into_iter().filter(|(_, there)| *there).map(|(kind, _)| kind)
                })
                .collect();
            prop_assert!(kinds.is_sorted());
            let (last, others) = steps.split_last().unwrap();
            prop_assert!(last.last && last.sample.is_some() && last.load.is_some());
            prop_assert!(others.iter().all(|s| !s.last && s.sample.is_none() && s.load.is_none()));
        }
    }

    #[test]
    fn a_long_step_is_cut_and_a_short_one_is_not() {
        let frames = |count: usize| {
            let part = Part {
                tokens: Some(rows(&vec![1; count], &[])),
                ..Part::default()
            };
            step_frames(1, part, None, None)
        };
        assert_eq!(frames(64).len(), 1);
        let long = frames(8_000);
        assert!(long.len() > 1);
        assert!(long.iter().all(|frame| frame.len() <= FRAME_BYTES));
        assert_eq!(rows_of(&steps(&long)).len(), 8_000);
    }
}
