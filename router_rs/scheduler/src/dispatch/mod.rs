//! Who of those that wait is tried when, who goes, and who may wait at all.
//!
//! The one loop of the gateway and of the simulator. What drives it says what
//! happens and when, and chooses plans in between:
//!
//! ```text
//!  arrival ── admit ──▶ arrives ─▶ Pass ─┐   next ─▶ Policy::choose ─▶ judge ─┐
//!  report ─── look ───▶ pass ────▶ Pass ─┴▶  ▲                                │
//!                                            └── came_of: goes, waits, ends ◀─┘
//! ```
//!
//! Between [`Dispatch::next`] and [`Dispatch::came_of`] nothing of it need be
//! locked: a request that is tried is taken, and its place is kept. Models have
//! nothing in common, so each has a line of its own. Times are milliseconds on
//! the clock of the virtual deadlines.

mod admit;
mod ahead;
mod line;
mod overload;
mod rules;

use crate::deadline::ClassTargets;
use crate::queue::{Lane, QueueSettings, Ticket};
use crate::request::{Class, PerClass};
use line::Line;
use std::collections::BTreeMap;
use std::sync::Arc;

pub use admit::Admitted;
pub use rules::{Hold, Others, Reported, Verdict, may_run};

/// How requests leave a router.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DispatchSettings {
    /// Of the queue of each model.
    pub queue: QueueSettings,
    /// Head starts of the classes, and what work weighs: the keys.
    pub targets: ClassTargets,
    /// A request leaves when its worker is predicted to start it within so
    /// long, or within one step, ms.
    pub dispatch_ahead_ms: f64,
    /// Longest predicted wait for which a request is admitted, ms.
    pub max_wait_ms: f64,
    /// Requests of a model that are tried in one go, most urgent first: a bound
    /// on what a report costs.
    pub tried_at_once: usize,
    /// Between two looks at a model's waiting requests for the sake of workers
    /// that none of them means to go to, ms: with many workers somebody reports
    /// all the time.
    pub pass_ms: f64,
}

impl Default for DispatchSettings {
    fn default() -> Self {
        Self {
            queue: QueueSettings::default(),
            targets: ClassTargets::default(),
            dispatch_ahead_ms: 50.0,
            max_wait_ms: 60_000.0,
            tried_at_once: 32,
            pass_ms: 5.0,
        }
    }
}

/// Whether what waits is to be tried.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Look {
    /// [`Dispatch::pass`] now.
    Now,
    /// Not before this time, if nothing else leads to it sooner.
    At(f64),
    /// The report changes nothing for those that wait.
    No,
}

/// A place among those that wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    model: Arc<str>,
    ticket: Ticket,
}

/// Requests that are to be tried now, one by one ([`Dispatch::next`]).
#[derive(Debug)]
pub struct Pass {
    model: Arc<str>,
    /// Each with the key that it goes as; the next one is at the end.
    tried: Vec<(Ticket, f64)>,
    /// Whether it is the one that is being made.
    ours: bool,
    again_ms: Option<f64>,
    /// The request for which it was begun.
    came: Option<Ticket>,
}

impl Pass {
    fn not_ours(model: Arc<str>) -> Self {
        Self {
            model,
            tried: Vec::new(),
            ours: false,
            again_ms: None,
            came: None,
        }
    }

    fn next_of<T>(&mut self, line: &mut Line<T>) -> Option<(Ticket, Turn)> {
        let tried = self.tried.last().map(|(ticket, _)| *ticket);
        if let Some(joined) = line.next_joined(tried) {
            return Some((joined, line.turn(joined, joined.virtual_deadline_ms())));
        }
        let (ticket, key_ms) = self.tried.pop()?;
        Some((ticket, line.turn(ticket, key_ms)))
    }

    /// The model.
    pub fn model(&self) -> &Arc<str> {
        &self.model
    }

    /// When another look is due, if nothing leads to it sooner: as
    /// [`Look::At`].
    pub fn again_ms(&self) -> Option<f64> {
        self.again_ms
    }

    /// Where the request stands that came with it ([`Dispatch::arrives`]).
    pub fn place(&self) -> Option<Place> {
        let (model, ticket) = (Arc::clone(&self.model), self.came?);
        Some(Place { model, ticket })
    }
}

/// What a request goes as that is tried.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Turn {
    /// Key to book by and to send, ms.
    pub key_ms: f64,
    /// In an overload more urgent ones wait, which go first whatever their keys.
    pub yields: bool,
}

impl Turn {
    /// Before and after others by nothing but this key.
    pub fn by_key(key_ms: f64) -> Self {
        let yields = false;
        Self { key_ms, yields }
    }

    /// Key to choose by, ms: one that yields is behind all that its worker has.
    pub fn chosen_by_ms(self) -> f64 {
        match self.yields {
            true => f64::INFINITY,
            false => self.key_ms,
        }
    }
}

/// A request that is tried.
#[derive(Debug)]
pub struct Next<T> {
    /// Its place, for [`Dispatch::came_of`].
    pub place: Place,
    /// The request.
    pub item: T,
    /// What it goes as.
    pub turn: Turn,
}

/// What came of trying a request.
#[derive(Debug)]
pub enum Outcome<T> {
    /// It went: its tenant pays for it.
    Went,
    /// It will never go.
    Ended,
    /// There is no room for it: late, it is passed by nobody any more.
    NoRoom(T),
    /// Its worker would not start it soon, and it is listed there; or nobody who
    /// could run it is there or ready.
    Waits(T, Option<Hold>),
}

/// Whose a request is and where it stands.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its model.
    pub model: Arc<str>,
    /// Class and tenant.
    pub lane: Lane,
    /// Its virtual deadline, ms.
    pub key_ms: f64,
    /// Its predicted work, ms.
    pub work_ms: f64,
    /// It ran and goes on elsewhere: its client waits in the middle of an
    /// answer (DESIGN 5), so it goes before new work of its class.
    pub goes_on: bool,
}

/// Requests that wait in a router, by model.
#[derive(Debug)]
pub struct Dispatch<T> {
    settings: DispatchSettings,
    lines: BTreeMap<Arc<str>, Line<T>>,
    length: usize,
}

impl<T> Dispatch<T> {
    /// Nobody waits.
    pub fn new(settings: DispatchSettings) -> Self {
        Self {
            settings,
            lines: BTreeMap::new(),
            length: 0,
        }
    }

    /// How requests leave.
    pub fn settings(&self) -> &DispatchSettings {
        &self.settings
    }

    /// Requests that wait, those that are tried included.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Requests of a model that wait and are as urgent by class, those that are
    /// tried included.
    pub fn as_urgent(&self, model: &str, class: Class) -> usize {
        let line = self.lines.get(model);
        line.map_or(0, |line| line.as_urgent(class))
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// A request waits, without being tried.
    ///
    /// # Errors
    /// The request, where its model's queue is full.
    pub fn waits(&mut self, entry: &Entry, now_ms: f64, item: T) -> Result<Place, T> {
        let line = match self.lines.get_mut(&entry.model) {
            Some(line) => line,
            None => {
                let new = Line::new(&self.settings);
                self.lines.entry(Arc::clone(&entry.model)).or_insert(new)
            }
        };
        let ticket = line.join(entry, now_ms, item)?;
        self.length += 1;
        Ok(Place {
            model: Arc::clone(&entry.model),
            ticket,
        })
    }

    /// A request is there, new or once more. It is tried at once where nobody
    /// goes before it in the order of service but those that found no room;
    /// otherwise they are tried first, so that it passes nobody: now, or where
    /// they were tried a moment ago once more after [`DispatchSettings::pass_ms`]
    /// ([`Pass::again_ms`]). Nor does it pass one that lacks room and is late.
    /// What goes on is tried at once. While a pass is being made, that pass tries
    /// it.
    ///
    /// # Errors
    /// The request, where its model's queue is full.
    pub fn arrives(&mut self, entry: &Entry, now_ms: f64, item: T) -> Result<Pass, T> {
        let Place { model, ticket } = self.waits(entry, now_ms, item)?;
        let mut pass = Pass::not_ours(model);
        pass.came = Some(ticket);
        let Some(line) = self.lines.get_mut(&pass.model) else {
            return Ok(pass);
        };
        if entry.goes_on || line.may_try(ticket, self.settings.tried_at_once) {
            if !line.join_pass(ticket) {
                pass.ours = line.enter();
                line.makes_way(entry.lane.class);
                pass.tried.push((ticket, ticket.virtual_deadline_ms()));
            }
        } else if line.due(now_ms) && line.enter() {
            pass.ours = true;
            pass.tried = line.begin_pass(now_ms, &self.settings);
        } else {
            pass.again_ms = Some(line.next_pass_ms());
        }
        Ok(pass)
    }

    /// Whether a worker's report may let somebody go: it would start a prompt
    /// soon, or before all that were sent there, or somebody waits for room.
    pub fn look(&self, report: &Reported, now_ms: f64) -> Look {
        let line = self.lines.get(&report.model);
        line.map_or(Look::No, |line| line.look(report, now_ms, &self.settings))
    }

    /// Whether a look that was put off ([`Look::At`]) is still due: no pass has
    /// been made since.
    pub fn due(&self, model: &str, now_ms: f64) -> bool {
        let line = self.lines.get(model);
        line.is_some_and(|line| line.due(now_ms))
    }

    /// Begins to try what waits for a model, in the order of service. Those
    /// behind a request that finds no room are tried too: its place may be
    /// elsewhere, or larger. Once its virtual deadline has passed nobody of its
    /// model passes it any more, so that a large one is not starved.
    ///
    /// One pass at a time is made for a model. Where one is being made already
    /// this one is empty, and that one begins anew when it is through.
    pub fn pass(&mut self, model: &Arc<str>, now_ms: f64) -> Pass {
        let mut pass = Pass::not_ours(Arc::clone(model));
        if let Some(line) = self.lines.get_mut(model)
            && line.enter()
        {
            pass.ours = true;
            pass.tried = line.begin_pass(now_ms, &self.settings);
        }
        pass
    }

    /// Takes the next request to try; [`Dispatch::came_of`] follows. After `None`
    /// the pass is over: it is to be driven to there, or given up
    /// ([`Dispatch::give_up`]).
    pub fn next(&mut self, pass: &mut Pass, now_ms: f64) -> Option<Next<T>> {
        let line = self.lines.get_mut(&pass.model)?;
        while pass.ours {
            while let Some((ticket, turn)) = pass.next_of(line) {
                if line.blocks(ticket) {
                    continue;
                }
                if let Some(item) = line.take(ticket) {
                    return Some(Next {
                        place: Place {
                            model: Arc::clone(&pass.model),
                            ticket,
                        },
                        item,
                        turn,
                    });
                }
            }
            pass.ours = line.goes_again();
            if pass.ours {
                pass.tried = line.begin_pass(now_ms, &self.settings);
            }
        }
        None
    }

    /// A pass is not driven to its end. Who was being tried is forgotten; the
    /// others are tried at the next look, which is due now.
    pub fn give_up(&mut self, pass: &mut Pass, tried: Option<&Place>) {
        if let Some(place) = tried {
            self.leave(place, false);
        }
        if std::mem::replace(&mut pass.ours, false)
            && let Some(line) = self.lines.get_mut(&pass.model)
        {
            line.give_up_pass();
        }
    }

    /// What came of trying a request.
    pub fn came_of(&mut self, pass: &mut Pass, place: &Place, outcome: Outcome<T>, now_ms: f64) {
        let Some(line) = self.lines.get_mut(&place.model) else {
            return;
        };
        let ticket = place.ticket;
        match outcome {
            Outcome::Went => self.leave(place, true),
            Outcome::Ended => self.leave(place, false),
            Outcome::NoRoom(item) => {
                let late = ticket.virtual_deadline_ms() <= now_ms;
                line.put_back(ticket, item, None);
                line.found_no_room(ticket, late);
                if late {
                    pass.tried.clear();
                }
            }
            Outcome::Waits(item, hold) => line.put_back(ticket, item, hold),
        }
    }

    /// One that waits leaves; nobody pays. `None` while it is tried: then it
    /// stays.
    pub fn remove(&mut self, place: &Place) -> Option<T> {
        let item = self.lines.get_mut(&place.model)?.take(place.ticket)?;
        self.leave(place, false);
        Some(item)
    }

    /// One that waits is turned away, since it has waited for as long as it may;
    /// as [`Dispatch::remove`]. An interactive one that has waited in vain begins an
    /// overload, whatever it waited for: room, too, goes to more urgent ones first.
    pub fn turn_away(&mut self, place: &Place, now_ms: f64) -> Option<T> {
        let class = self.lines.get(&place.model)?.class(place.ticket);
        let item = self.remove(place)?;
        if class == Some(Class::Interactive)
            && self.settings.keeps_targets()
            && let Some(line) = self.lines.get_mut(&place.model)
        {
            line.late(now_ms);
        }
        Some(item)
    }

    /// A line stays when it is empty: it knows whose turn it is.
    fn leave(&mut self, place: &Place, served: bool) {
        if let Some(line) = self.lines.get_mut(&place.model)
            && line.leave(place.ticket, served)
        {
            self.length -= 1;
        }
    }

    /// All that wait and are not being tried, each with the time since when.
    pub fn waiting(&self) -> impl Iterator<Item = (Place, f64, &T)> {
        self.lines.iter().flat_map(|(model, line)| {
            line.waiting().map(|(ticket, since_ms, item)| {
                let model = Arc::clone(model);
                (Place { model, ticket }, since_ms, item)
            })
        })
    }

    /// Predicted work of a model's requests that wait and are listed at no
    /// worker, by class, ms.
    pub fn unlisted_by_class_ms(&self, model: &str) -> PerClass<f64> {
        let line = self.lines.get(model);
        line.map_or([0.0; 3], Line::unlisted_by_class_ms)
    }

    /// Predicted work of a model's requests that wait and are listed at no
    /// worker, ms: of those with this key or an earlier one, and of all that
    /// are as urgent by class.
    pub fn unlisted_ms(&self, model: &str, class: Class, key_ms: f64) -> (f64, f64) {
        let line = self.lines.get(model);
        line.map_or((0.0, 0.0), |line| line.unlisted_ms(class, key_ms))
    }
}
