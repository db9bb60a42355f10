//! An engine that computes the most urgent prompt first.

use crate::Job;
use kvmesh_kv_index::WorkerSlot;
use kvmesh_scheduler::{Booking, Share};

/// What is left of a prompt whose every chunk is computed, by rounding, ms.
const NOTHING_MS: f64 = 1e-6;

/// Where an engine stops a prompt for one that is more urgent. What is stopped stays, and
/// goes on where it was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Stops {
    /// A prompt is one step, whatever its length.
    Nowhere,
    /// Where it cannot stop between layers.
    BetweenChunks,
    /// As shipped; layers take no time here.
    BetweenLayers,
}

impl Stops {
    /// Longest chunk, ms.
    fn chunk_ms(self) -> f64 {
        match self {
            Self::Nowhere => f64::INFINITY,
            Self::BetweenChunks => 100.0,
            Self::BetweenLayers => 256.0,
        }
    }
}

pub(crate) type Booked = Vec<(WorkerSlot, Booking)>;

/// A prompt that was sent to an engine and is not computed.
pub(crate) struct Sent {
    pub(crate) key: f64,
    pub(crate) at: usize,
    pub(crate) begun: bool,
    /// Left to compute, ms.
    pub(crate) left: f64,
    /// The same as the engine tells it, which counts whole chunks.
    pub(crate) told: f64,
    /// Left of a chunk that was begun, ms.
    pub(crate) chunk: f64,
    pub(crate) booked: Booked,
}

/// The step that runs.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub(crate) at: usize,
    pub(crate) since: f64,
    pub(crate) ends: f64,
}

/// What was computed of one prompt without a break.
pub(crate) struct Slice {
    pub(crate) at: usize,
    pub(crate) from: f64,
    pub(crate) to: f64,
}

/// Computes a token a millisecond, of the prompt with the earliest key.
#[derive(Default)]
pub(crate) struct Engine {
    pub(crate) sent: Vec<Sent>,
    pub(crate) running: Option<Step>,
    pub(crate) slices: Vec<Slice>,
    /// Which prompts are computed, and when.
    pub(crate) done: Vec<(usize, f64)>,
}

impl Engine {
    /// Ends the step that is over, and computes what is the most urgent. Whether there was
    /// something to do.
    pub(crate) fn turn(&mut self, now: f64, stops: Stops) -> bool {
        let over = self.running.is_some_and(|step| step.ends <= now);
        if over {
            self.halt(now);
        }
        let keys = self.sent.iter().enumerate();
        let first = keys.min_by(|a, b| a.1.key.total_cmp(&b.1.key).then(a.0.cmp(&b.0)));
        let Some((place, at)) = first.map(|(place, one)| (place, one.at)) else {
            return over;
        };
        if let Some(step) = self.running {
            if stops != Stops::BetweenLayers || step.at == at {
                return over;
            }
            self.halt(now);
            self.turn(now, stops);
            return true;
        }
        self.begin(place, now, stops);
        true
    }

    fn begin(&mut self, place: usize, now: f64, stops: Stops) {
        let one = &mut self.sent[place];
        one.begun = true;
        if one.chunk <= 0.0 {
            one.chunk = one.left.min(stops.chunk_ms());
        }
        if stops == Stops::Nowhere {
            // From now on it is the running step, and no prompt that waits.
            one.told = 0.0;
            one.booked.clear();
        }
        self.running = Some(Step {
            at: one.at,
            since: now,
            ends: now + one.chunk,
        });
    }

    /// The running step is over, or held.
    fn halt(&mut self, now: f64) {
        let step = self.running.take().unwrap();
        let mut sent = self.sent.iter();
        let place = sent.position(|one| one.at == step.at).unwrap();
        let one = &mut self.sent[place];
        let over = step.ends <= now;
        let ran = if over { one.chunk } else { now - step.since };
        one.left -= ran;
        one.chunk -= ran;
        match self.slices.last_mut() {
            // What was begun and stopped at one and the same time has computed nothing.
            _ if step.since >= now => {}
            Some(last) if last.at == step.at && last.to >= step.since => last.to = now,
            _ => self.slices.push(Slice {
                at: step.at,
                from: step.since,
                to: now,
            }),
        }
        if over {
            one.told = one.told.min(one.left);
        }
        if one.left <= NOTHING_MS {
            self.done.push((step.at, now));
            self.sent.remove(place);
        }
    }

    /// Length of the running step, ms.
    pub(crate) fn step_ms(&self) -> f64 {
        self.running.map_or(0.0, |step| step.ends - step.since)
    }

    /// Its prompts as this router and the others see them.
    pub(crate) fn shares(&self, router: usize, jobs: &[Job]) -> (Share, Share) {
        let (mut own, mut others) = (Share::default(), Share::default());
        for one in self.sent.iter().filter(|one| one.told > 0.0) {
            let job = &jobs[one.at];
            let share = match job.router == router {
                true => &mut own,
                false => &mut others,
            };
            let tokens = one.told.ceil() as u64;
            if one.begun {
                share.running_prefill_tokens += tokens;
            } else {
                share.queued += 1;
                share.queued_prefill_tokens += tokens;
            }
            share.classes.waiting[job.class.index()] += 1;
            share.classes.waiting_tokens[job.class.index()] += tokens;
        }
        (own, others)
    }
}
