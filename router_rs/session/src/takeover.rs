//! Another router's generation on its way to this one (PROTOCOLS 2, Resume).
//!
//! ```text
//!  Find to all      all answered, or time over       the winner gives it
//! ─────────────▶ Finding ──────────────────▶ Claiming ───────────────▶ Done
//!                  ▲  │ nobody has it           │  │ nobody is left      ▲
//!                  │  └─────────────────────────│──┴────────────────────┘
//!                  └── a higher owner is in force
//! ```
//!
//! Of several holders the highest (owner, attempt) that has all that the client has, and
//! that this router can go on with, wins, decode before prefill; the others are cancelled.
//! Where there is none nothing is claimed, and whoever has the generation keeps it. The
//! claim goes to every session: who holds nothing then refuses what the old owner still
//! places. Prefill alone, and decode that has made no token, are gone on from by a new
//! attempt. The winner's word decides at once, for its tokens follow it. Where the winner
//! is lost before it says anything the next one that was claimed is gone on from, by a new
//! attempt. What was claimed in vain is left where it runs, for another try. Where a claim
//! is refused the next one goes to everybody under a higher number: who gave it already
//! gives it anew, and where none comes of that it is left as well.

use std::collections::{BTreeMap, BTreeSet};

use smallvec::SmallVec;

use crate::{
    Fence, Stage, WorkerIndex,
    parse::{Found, Held, Holds, Left},
};

/// Claims that may be refused, since another router claims at the same time.
const TRIES: u8 = 3;

/// What happens to a takeover.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A worker answered Find or Claim.
    Found {
        /// Who.
        from: WorkerIndex,
        /// What.
        found: Found,
        /// Whether this router could go on with that. Of what is not there nothing.
        fit: Fit,
    },
    /// A session has ended, or takes nothing.
    SessionLost(WorkerIndex),
    /// The wait for answers is over.
    Fired,
}

/// Whether this router can go on with what a worker has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fit {
    /// It can.
    Now,
    /// Not before something comes that is on its way.
    Later,
    /// It is another output than the client's, or nothing that this router could serve.
    Never,
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Send Find.
    Find {
        /// To whom.
        to: WorkerIndex,
    },
    /// Send Claim.
    Claim {
        /// To whom.
        to: WorkerIndex,
        /// The new owner number.
        owner: u32,
    },
    /// Cancel an attempt that was claimed and is not gone on with.
    Cancel {
        /// On which worker.
        to: WorkerIndex,
        /// Which attempt.
        fence: Fence,
    },
    /// An attempt was claimed in vain: it goes on for another try, and is cancelled where
    /// none has come for it after as long as orphans are kept.
    Leave {
        /// On which worker.
        to: WorkerIndex,
        /// Which attempt.
        fence: Fence,
    },
    /// Start the wait for answers, anew if it runs.
    Arm,
    /// Give the wait up.
    Disarm,
    /// Go on with the generation. Before anything else that this worker says of it is
    /// heard.
    Take(Box<Take>),
    /// It cannot be had.
    End(Refused),
}

/// A generation that is this router's now.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Take {
    /// The attempt as it is named now.
    pub fence: Fence,
    /// The owner number of new attempts. What was claimed has the one below it.
    pub owner: u32,
    /// Highest number of an attempt that is known of: new ones have higher ones.
    pub last_attempt: u32,
    /// Who goes on with it, and which stage; `None`: it needs a new attempt.
    pub runs: Option<(WorkerIndex, Stage)>,
    /// What its router left.
    pub left: Left,
}

/// Why a generation cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refused {
    /// Nobody has it, for this tenant and from the index that is wanted.
    Unknown,
    /// It is there, and cannot be had at this moment.
    NotYet,
    /// Others claim it at the same time.
    Contested,
}

/// A list of actions, in the order in which they are to be done.
pub type Actions = SmallVec<[Action; 4]>;

/// One takeover's state. See the module's text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Takeover {
    wanted: u32,
    workers: BTreeSet<WorkerIndex>,
    tries: u8,
    /// Highest owner number that was heard of, or that a claim of this had.
    highest: u32,
    /// What earlier claims gave, and the one under way has not given anew.
    earlier: BTreeMap<WorkerIndex, Fence>,
    state: State,
}

/// What a worker said that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Holder {
    held: Held,
    fit: Fit,
}

impl Holder {
    fn fits(&self, wanted: u32) -> bool {
        self.held.next_index >= wanted && self.fit == Fit::Now
    }
}

type Holders = BTreeMap<WorkerIndex, Holder>;
type Given = BTreeMap<WorkerIndex, (Holder, Box<Left>)>;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum State {
    Finding {
        waiting: BTreeSet<WorkerIndex>,
        holders: Holders,
    },
    Claiming {
        owner: u32,
        winner: WorkerIndex,
        /// Who has not answered, by what it said that it has.
        holders: Holders,
        /// Who gave it, though another has the first word.
        given: Given,
        /// Highest number of an attempt that any of them told of.
        last_attempt: u32,
    },
    /// It is this router's.
    Taken,
    /// It could not be had.
    Ended,
}

impl Takeover {
    /// One of a generation of which the client lacks everything from `wanted` on;
    /// `workers` are those with a session.
    #[must_use]
    pub fn start(wanted: u32, workers: impl IntoIterator<Item = WorkerIndex>) -> (Self, Actions) {
        let mut takeover = Self {
            wanted,
            workers: workers.into_iter().collect(),
            tries: 0,
            highest: 0,
            earlier: BTreeMap::new(),
            state: State::Ended,
        };
        let mut actions = Actions::new();
        takeover.find(&mut actions);
        (takeover, actions)
    }

    /// Whether it is over, with or without success.
    #[must_use]
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Taken | State::Ended)
    }

    /// Takes an event and says what to do.
    pub fn apply(&mut self, event: Event) -> Actions {
        let mut actions = Actions::new();
        match event {
            Event::Found { from, found, fit } => match found.what {
                Holds::Nothing => self.answered(from, None, &mut actions),
                Holds::This(held, _) => {
                    self.answered(from, Some(Holder { held, fit }), &mut actions);
                }
                Holds::Claimed(held, left) => {
                    self.given(from, (Holder { held, fit }, left), &mut actions);
                }
                Holds::Refused { owner } => self.refused(from, owner, &mut actions),
            },
            Event::SessionLost(worker) => {
                self.workers.remove(&worker);
                self.earlier.remove(&worker);
                self.answered(worker, None, &mut actions);
                self.out(worker, &mut actions);
            }
            Event::Fired => match &self.state {
                State::Finding { .. } => self.claim(&mut actions),
                State::Claiming { winner, .. } => self.out(*winner, &mut actions),
                State::Taken | State::Ended => {}
            },
        }
        actions
    }

    /// Gives it up, wherever it is: what it has been given is left.
    #[must_use]
    pub fn give_up(&mut self) -> Actions {
        let mut actions = Actions::new();
        if !self.is_done() {
            self.keep_given();
            self.end(Refused::NotYet, &mut actions);
        }
        actions
    }

    fn find(&mut self, actions: &mut Actions) {
        if self.workers.is_empty() {
            return self.end(Refused::Unknown, actions);
        }
        actions.extend(self.workers.iter().map(|&to| Action::Find { to }));
        actions.push(Action::Arm);
        self.state = State::Finding {
            waiting: self.workers.clone(),
            holders: BTreeMap::new(),
        };
    }

    /// A worker's answer to Find. What comes later than it is waited for says nothing new.
    fn answered(&mut self, from: WorkerIndex, holder: Option<Holder>, actions: &mut Actions) {
        let State::Finding { waiting, holders } = &mut self.state else {
            return;
        };
        if !waiting.remove(&from) {
            return;
        }
        holders.extend(holder.map(|holder| (from, holder)));
        if waiting.is_empty() {
            self.claim(actions);
        }
    }

    fn claim(&mut self, actions: &mut Actions) {
        let State::Finding { holders, .. } = &mut self.state else {
            return;
        };
        let holders = std::mem::take(holders);
        let Some(winner) = self.best(&holders) else {
            let later = |of: &Holder| of.fit == Fit::Later && of.held.next_index >= self.wanted;
            let why = match holders.values().any(later) {
                true => Refused::NotYet,
                false => Refused::Unknown,
            };
            return self.end(why, actions);
        };
        let owners = holders.values().map(|holder| holder.held.fence.owner);
        // Not all who have a higher one need have answered this time.
        let highest = owners.max().unwrap_or(0).max(self.highest);
        let Some(owner) = number_of_claim(highest) else {
            return self.end(Refused::Unknown, actions);
        };
        self.highest = owner;
        let claims = self.workers.iter();
        actions.extend(claims.map(|&to| Action::Claim { to, owner }));
        actions.push(Action::Arm);
        let attempts = holders.values().map(|holder| holder.held.fence.attempt);
        self.state = State::Claiming {
            owner,
            winner,
            last_attempt: attempts.max().unwrap_or(0),
            holders,
            given: BTreeMap::new(),
        };
    }

    /// Who has all that the client has, and can be gone on with, under the highest attempt.
    fn best(&self, holders: &Holders) -> Option<WorkerIndex> {
        let fit = holders
            .iter()
            .filter(|(_, holder)| holder.fits(self.wanted));
        let best = fit.max_by_key(|(_, holder)| {
            let held = &holder.held;
            (held.fence, held.stage != Stage::Prefill)
        });
        best.map(|(&worker, _)| worker)
    }

    /// A worker gave what it has. It is this router's now, wanted or not.
    fn given(&mut self, from: WorkerIndex, own: (Holder, Box<Left>), actions: &mut Actions) {
        let fence = own.0.held.fence;
        let wanted = self.wanted;
        let State::Claiming {
            owner,
            winner,
            holders,
            given,
            last_attempt,
        } = &mut self.state
        else {
            match self.state {
                State::Finding { .. } => {
                    self.earlier.insert(from, fence);
                }
                // Beside the one that is gone on with.
                State::Taken => actions.push(Action::Cancel { to: from, fence }),
                _ => actions.push(Action::Leave { to: from, fence }),
            }
            return;
        };
        if fence.owner != *owner {
            // By an earlier claim of ours: the one under way gives it anew.
            self.earlier.insert(from, fence);
            return;
        }
        self.earlier.remove(&from);
        holders.remove(&from);
        *last_attempt = fence.attempt.max(*last_attempt);
        if *winner != from {
            given.insert(from, own);
        } else if own.0.fits(wanted) {
            self.take(from, own, true, actions);
        } else {
            given.insert(from, own);
            self.out(from, actions);
        }
    }

    /// Another router claims as well, or did, with no lower number.
    fn refused(&mut self, from: WorkerIndex, owner: u32, actions: &mut Actions) {
        self.highest = self.highest.max(owner);
        let State::Claiming {
            winner, holders, ..
        } = &mut self.state
        else {
            return;
        };
        holders.remove(&from);
        // The other router's by now.
        self.earlier.remove(&from);
        if *winner != from {
            return;
        }
        self.keep_given();
        self.tries += 1;
        if self.tries < TRIES {
            self.find(actions);
        } else {
            self.end(Refused::Contested, actions);
        }
    }

    /// Nothing is expected of a worker any more.
    fn out(&mut self, worker: WorkerIndex, actions: &mut Actions) {
        let State::Claiming {
            winner,
            holders,
            given,
            ..
        } = &mut self.state
        else {
            return;
        };
        holders.remove(&worker);
        if !self.workers.contains(&worker) {
            given.remove(&worker);
        }
        if *winner != worker {
            return;
        }
        let mut left = holders.clone();
        left.extend(given.iter().map(|(&worker, (holder, _))| (worker, *holder)));
        let next = self.best(&left);
        let Some(next) = next else {
            self.keep_given();
            return self.end(Refused::NotYet, actions);
        };
        let State::Claiming { winner, given, .. } = &mut self.state else {
            return;
        };
        *winner = next;
        match given.remove(&next) {
            // What it said since is lost: its output is gone on from, by another attempt.
            Some(own) => self.take(next, own, false, actions),
            None => actions.push(Action::Arm),
        }
    }

    fn take(
        &mut self,
        from: WorkerIndex,
        (holder, left): (Holder, Box<Left>),
        heard: bool,
        actions: &mut Actions,
    ) {
        let State::Claiming {
            owner,
            given,
            last_attempt,
            ..
        } = std::mem::replace(&mut self.state, State::Taken)
        else {
            return;
        };
        // Who gave it to an earlier claim answers this one, too.
        self.earlier.clear();
        let held = holder.held;
        let goes_on = heard && !needs_prefill(&held);
        let cancel = |(to, held): (WorkerIndex, Held)| Action::Cancel {
            to,
            fence: held.fence,
        };
        actions.push(Action::Disarm);
        let others = given.into_iter();
        actions.extend(others.map(|(to, (holder, _))| cancel((to, holder.held))));
        if !goes_on {
            actions.push(cancel((from, held)));
        }
        actions.push(Action::Take(Box::new(Take {
            fence: held.fence,
            owner: owner + 1,
            last_attempt,
            runs: goes_on.then_some((from, held.stage)),
            left: *left,
        })));
    }

    /// The claim under way comes to nothing: what it gave is an earlier one's.
    fn keep_given(&mut self) {
        if let State::Claiming { given, .. } = &mut self.state {
            let given = std::mem::take(given).into_iter();
            let fences = given.map(|(worker, (holder, _))| (worker, holder.held.fence));
            self.earlier.extend(fences);
        }
    }

    fn end(&mut self, why: Refused, actions: &mut Actions) {
        let earlier = std::mem::take(&mut self.earlier).into_iter();
        actions.extend(earlier.map(|(to, fence)| Action::Leave { to, fence }));
        actions.push(Action::Disarm);
        actions.push(Action::End(why));
        self.state = State::Ended;
    }
}

/// Whether an attempt comes to nothing without the part beside it, which is cancelled, or that
/// its router never placed. Of decode that has made no token nobody knows whether it has its
/// KV: without it, it would wait for as long as a transfer may.
fn needs_prefill(held: &Held) -> bool {
    match held.stage {
        Stage::Prefill => true,
        Stage::Decode => held.next_index == 0,
        Stage::Whole => false,
    }
}

/// Claims have even numbers; what is placed after a claim, and what nobody claimed yet, has
/// odd ones. Else one name could stand for two attempts: for what the router before placed
/// on its last way, which a claim gives, and for what is placed behind that claim.
fn number_of_claim(highest: u32) -> Option<u32> {
    (highest | 1).checked_add(1)
}

#[cfg(test)]
#[path = "takeover_tests.rs"]
mod tests;
