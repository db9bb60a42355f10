//! What is kept of generations that another router may resume (PROTOCOLS 2), and which
//! owners are over.
//!
//! A generation is kept from its placement on; one that has ended for as long as orphans
//! are. Beyond the bound in bytes those go that ended first, then what grew beyond it: it
//! goes on as if nobody could resume it.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvmesh_wire::{
    output_digest,
    v1::{Found, Opening, Place, Stage, StageEnd, opening::Answer, stage_end::End},
};

use crate::{
    attempt::{AttemptId, NamesAttempt},
    report::Rows,
};

/// Longest state that a router may leave, bytes (worker.proto, Place).
const MOST_STATE: usize = 1 << 20;
/// Longest output that a frame can carry beside the state.
const MOST_IDS: usize = 1 << 19;
/// Owners that are remembered; the oldest go first.
const MOST_CLAIMS: usize = 65_536;

type Generation = [u8; 16];

/// A generation that can be resumed.
#[derive(Debug)]
struct Resumable {
    /// The attempt, as routers name it.
    id: AttemptId,
    /// The session that has it.
    session: String,
    tenant: String,
    /// Its model, by name.
    model: String,
    stage: i32,
    state: Bytes,
    /// All output ids so far.
    output: Vec<u32>,
    opening: Option<Opening>,
    end: Option<StageEnd>,
    /// The attempt before it, until it is answered: a refusal leaves all as it was.
    before: Option<Box<Resumable>>,
}

impl Resumable {
    fn bytes(&self) -> usize {
        let before = self.before.as_ref().map_or(0, |before| before.bytes());
        self.state.len() + self.model.len() + 4 * self.output.len() + before
    }

    /// This one or the one before it, by its name.
    fn named(&mut self, owner: u32, attempt: u32) -> Option<&mut Self> {
        if (self.id.owner, self.id.attempt) == (owner, attempt) {
            return Some(self);
        }
        self.before.as_mut()?.named(owner, attempt)
    }

    fn found(&self) -> Found {
        Found {
            generation: Bytes::copy_from_slice(&self.id.generation),
            known: true,
            owner: self.id.owner,
            attempt: self.id.attempt,
            next_index: u32::try_from(self.output.len()).unwrap_or(u32::MAX),
            stage: self.stage,
            ..Found::default()
        }
    }
}

/// What came of a claim.
#[derive(Debug)]
pub(crate) enum Claimed {
    /// Nothing of it is here.
    Nothing,
    /// This owner, or a higher one, is in force.
    Refused(u32),
    /// It is the claiming session's.
    Taken(Box<Taken>),
}

/// A generation that another session has from now on.
#[derive(Debug)]
pub(crate) struct Taken {
    /// The session that had it, and as what.
    pub(crate) before: (String, AttemptId),
    /// What it is now.
    pub(crate) id: AttemptId,
    /// The stage, as on the wire.
    pub(crate) stage: i32,
    /// The answer to the claim.
    pub(crate) found: Found,
    /// That it was reserved, if it was said.
    pub(crate) opening: Option<Opening>,
    /// Its end, if it has one.
    pub(crate) end: Option<StageEnd>,
}

/// All that is kept.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    generations: HashMap<Generation, Resumable>,
    bytes: usize,
    /// Ended ones, in the order of their ends.
    ended: VecDeque<(Instant, AttemptId)>,
    /// Owners that claimed, by when they did.
    claims: HashMap<Generation, u32>,
    claimed: VecDeque<(Instant, Generation, u32)>,
}

impl Kept {
    /// The owner number in force: lower ones are over. 0: any may come.
    pub(crate) fn owner(&self, generation: &Generation) -> u32 {
        let claimed = self.claims.get(generation).copied().unwrap_or(0);
        let held = self.generations.get(generation);
        held.map_or(0, |held| held.id.owner).max(claimed)
    }

    /// An attempt was placed. What its router leaves for others goes no further.
    pub(crate) fn placed(&mut self, session: &str, id: &AttemptId, place: &mut Place, most: usize) {
        let last = self.remove(&id.generation);
        let state = std::mem::take(&mut place.resume_state);
        if state.is_empty() || state.len() > MOST_STATE {
            return;
        }
        let continuation = place.continuation.as_ref();
        let resumable = Resumable {
            id: id.clone(),
            session: session.to_owned(),
            tenant: place.tenant.clone(),
            model: continuation.map_or_else(String::new, |from| from.model.clone()),
            stage: place.stage,
            state,
            output: continuation.map_or_else(Vec::new, |from| from.output_ids.clone()),
            opening: None,
            end: None,
            before: last.and_then(|last| match last.opening {
                Some(_) => Some(Box::new(last)),
                None => last.before,
            }),
        };
        self.insert(resumable);
        self.fit(&id.generation, most);
    }

    /// A placement was answered.
    pub(crate) fn opened(&mut self, opening: &Opening) {
        let Some(id) = opening.attempt_id() else {
            return;
        };
        if self
            .generations
            .get(&id.generation)
            .is_none_or(|held| held.id != id)
        {
            return;
        }
        let Some(mut held) = self.remove(&id.generation) else {
            return;
        };
        let before = held.before.take();
        if !matches!(opening.answer, Some(Answer::Refused(_))) {
            held.opening = Some(opening.clone());
            self.insert(held);
        } else if let Some(before) = before {
            self.insert(*before);
        }
    }

    /// Tokens were made. Those of a prefill count where it `emits`.
    pub(crate) fn made(&mut self, rows: &Rows, emits: bool, most: usize) {
        if self.generations.is_empty() {
            return;
        }
        let mut ids = rows.ids.as_slice();
        let names = rows.generations.as_chunks::<16>().0.iter();
        let fences = rows.owners.iter().zip(&rows.attempts);
        let places = rows.first_indices.iter().zip(&rows.counts);
        for (generation, ((owner, attempt), (first, count))) in names.zip(fences.zip(places)) {
            let (own, rest) = ids.split_at((*count as usize).min(ids.len()));
            ids = rest;
            let held = self.generations.get_mut(generation);
            let Some(held) = held.and_then(|held| held.named(*owner, *attempt)) else {
                continue;
            };
            let counts = emits || held.stage != i32::from(Stage::Prefill);
            if !counts {
                continue;
            }
            // A receiver repeats what was committed to it from its border on.
            let known = held.output.len().saturating_sub(*first as usize);
            if *first as usize > held.output.len() {
                let id = held.id.clone();
                self.forget(&id);
                continue;
            }
            let new = own.get(known..).unwrap_or_default();
            held.output.extend_from_slice(new);
            self.bytes += 4 * new.len();
            if self.bytes > most {
                self.fit(generation, most);
            }
        }
    }

    /// A stage ended.
    pub(crate) fn ended(&mut self, end: &StageEnd, now: Instant) {
        let Some(id) = end.attempt_id() else {
            return;
        };
        if matches!(end.end, Some(End::Cancelled(_) | End::HandedOff(_))) {
            // Nobody wants more of it, or another worker has it.
            return self.forget(&id);
        }
        if let Some(held) = self.current(&id)
            && held.end.is_none()
        {
            held.end = Some(end.clone());
            self.ended.push_back((now, id));
        }
    }

    /// Whether it runs here and can be resumed.
    pub(crate) fn runs(&self, id: &AttemptId) -> bool {
        let held = self.generations.get(&id.generation);
        held.is_some_and(|held| held.id == *id && held.end.is_none())
    }

    /// An attempt is over, or nobody may have it any more.
    pub(crate) fn forget(&mut self, id: &AttemptId) {
        let Some(mut held) = self.remove(&id.generation) else {
            return;
        };
        if held.id != *id {
            held.before.take_if(|before| before.id == *id);
            self.insert(held);
        }
    }

    /// What a tenant may have of a generation, whose client has `had` output ids.
    pub(crate) fn find(&self, generation: &Generation, tenant: &str, had: u32) -> Found {
        let held = self.generations.get(generation);
        let own = held.filter(|held| held.tenant == tenant && held.output.len() <= MOST_IDS);
        own.map_or_else(
            || Found {
                generation: Bytes::copy_from_slice(generation),
                ..Found::default()
            },
            |held| Found {
                model: held.model.clone(),
                output_digest: held.output.get(..had as usize).map_or(0, output_digest),
                ..held.found()
            },
        )
    }

    /// A session claims a generation under a new owner number.
    pub(crate) fn claim(
        &mut self,
        (generation, owner): (Generation, u32),
        tenant: &str,
        session: &str,
        now: Instant,
    ) -> Claimed {
        let held = self.generations.get(&generation);
        let foreign = held.is_some_and(|held| held.tenant != tenant);
        if foreign {
            return Claimed::Nothing;
        }
        let in_force = self.owner(&generation);
        if owner <= in_force {
            return Claimed::Refused(in_force);
        }
        self.claims.insert(generation, owner);
        self.claimed.push_back((now, generation, owner));
        while self.claimed.len() > MOST_CLAIMS
            && let Some((_, oldest, owner)) = self.claimed.pop_front()
        {
            self.forget_claim(&oldest, owner);
        }
        let held = self.generations.get_mut(&generation);
        let Some(held) = held.filter(|held| held.output.len() <= MOST_IDS) else {
            return Claimed::Nothing;
        };
        let id = AttemptId {
            owner,
            ..held.id.clone()
        };
        if let Some(before) = held.before.take() {
            self.bytes -= before.bytes();
        }
        let before = std::mem::replace(&mut held.id, id.clone());
        let had = std::mem::replace(&mut held.session, session.to_owned());
        if let Some(opening) = &mut held.opening {
            opening.owner = owner;
        }
        if let Some(end) = &mut held.end {
            end.owner = owner;
            // It is kept no longer for that.
            let own = self.ended.iter_mut().find(|(_, of)| *of == before);
            if let Some((_, of)) = own {
                *of = id.clone();
            }
        }
        Claimed::Taken(Box::new(Taken {
            before: (had, before),
            id,
            stage: held.stage,
            found: Found {
                output_ids: held.output.clone(),
                resume_state: held.state.clone(),
                ..held.found()
            },
            opening: held.opening.clone(),
            end: held.end.clone(),
        }))
    }

    /// Forgets what ended and what was claimed longer ago than `ttl`.
    pub(crate) fn expire(&mut self, now: Instant, ttl: Duration) {
        let over = |at: &Instant| now.saturating_duration_since(*at) > ttl;
        while self.ended.front().is_some_and(|(at, _)| over(at))
            && let Some((_, id)) = self.ended.pop_front()
        {
            self.forget(&id);
        }
        while self.claimed.front().is_some_and(|(at, ..)| over(at))
            && let Some((_, generation, owner)) = self.claimed.pop_front()
        {
            self.forget_claim(&generation, owner);
        }
    }

    fn forget_claim(&mut self, generation: &Generation, owner: u32) {
        if self.claims.get(generation) == Some(&owner) {
            self.claims.remove(generation);
        }
    }

    fn current(&mut self, id: &AttemptId) -> Option<&mut Resumable> {
        let held = self.generations.get_mut(&id.generation);
        held?.named(id.owner, id.attempt)
    }

    fn insert(&mut self, resumable: Resumable) {
        self.bytes += resumable.bytes();
        self.generations.insert(resumable.id.generation, resumable);
    }

    fn remove(&mut self, generation: &Generation) -> Option<Resumable> {
        let held = self.generations.remove(generation)?;
        self.bytes -= held.bytes();
        Some(held)
    }

    /// Keeps within the bound, of which `newest` went beyond.
    fn fit(&mut self, newest: &Generation, most: usize) {
        while self.bytes > most
            && let Some((_, id)) = self.ended.pop_front()
        {
            self.forget(&id);
        }
        if self.bytes > most {
            self.remove(newest);
        }
    }
}

#[cfg(test)]
#[path = "kept_tests.rs"]
mod tests;
