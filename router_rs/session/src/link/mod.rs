//! One router's session with one worker.
//!
//! ```text
//!            dial            opened           hello
//!  Waiting ───────▶ Dialling ───────▶ Greeting ─────▶ Live ◀────────┐
//!     ▲                │                 │             │  ▲          │
//!     │ transport      │                 │      silent │  │ a frame, │ probe
//!     │ broken, from   │                 │      or     ▼  │ in time  │ answered
//!     │ any state      │                 │      stuck Suspect        │
//!     └────────────────┴─────────────────┤             │             │
//!                                        ▼             ▼   a frame   │
//!                                     Refused         Lost ───────▶ HalfOpen
//!                                   (waits, then                     │
//!                                    dials again)      ◀─────────────┘ silent
//! ```
//!
//! Silence: no frame for 1 s makes a worker suspect (no new placements), or lost
//! again where it is half open and nothing probes it; for max(3 s, 8 x the
//! predicted step) lost (its streams end or move). The same bounds hold for the age
//! of a step that its loads tell of, so that a stuck engine under a beating event
//! loop is found (DESIGN 5).
//!
//! A worker whose answers fail, with a code that blames nobody's request, several
//! times in a row is ejected for a while that doubles each time; then it is half
//! open, and one request decides.
//!
//! A transport that breaks under a worker that works may be a blip: what runs
//! there is held for a grace time, while the worker is dialled at once. The same
//! incarnation says what it still has; a refused connection and another
//! incarnation say that the process has died.

mod terms;

use crate::{
    PROTOCOL_VERSION, Violation,
    generation::Loss,
    parse::{Hello, LoadReport},
};
use kvmesh_wire::v1::WorkerPhase;

pub use terms::{Action, Actions, Event, Mismatch, State, Suspicion, Timer};

/// No frame for so long, in milliseconds: suspect. Loads come every 250 ms, so
/// three of them are missing.
pub const SUSPECT_MS: u64 = 1_000;
/// No frame for so long at least, in milliseconds: lost.
pub const LOST_MS: u64 = 3_000;
/// The same while a worker said that it loads or warms up.
pub const LOST_STARTING_MS: u64 = 30_000;
/// Answers in a row that fail before a worker is ejected.
pub const FAULTS: u8 = 3;
/// First ejection, in milliseconds, and the longest.
pub const EJECT_MS: (u64, u64) = (1_000, 30_000);
/// Grace of a broken transport as shipped, in milliseconds.
pub const REATTACH_MS: u64 = 250;
/// Time for a connection to open and for the worker's hello, in milliseconds.
pub const GREETING_MS: u64 = 5_000;

/// One session's state. See the module's text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Link {
    expected_id: Option<String>,
    state: State,
    tries: u32,
    sent: u64,
    echoed: u64,
    incarnation: u64,
    event: u64,
    lost_ms: u64,
    index_off: bool,
    /// The transport broke a moment ago: what runs there is not lost yet.
    away: bool,
    grace_ms: u64,
    /// Answers that failed in a row, and ejections since one did not.
    faults: u8,
    ejections: u32,
}

impl Link {
    /// A session that has not begun. `expected_id` is the worker id that the
    /// address was told for, if one was.
    #[must_use]
    pub fn new(expected_id: Option<String>) -> Self {
        Self {
            expected_id,
            state: State::Waiting,
            tries: 0,
            sent: 0,
            echoed: 0,
            incarnation: 0,
            event: 0,
            lost_ms: LOST_MS,
            index_off: false,
            away: false,
            grace_ms: REATTACH_MS,
            faults: 0,
            ejections: 0,
        }
    }

    /// The same with another grace for a broken transport, in milliseconds.
    #[must_use]
    pub fn with_grace(self, grace_ms: u64) -> Self {
        Self { grace_ms, ..self }
    }

    /// Whether its transport is broken while what runs there is not lost: the
    /// next hello names it.
    #[must_use]
    pub fn away(&self) -> bool {
        self.away
    }

    /// Its state.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether a request may be placed now.
    #[must_use]
    pub fn placeable(&self) -> bool {
        matches!(self.state, State::Live | State::HalfOpen { probe: None })
    }

    /// Whether the command of this number placed the probe that is under way.
    #[must_use]
    pub fn is_probe(&self, number: u64) -> bool {
        let probe = Some(number);
        self.state == State::HalfOpen { probe }
    }

    /// Whether commands can be sent.
    #[must_use]
    pub fn open(&self) -> bool {
        matches!(
            self.state,
            State::Live
                | State::Suspect(_)
                | State::Lost(_)
                | State::Ejected
                | State::HalfOpen { .. }
        )
    }

    /// Whether the worker's cache is indexed.
    #[must_use]
    pub fn indexed(&self) -> bool {
        !self.index_off
    }

    /// Incarnation of the worker's last hello; 0 before the first.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Number for the next command.
    pub fn number(&mut self) -> u64 {
        self.sent += 1;
        self.sent
    }

    /// Number of the last command sent, and of the last one echoed.
    #[must_use]
    pub fn commands(&self) -> (u64, u64) {
        (self.sent, self.echoed)
    }

    /// Remembers the last cache event that was applied.
    pub fn saw_event(&mut self, event: u64) {
        self.event = event;
    }

    /// Last cache event that was applied.
    #[must_use]
    pub fn event(&self) -> u64 {
        self.event
    }

    /// Takes an event and says what to do.
    ///
    /// # Errors
    /// A [`Violation`]: the driver closes the transport and feeds
    /// [`Event::Broken`].
    pub fn apply(&mut self, event: Event<'_>) -> Result<Actions, Violation> {
        let mut actions = Actions::new();
        match event {
            Event::Dial | Event::Fired(Timer::Redial) => self.dial(&mut actions),
            Event::Opened => self.opened(&mut actions),
            Event::Hello(hello) => self.hello(hello, &mut actions)?,
            Event::Frame(load) => self.frame(load, &mut actions)?,
            Event::Broken => self.broken(true, &mut actions),
            Event::Violated => self.broken(false, &mut actions),
            Event::Refused => self.give_up(Loss::Died, &mut actions),
            Event::Fired(Timer::Reattach) => self.give_up(Loss::Broken, &mut actions),
            Event::Placed(number) => match &mut self.state {
                // Of several that were on their way the last one decides.
                State::HalfOpen { probe } => {
                    *probe = Some(number);
                    actions.push(Action::StateChanged);
                }
                // It was on its way when the worker was given up: nobody would tell it.
                State::Lost(_) => actions.push(Action::Lose(Loss::Silent)),
                _ => {}
            },
            Event::Faulted(number) => self.faulted(number, &mut actions),
            Event::Undecided(number) => {
                // The probe is over: the next request decides.
                if self.is_probe(number) {
                    self.become_state(State::HalfOpen { probe: None }, &mut actions);
                }
            }
            Event::Fired(Timer::Probe) => {
                if self.state == State::Ejected {
                    self.become_state(State::HalfOpen { probe: None }, &mut actions);
                }
            }
            Event::Answered => {
                self.faults = 0;
                self.ejections = 0;
                if matches!(self.state, State::HalfOpen { probe: Some(_) }) {
                    self.become_state(State::Live, &mut actions);
                }
            }
            Event::Fired(Timer::Greeting) => {
                if matches!(self.state, State::Dialling | State::Greeting) {
                    actions.push(Action::Close);
                    self.broken(true, &mut actions);
                }
            }
            Event::Fired(Timer::Suspect) => match self.state {
                State::Live => {
                    self.become_state(State::Suspect(Suspicion::Silent), &mut actions);
                }
                // The frame that brought it back was its last one: no probe is sent after it.
                State::HalfOpen { probe: None } => self.lose(Suspicion::Silent, &mut actions),
                _ => {}
            },
            Event::Fired(Timer::Lost) => self.lose(Suspicion::Silent, &mut actions),
        }
        Ok(actions)
    }

    fn dial(&mut self, actions: &mut Actions) {
        if matches!(self.state, State::Waiting | State::Refused(_)) {
            actions.push(Action::Dial);
            actions.push(Action::Arm(Timer::Greeting, GREETING_MS));
            self.state = State::Dialling;
        }
    }

    fn opened(&mut self, actions: &mut Actions) {
        if self.state == State::Dialling {
            self.sent = 0;
            self.echoed = 0;
            self.state = State::Greeting;
            actions.push(Action::SendHello {
                known_incarnation: if self.index_off { 0 } else { self.incarnation },
                known_event: if self.index_off { 0 } else { self.event },
            });
        }
    }

    fn hello(&mut self, hello: &Hello, actions: &mut Actions) -> Result<(), Violation> {
        if self.state != State::Greeting {
            return Err(Violation::Malformed("a hello that was not asked for"));
        }
        actions.push(Action::Disarm(Timer::Greeting));
        if let Some(mismatch) = self.mismatch(hello) {
            self.tries = self.tries.saturating_add(1);
            actions.extend([Action::Close, Action::ArmRedial(self.tries)]);
            self.give_up(Loss::Broken, actions);
            self.become_state(State::Refused(mismatch), actions);
            return Ok(());
        }
        self.tries = 0;
        if self.incarnation != hello.record.incarnation {
            self.give_up(Loss::Died, actions);
        } else if self.away {
            self.away = false;
            actions.extend([Action::Disarm(Timer::Reattach), Action::Reattach]);
        }
        self.index_off = hello.unread.is_some();
        if self.incarnation != hello.record.incarnation || self.index_off {
            self.event = 0;
            actions.push(Action::ForgetCache);
        }
        if let Some(why) = hello.unread {
            actions.push(Action::IndexOff(why));
        }
        self.incarnation = hello.record.incarnation;
        self.lost_ms = LOST_MS;
        self.listen(actions);
        self.become_state(State::Live, actions);
        Ok(())
    }

    fn mismatch(&self, hello: &Hello) -> Option<Mismatch> {
        let (major, minor) = hello.version;
        // A newer minor is the worker's to speak down from; of older ones the
        // last is understood.
        if major != PROTOCOL_VERSION.0 || minor.saturating_add(1) < PROTOCOL_VERSION.1 {
            return Some(Mismatch::Version(major, minor));
        }
        match &self.expected_id {
            Some(id) if *id != hello.record.worker_id => {
                Some(Mismatch::Identity(hello.record.worker_id.clone()))
            }
            _ => None,
        }
    }

    fn frame(&mut self, load: Option<&LoadReport>, actions: &mut Actions) -> Result<(), Violation> {
        if !self.open() {
            return Err(Violation::Malformed("a frame before hello"));
        }
        if let Some(report) = load {
            self.echo(report.load.last_command)?;
        }
        match load.map(|report| self.step_age(report)) {
            Some(Age::Stuck) => self.lose(Suspicion::Stuck, actions),
            Some(Age::Late) if self.state == State::Live => {
                self.become_state(State::Suspect(Suspicion::Stuck), actions);
            }
            Some(Age::Late) => {}
            Some(Age::Fine) => self.heard(true, actions),
            // A frame without a load is a sign of life, but says nothing of
            // the step: what is stuck stays stuck.
            None => self.heard(false, actions),
        }
        self.listen(actions);
        Ok(())
    }

    fn heard(&mut self, step_fine: bool, actions: &mut Actions) {
        match self.state {
            State::Suspect(Suspicion::Silent) => self.become_state(State::Live, actions),
            State::Suspect(Suspicion::Stuck) if step_fine => {
                self.become_state(State::Live, actions);
            }
            State::Lost(Suspicion::Silent) => {
                self.become_state(State::HalfOpen { probe: None }, actions);
            }
            State::Lost(Suspicion::Stuck) if step_fine => {
                self.become_state(State::HalfOpen { probe: None }, actions);
            }
            _ => {}
        }
    }

    fn faulted(&mut self, number: u64, actions: &mut Actions) {
        self.faults = self.faults.saturating_add(1);
        match self.state {
            // What was placed before says nothing new.
            State::HalfOpen { .. } if self.is_probe(number) => {}
            State::Live if self.faults >= FAULTS => {}
            _ => return,
        }
        let (first, longest) = EJECT_MS;
        let wait = first.saturating_mul(1 << self.ejections.min(16));
        self.ejections = self.ejections.saturating_add(1);
        self.faults = 0;
        actions.push(Action::Arm(Timer::Probe, wait.min(longest)));
        self.become_state(State::Ejected, actions);
    }

    fn listen(&self, actions: &mut Actions) {
        actions.push(Action::Arm(Timer::Suspect, SUSPECT_MS));
        actions.push(Action::Arm(Timer::Lost, self.lost_ms));
    }

    fn echo(&mut self, got: u64) -> Result<(), Violation> {
        if got > self.sent || got < self.echoed {
            return Err(Violation::Echo {
                got,
                sent: self.sent,
                before: self.echoed,
            });
        }
        self.echoed = got;
        Ok(())
    }

    fn step_age(&mut self, report: &LoadReport) -> Age {
        let load = &report.load;
        let predicted = load.step_predicted_ms;
        self.lost_ms = match report.phase {
            WorkerPhase::Serving => LOST_MS.max((8.0 * predicted) as u64),
            _ => LOST_STARTING_MS,
        };
        if report.phase != WorkerPhase::Serving {
            return Age::Fine;
        }
        if load.step_age_ms > (LOST_MS as f64).max(8.0 * predicted) {
            Age::Stuck
        } else if load.step_age_ms > (SUSPECT_MS as f64).max(4.0 * predicted) {
            Age::Late
        } else {
            Age::Fine
        }
    }

    fn lose(&mut self, why: Suspicion, actions: &mut Actions) {
        if matches!(
            self.state,
            State::Live | State::Suspect(_) | State::Ejected | State::HalfOpen { .. }
        ) {
            actions.push(Action::Lose(Loss::Silent));
            self.become_state(State::Lost(why), actions);
        }
    }

    /// Nobody waits any longer for the worker's return.
    fn give_up(&mut self, loss: Loss, actions: &mut Actions) {
        if self.away {
            self.away = false;
            actions.extend([Action::Disarm(Timer::Reattach), Action::Lose(loss)]);
        }
    }

    /// With `may_return` what runs there is held for a while.
    fn broken(&mut self, may_return: bool, actions: &mut Actions) {
        match self.state {
            State::Waiting | State::Refused(_) => return,
            State::Live | State::Suspect(_) | State::Ejected | State::HalfOpen { .. }
                if may_return && self.grace_ms > 0 =>
            {
                self.away = true;
                actions.push(Action::Arm(Timer::Reattach, self.grace_ms));
            }
            State::Live
            | State::Suspect(_)
            | State::Ejected
            | State::HalfOpen { .. }
            | State::Lost(_) => {
                actions.push(Action::Lose(Loss::Broken));
            }
            State::Dialling | State::Greeting => {}
        }
        for timer in [Timer::Greeting, Timer::Suspect, Timer::Lost, Timer::Probe] {
            actions.push(Action::Disarm(timer));
        }
        self.tries = self.tries.saturating_add(1);
        actions.push(Action::ArmRedial(self.tries));
        self.become_state(State::Waiting, actions);
    }

    fn become_state(&mut self, state: State, actions: &mut Actions) {
        self.state = state;
        actions.push(Action::StateChanged);
    }
}

enum Age {
    Fine,
    Late,
    Stuck,
}

#[cfg(test)]
mod tests;
