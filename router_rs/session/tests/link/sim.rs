//! The worker, the router's driver, and what may happen between them.

use std::collections::{BTreeSet, HashSet};

use kvmesh_session::{
    Link, PROTOCOL_VERSION,
    generation::Loss,
    link::{Action, Event, State, Timer},
    parse::{Hello, LoadReport},
};
use kvmesh_wire::v1;

use super::World;

/// Requests that the router holds or sends at a time: each has one of these numbers.
const NUMBERS: std::ops::RangeInclusive<u64> = 1..=2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Mood {
    Well,
    /// Says nothing, and takes no connection.
    Silent,
    /// Its port beats, and tells of a step that does not end.
    Stuck,
    /// Nobody listens at its address.
    Dead,
}

/// The connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Path {
    Closed,
    Dialling,
    Greeting,
    Up,
    /// Broken; the router has not heard of it yet.
    Severed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Answer {
    /// Tokens, a refusal or a good end.
    Works,
    Fails,
    /// Its transfer failed, or it may not be blamed.
    SaysNothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Move {
    /// The router chooses the worker for a request.
    Choose,
    /// The request leaves the router.
    Send(u64),
    /// The router gives a request up. The worker may say something of it yet, or nothing.
    Cancel(u64),
    Opens,
    Greets,
    Beats,
    /// A frame without a load.
    Speaks,
    /// A load with a step of this age, ms.
    TellsOfAStep(u32),
    /// Of a request, or of one that was given up: 0.
    Answers(Answer, u64),
    /// The router hears that the connection is broken.
    Hears,
    Ends(Timer),
    Heals,
    // What goes wrong.
    Becomes(Mood),
    Breaks,
    BreaksTheProtocol,
    GreetsAsAnother,
    Refuses,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sim {
    pub(super) link: Link,
    left: World,
    armed: BTreeSet<Timer>,
    path: Path,
    mood: Mood,
    incarnation: u64,
    /// Requests that were placed and have not left the router.
    queued: BTreeSet<u64>,
    /// Requests on the worker that the router waits for.
    held: BTreeSet<u64>,
    /// The worker may still end a request that was given up.
    stale: bool,
    /// Of those that are held the last one that was sent on probation: nothing was answered of
    /// anybody since.
    probe: Option<u64>,
    /// A session began of which the loss was not told.
    owed: bool,
    /// What has just come about.
    pub(super) came: Came,
    pub(super) wrong: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Came {
    #[default]
    Nothing,
    /// A probe was answered.
    LetInAgain,
    /// The session goes on after a blip.
    Reattached,
    /// Another incarnation came instead.
    Died,
}

fn hello(id: &str, incarnation: u64) -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        record: v1::WorkerRecord {
            worker_id: id.to_owned(),
            incarnation,
            ..v1::WorkerRecord::default()
        },
        unread: None,
        last_event: 0,
        resume_event: 1,
        step_model: None,
        reattached: Vec::new(),
    }
}

fn load(step_age_ms: u32) -> LoadReport {
    LoadReport {
        role: v1::Role::Both,
        phase: v1::WorkerPhase::Serving,
        load: v1::Load {
            step_age_ms: f64::from(step_age_ms),
            step_predicted_ms: 10.0,
            ..v1::Load::default()
        },
    }
}

/// Ages of a step that make a worker suspect and lost.
const LATE_MS: u32 = 1_100;
const STUCK_MS: u32 = 3_100;

impl Sim {
    pub(super) fn new(world: World) -> Self {
        let mut sim = Self {
            link: Link::new(Some("w".to_owned())).with_grace(world.grace_ms),
            left: world,
            armed: BTreeSet::new(),
            path: Path::Closed,
            mood: Mood::Well,
            incarnation: 1,
            queued: BTreeSet::new(),
            held: BTreeSet::new(),
            stale: false,
            probe: None,
            owed: false,
            came: Came::Nothing,
            wrong: None,
        };
        sim.feed(Event::Dial);
        sim
    }

    // -- what may happen ---------------------------------------------------

    /// What a router does, and a worker that is as this one is.
    pub(super) fn moves(&self) -> Vec<Move> {
        let mut moves = self.of_the_worker();
        // Before the link hears of one, another may be chosen.
        if self.link.placeable() && self.free().is_some() {
            moves.push(Move::Choose);
        }
        if self.path == Path::Up {
            moves.extend(self.held.iter().copied().map(Move::Cancel));
        }
        // A greeting that ends is a try in vain: of those there are only so many.
        let may_end = |timer: &&Timer| **timer != Timer::Greeting || self.left.vain > 0;
        moves.extend(self.armed.iter().filter(may_end).copied().map(Move::Ends));
        if self.mood != Mood::Well {
            moves.push(Move::Heals);
        }
        if self.left.failures > 0 {
            for of in self.may_answer() {
                let bad = [Answer::Fails, Answer::SaysNothing];
                moves.extend(bad.map(|answer| Move::Answers(answer, of)));
            }
        }
        if self.left.vain > 0 && self.path == Path::Dialling && self.mood == Mood::Dead {
            moves.push(Move::Refuses);
        }
        if self.left.faults > 0 {
            moves.extend(self.faults());
        }
        moves
    }

    fn faults(&self) -> Vec<Move> {
        let mut faults = Vec::new();
        if self.mood == Mood::Well {
            faults.extend([Mood::Silent, Mood::Stuck].map(Move::Becomes));
        }
        if self.mood != Mood::Dead {
            faults.push(Move::Becomes(Mood::Dead));
        }
        if matches!(self.path, Path::Dialling | Path::Greeting | Path::Up) {
            faults.push(Move::Breaks);
        }
        let speaks = matches!(self.mood, Mood::Well | Mood::Stuck);
        match self.path {
            Path::Greeting if speaks => faults.push(Move::GreetsAsAnother),
            Path::Up if speaks => faults.push(Move::BreaksTheProtocol),
            _ => {}
        }
        faults
    }

    /// What comes by itself, without a fault and without a wait that ends.
    fn of_the_worker(&self) -> Vec<Move> {
        let mut moves = Vec::new();
        let speaks = matches!(self.mood, Mood::Well | Mood::Stuck);
        match self.path {
            Path::Severed => moves.push(Move::Hears),
            Path::Dialling if speaks => moves.push(Move::Opens),
            Path::Greeting if speaks => moves.push(Move::Greets),
            Path::Up => {
                match self.mood {
                    Mood::Well => moves.extend([Move::Beats, Move::Speaks]),
                    Mood::Stuck => moves.extend([
                        Move::Speaks,
                        Move::TellsOfAStep(LATE_MS),
                        Move::TellsOfAStep(STUCK_MS),
                    ]),
                    Mood::Silent | Mood::Dead => {}
                }
                moves.extend(self.queued.first().copied().map(Move::Send));
                let works = |of| Move::Answers(Answer::Works, of);
                moves.extend(self.may_answer().into_iter().map(works));
            }
            _ => {}
        }
        moves
    }

    /// What the worker may say something of.
    fn may_answer(&self) -> Vec<u64> {
        if self.path != Path::Up || self.mood != Mood::Well {
            return Vec::new();
        }
        let given_up = self.stale.then_some(0);
        self.held.iter().copied().chain(given_up).collect()
    }

    /// A number for another request.
    fn free(&self) -> Option<u64> {
        NUMBERS
            .into_iter()
            .find(|number| !self.queued.contains(number) && !self.held.contains(number))
    }

    /// Whether it can be placed on again once the worker is well and answers. Waits for a frame
    /// do not end then, and nobody places anything: whatever is awaited has to be owed by the
    /// worker, or a wait that ends by itself.
    pub(super) fn recovers(&self) -> bool {
        let mut sim = self.clone();
        if sim.mood != Mood::Well {
            sim.make(Move::Heals);
        }
        let (mut known, mut open) = (HashSet::new(), vec![sim]);
        while let Some(sim) = open.pop() {
            if sim.path == Path::Up && sim.link.placeable() {
                return true;
            }
            let by_itself = [Timer::Redial, Timer::Probe, Timer::Reattach].into_iter();
            let ends = by_itself.filter(|timer| sim.armed.contains(timer));
            let steps = sim.of_the_worker().into_iter().chain(ends.map(Move::Ends));
            // Of what was given up it need not say anything.
            for step in steps.filter(|step| !matches!(step, Move::Answers(_, 0))) {
                let mut next = sim.clone();
                next.make(step);
                if known.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
        false
    }

    // -- what it does ------------------------------------------------------

    pub(super) fn make(&mut self, step: Move) {
        self.came = Came::Nothing;
        match step {
            Move::Choose => self.queued.extend(self.free()),
            Move::Send(number) => {
                self.queued.remove(&number);
                self.held.insert(number);
                if matches!(self.link.state(), State::HalfOpen { .. }) {
                    self.probe = Some(number);
                }
                self.feed(Event::Placed(number));
            }
            Move::Cancel(number) => {
                self.held.remove(&number);
                self.stale = true;
                self.probe.take_if(|probe| *probe == number);
                self.feed(Event::Undecided(number));
            }
            Move::Opens => {
                self.path = Path::Greeting;
                self.feed(Event::Opened);
            }
            Move::Greets => self.greets("w"),
            Move::Beats => self.feed(Event::Frame(Some(&load(0)))),
            Move::Speaks => self.feed(Event::Frame(None)),
            Move::TellsOfAStep(age) => self.feed(Event::Frame(Some(&load(age)))),
            Move::Answers(answer, of) => self.answers(answer, of),
            Move::Hears => self.ends(Event::Broken),
            Move::Ends(timer) => {
                self.armed.remove(&timer);
                if timer == Timer::Greeting {
                    self.left.vain = self.left.vain.saturating_sub(1);
                }
                self.feed(Event::Fired(timer));
            }
            Move::Heals => {
                self.incarnation += u64::from(self.mood == Mood::Dead);
                self.mood = Mood::Well;
            }
            Move::Becomes(mood) => {
                self.left.faults -= 1;
                self.mood = mood;
                if mood == Mood::Dead && matches!(self.path, Path::Greeting | Path::Up) {
                    self.path = Path::Severed;
                }
            }
            Move::Breaks => {
                self.left.faults -= 1;
                self.path = Path::Severed;
            }
            Move::BreaksTheProtocol => {
                self.left.faults -= 1;
                self.ends(Event::Violated);
            }
            Move::GreetsAsAnother => {
                self.left.faults -= 1;
                self.greets("x");
            }
            Move::Refuses => {
                self.left.vain -= 1;
                // As a driver tells it: it broke, and nobody listens there.
                self.ends(Event::Broken);
                self.feed(Event::Refused);
            }
        }
    }

    fn greets(&mut self, id: &str) {
        let died = self.link.away() && self.link.incarnation() != self.incarnation;
        self.path = Path::Up;
        // A new session is no probation.
        self.probe = None;
        self.feed(Event::Hello(&hello(id, self.incarnation)));
        if died && self.link.open() {
            self.came = Came::Died;
            self.stale = false;
        }
    }

    fn answers(&mut self, answer: Answer, of: u64) {
        // Any answer is a frame first.
        self.feed(Event::Frame(None));
        if !self.held.remove(&of) {
            self.stale = false;
        }
        let probation = matches!(self.link.state(), State::HalfOpen { .. });
        let decides = self.probe == Some(of);
        if decides || answer == Answer::Works {
            self.probe = None;
        }
        match answer {
            Answer::Works => self.feed(Event::Answered),
            Answer::Fails => self.feed(Event::Faulted(of)),
            Answer::SaysNothing => self.feed(Event::Undecided(of)),
        }
        if probation && answer == Answer::Fails && decides != (*self.link.state() == State::Ejected)
        {
            self.wrong = Some("a failure decides that is not the probe's, or the probe's does not");
        }
        self.left.failures -= u8::from(answer != Answer::Works);
        if probation && *self.link.state() == State::Live {
            self.came = Came::LetInAgain;
        }
    }

    /// The connection has ended: what has not left the router is lost by that alone.
    fn ends(&mut self, how: Event<'_>) {
        self.path = Path::Closed;
        self.queued.clear();
        self.stale = false;
        self.probe = None;
        self.feed(how);
    }

    fn feed(&mut self, event: Event<'_>) {
        let before = self.link.clone();
        match self.link.apply(event) {
            Ok(actions) => {
                let losses = actions.iter().filter(|a| matches!(a, Action::Lose(_)));
                if losses.count() > 1 {
                    self.wrong = Some("a loss that is told twice at once");
                }
                for action in actions {
                    self.perform(&before, action);
                }
            }
            Err(_) => self.wrong = Some("a violation that is none"),
        }
        self.check();
    }

    fn perform(&mut self, before: &Link, action: Action) {
        let greeted = *before.state() == State::Greeting;
        let allowed = match action {
            Action::Dial => std::mem::replace(&mut self.path, Path::Dialling) == Path::Closed,
            Action::SendHello { .. } => self.path == Path::Greeting,
            Action::Close => {
                let path = std::mem::replace(&mut self.path, Path::Closed);
                path != Path::Closed && !before.open()
            }
            Action::Arm(timer, _) => {
                self.armed.insert(timer);
                match timer {
                    Timer::Suspect | Timer::Lost => greeted || before.open(),
                    Timer::Probe => before.open(),
                    Timer::Reattach => before.open() && self.path == Path::Closed,
                    Timer::Greeting => !before.open(),
                    // This one is armed by how often it was.
                    Timer::Redial => false,
                }
            }
            Action::ArmRedial(_) => {
                self.armed.insert(Timer::Redial);
                !self.link.open()
            }
            Action::Disarm(timer) => {
                self.armed.remove(&timer);
                true
            }
            Action::Reattach => {
                self.came = Came::Reattached;
                greeted && before.away() && before.incarnation() == self.incarnation
            }
            Action::ForgetCache | Action::IndexOff(_) => greeted,
            Action::Lose(Loss::Silent) => {
                let first = !matches!(before.state(), State::Lost(_));
                let news = first || !self.held.is_empty();
                self.lose();
                news && before.open()
            }
            Action::Lose(_) => {
                self.lose();
                std::mem::take(&mut self.owed)
            }
            Action::StateChanged => {
                self.owed |= greeted && self.link.open();
                true
            }
        };
        if !allowed {
            self.wrong = Some("an action that its state does not allow");
        }
    }

    fn lose(&mut self) {
        self.stale |= !self.held.is_empty() && self.path == Path::Up;
        self.held.clear();
        self.probe = None;
    }

    /// What holds between any two events.
    fn check(&mut self) {
        let (state, armed) = (self.link.state(), |timer: Timer| {
            self.armed.contains(&timer)
        });
        let (open, away) = (self.link.open(), self.link.away());
        let dials = matches!(state, State::Dialling | State::Greeting);
        let rests = matches!(state, State::Waiting | State::Refused(_));
        let lost = matches!(state, State::Lost(_));
        let (live, ejected) = (*state == State::Live, *state == State::Ejected);
        let mut wrong = None;
        let mut hold = |holds: bool, what| {
            if !holds {
                wrong = Some(what);
            }
        };
        hold(rests == armed(Timer::Redial), "no next try");
        hold(dials == armed(Timer::Greeting), "an endless greeting");
        hold(away == armed(Timer::Reattach), "an endless return");
        hold(!ejected || armed(Timer::Probe), "ejected for ever");
        hold(!live || armed(Timer::Suspect), "unnoticed silence");
        hold(!open || lost || armed(Timer::Lost), "silence, no loss");
        hold(open || !armed(Timer::Lost), "a wait for what cannot come");
        hold(open || away || !self.owed, "a loss that is not told");
        hold(
            open || away || self.held.is_empty(),
            "a request that nobody has",
        );
        hold(!lost || self.held.is_empty(), "a request at a lost worker");
        let probes = matches!(state, State::HalfOpen { .. }) && !self.link.placeable();
        hold(
            probes == self.probe.is_some(),
            "a probe that is none, or a second one",
        );
        self.wrong = self.wrong.or(wrong);
    }
}
