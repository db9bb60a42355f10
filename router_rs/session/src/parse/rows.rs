//! The tokens of a step, in the columns that they came in.

use kvmesh_wire::v1;

use crate::{Fence, GenerationId, Violation};

/// Rows of tokens whose columns agree.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows(v1::TokenRows);

/// One row of [`Rows`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row<'a> {
    /// The generation.
    pub generation: GenerationId,
    /// The attempt.
    pub fence: Fence,
    /// Output index of the first id.
    pub first_index: u32,
    /// At least one id.
    pub ids: &'a [u32],
    /// One entry an id, or none at all.
    pub logprobs: &'a [v1::TokenLogprobs],
}

impl Rows {
    /// Checks that the columns agree.
    ///
    /// # Errors
    /// [`Violation::Malformed`] where they do not.
    pub fn parse(rows: v1::TokenRows) -> Result<Self, Violation> {
        let count = rows.counts.len();
        let columns = [
            rows.owners.len(),
            rows.attempts.len(),
            rows.first_indices.len(),
        ];
        if rows.generations.len() != 16 * count || columns != [count; 3] {
            return Err(Violation::Malformed("columns of tokens differ in length"));
        }
        let mut total = 0_usize;
        for (&ids, &first) in rows.counts.iter().zip(&rows.first_indices) {
            if ids == 0 || first.checked_add(ids).is_none() {
                return Err(Violation::Malformed(
                    "a row of tokens without a valid count",
                ));
            }
            total = total.saturating_add(ids as usize);
        }
        if total != rows.ids.len() {
            return Err(Violation::Malformed("counts of tokens do not add up"));
        }
        let mut next = 0;
        for entry in &rows.logprobs {
            let tokens = rows.counts.get(entry.row as usize).copied().unwrap_or(0);
            if tokens == 0 || entry.row < next || entry.tokens.len() != tokens as usize {
                return Err(Violation::Malformed(
                    "log-probabilities without their tokens",
                ));
            }
            next = entry.row + 1;
        }
        Ok(Self(rows))
    }

    /// The rows in order.
    pub fn iter(&self) -> impl Iterator<Item = Row<'_>> {
        let Self(rows) = self;
        let mut ids = rows.ids.as_slice();
        let mut logprobs = rows.logprobs.iter().peekable();
        let names = rows.generations.chunks_exact(16);
        names.enumerate().filter_map(move |(i, name)| {
            let (now, rest) = ids.split_at_checked(*rows.counts.get(i)? as usize)?;
            ids = rest;
            let own = logprobs.next_if(|entry| entry.row as usize == i);
            Some(Row {
                generation: GenerationId::from_wire(name)?,
                fence: Fence {
                    owner: *rows.owners.get(i)?,
                    attempt: *rows.attempts.get(i)?,
                },
                first_index: *rows.first_indices.get(i)?,
                ids: now,
                logprobs: own.map_or(&[], |entry| &entry.tokens),
            })
        })
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.counts.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.counts.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(counts: &[u32], ids: usize) -> v1::TokenRows {
        let rows = counts.len();
        v1::TokenRows {
            generations: vec![1; 16 * rows].into(),
            owners: vec![1; rows],
            attempts: vec![1; rows],
            first_indices: vec![0; rows],
            counts: counts.to_vec(),
            ids: (0..ids as u32).collect(),
            logprobs: Vec::new(),
        }
    }

    #[test]
    fn rows_take_their_ids_in_order() {
        let parsed = Rows::parse(rows(&[2, 1, 3], 6)).expect("valid");
        let ids: Vec<&[u32]> = parsed.iter().map(|row| row.ids).collect();
        assert_eq!(ids, [&[0, 1][..], &[2], &[3, 4, 5]]);
    }

    #[test]
    fn rows_take_their_own_logprobs() {
        let mut wire = rows(&[1, 2], 3);
        let tokens = vec![v1::TokenLogprobs::default(); 2];
        wire.logprobs = vec![v1::RowLogprobs { row: 1, tokens }];
        let parsed = Rows::parse(wire).expect("valid");
        let lengths: Vec<usize> = parsed.iter().map(|row| row.logprobs.len()).collect();
        assert_eq!(lengths, [0, 2]);
    }

    #[test]
    fn columns_that_disagree_are_malformed() {
        let mut short = rows(&[1, 1], 2);
        short.owners.pop();
        let mut overflow = rows(&[2], 2);
        overflow.first_indices[0] = u32::MAX;
        let mut stray = rows(&[1], 1);
        stray.logprobs = vec![v1::RowLogprobs {
            row: 7,
            tokens: Vec::new(),
        }];
        for bad in [
            short,
            overflow,
            stray,
            rows(&[0], 0),
            rows(&[2], 1),
            rows(&[1], 2),
        ] {
            assert!(matches!(Rows::parse(bad), Err(Violation::Malformed(_))));
        }
    }
}
