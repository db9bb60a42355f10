//! Attempts that another session has than the one for which the engine runs them.
//!
//! An engine knows an attempt by the name under which it was placed, and says what comes
//! of it for the session that placed it. Where another router claimed it both change on
//! their way out, and commands on their way in.

use std::collections::HashMap;

use kvmesh_wire::v1::{RowLogprobs, opening::Answer};

use crate::{
    attempt::{AttemptId, NamesAttempt},
    report::{Part, Rows},
};

/// Who has what the engine runs for somebody else.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    /// By the engine's name: session and name.
    out: HashMap<AttemptId, (String, AttemptId)>,
    /// The engine's names.
    back: HashMap<AttemptId, AttemptId>,
}

impl Passed {
    /// A session has from now on under this name what was known by that one.
    pub(crate) fn pass(&mut self, before: &AttemptId, session: &str, id: AttemptId) {
        let engine = self.back.remove(before).unwrap_or_else(|| before.clone());
        self.back.insert(id.clone(), engine.clone());
        self.out.insert(engine, (session.to_owned(), id));
    }

    /// The engine's name of an attempt.
    pub(crate) fn engine_name(&self, id: AttemptId) -> AttemptId {
        match self.back.get(&id) {
            Some(engine) => engine.clone(),
            None => id,
        }
    }

    /// Whether the engine runs an attempt of this name for somebody else.
    pub(crate) fn is_passed(&self, id: &AttemptId) -> bool {
        self.out.contains_key(id)
    }

    /// Hands what the engine says by session to those that have it. Whom it was said for
    /// keeps its place, also with nothing.
    pub(crate) fn sort(&mut self, parts: Vec<(String, Part)>) -> Vec<(String, Part)> {
        if self.out.is_empty() {
            return parts;
        }
        let mut sorted: Vec<(String, Part)> = Vec::with_capacity(parts.len() + 1);
        for (key, part) in parts {
            let mut own = Part::default();
            for mut opening in part.openings {
                let refused = matches!(opening.answer, Some(Answer::Refused(_)));
                match self.owner(opening.attempt_id(), refused) {
                    Some((to, id)) => {
                        opening.owner = id.owner;
                        place(&mut sorted, &to).openings.push(opening);
                    }
                    None => own.openings.push(opening),
                }
            }
            if let Some(rows) = part.tokens {
                self.sort_rows(rows, &mut own, &mut sorted);
            }
            for mut end in part.ends {
                match self.owner(end.attempt_id(), true) {
                    Some((to, id)) => {
                        end.owner = id.owner;
                        place(&mut sorted, &to).ends.push(end);
                    }
                    None => own.ends.push(end),
                }
            }
            place(&mut sorted, &key).append(own);
        }
        sorted
    }

    fn sort_rows(&self, rows: Rows, own: &mut Part, sorted: &mut Vec<(String, Part)>) {
        let names = rows.generations.as_chunks::<16>().0;
        let name = |row: usize| {
            let id = AttemptId::parse(names.get(row)?, rows.owners[row], rows.attempts[row])?;
            self.out.get(&id)
        };
        if (0..rows.counts.len()).all(|row| name(row).is_none()) {
            own.tokens = Some(rows);
            return;
        }
        let mut first = 0;
        for (row, generation) in names.iter().enumerate() {
            let ids = first..first + rows.counts[row] as usize;
            first = ids.end;
            let (to, owner) = match name(row) {
                Some((to, id)) => (place(sorted, to), id.owner),
                None => (&mut *own, rows.owners[row]),
            };
            let to = to.tokens.get_or_insert_default();
            let logprobs = rows.logprobs.iter().find(|entry| entry.row as usize == row);
            to.logprobs.extend(logprobs.map(|entry| RowLogprobs {
                row: u32::try_from(to.counts.len()).unwrap_or(u32::MAX),
                tokens: entry.tokens.clone(),
            }));
            to.generations.extend_from_slice(generation);
            to.owners.push(owner);
            to.attempts.push(rows.attempts[row]);
            to.first_indices.push(rows.first_indices[row]);
            to.counts.push(rows.counts[row]);
            to.ids
                .extend_from_slice(rows.ids.get(ids).unwrap_or_default());
        }
    }

    /// Who has an attempt that the engine speaks of, for the last time where `last`.
    fn owner(&mut self, id: Option<AttemptId>, last: bool) -> Option<(String, AttemptId)> {
        let id = id?;
        if !last {
            return self.out.get(&id).cloned();
        }
        let out = self.out.remove(&id)?;
        self.back.remove(&out.1);
        Some(out)
    }
}

/// A session's part.
fn place<'a>(sorted: &'a mut Vec<(String, Part)>, key: &str) -> &'a mut Part {
    let at = sorted.iter().position(|(known, _)| known == key);
    let at = at.unwrap_or_else(|| {
        sorted.push((key.to_owned(), Part::default()));
        sorted.len() - 1
    });
    &mut sorted[at].1
}

impl Part {
    /// Adds what comes after it. Rows of other attempts have no order among each other.
    fn append(&mut self, more: Self) {
        self.openings.extend(more.openings);
        self.ends.extend(more.ends);
        let Some(rows) = more.tokens else {
            return;
        };
        let Some(own) = &mut self.tokens else {
            self.tokens = Some(rows);
            return;
        };
        let before = u32::try_from(own.counts.len()).unwrap_or(u32::MAX);
        own.logprobs.extend(rows.logprobs.into_iter().map(|entry| {
            let row = before.saturating_add(entry.row);
            RowLogprobs { row, ..entry }
        }));
        own.generations.extend(rows.generations);
        own.owners.extend(rows.owners);
        own.attempts.extend(rows.attempts);
        own.first_indices.extend(rows.first_indices);
        own.counts.extend(rows.counts);
        own.ids.extend(rows.ids);
    }
}
