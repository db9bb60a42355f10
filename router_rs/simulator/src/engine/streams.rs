//! The streams that decode on a worker. A step costs no time a stream: what
//! all have in common is kept once, as counts of steps.

use super::{HEADROOM, Sequence, units};
use kvmesh_scheduler::Class;
use std::collections::{BTreeMap, BTreeSet};

/// Tokens of a KV unit, and so steps from one growth of a stream to the next.
const UNIT: u64 = 16;

/// A stream.
#[derive(Debug, Clone)]
pub(super) struct Stream {
    pub(super) sequence: Sequence,
    /// Steps of the worker when it joined.
    joined: u64,
    /// First step before which it needs another unit.
    first_growth: u64,
}

impl Stream {
    /// Tokens still to come.
    fn left(&self, steps: u64) -> u32 {
        self.sequence.left - (steps - self.joined) as u32
    }

    fn ends(&self) -> u64 {
        self.joined + u64::from(self.sequence.left)
    }
}

/// All streams of a worker.
#[derive(Debug, Clone)]
pub(super) struct Streams {
    streams: BTreeMap<u32, Stream>,
    /// (step after which it ends, request).
    ends: BTreeSet<(u64, u32)>,
    /// Steps that decoded.
    steps: u64,
    context: u64,
    by_class: [u32; 3],
    by_router: Vec<([u32; 3], u64)>,
    /// Streams by the step, modulo [`UNIT`], at which they grow.
    phases: [u64; UNIT as usize],
    /// Streams by the step of their first growth, while it has not come.
    first_growths: BTreeMap<u64, u64>,
    /// Step for which room is there.
    room_until: u64,
    /// When the last step ended, ms.
    ended_ms: f64,
    /// Last tokens of those that joined since, ms.
    fresh: Vec<f64>,
    gaps: Vec<(f64, u32)>,
}

impl Streams {
    pub(super) fn new(routers: usize) -> Self {
        Self {
            streams: BTreeMap::new(),
            ends: BTreeSet::new(),
            steps: 0,
            context: 0,
            by_class: [0; 3],
            by_router: vec![([0; 3], 0); routers],
            phases: [0; UNIT as usize],
            first_growths: BTreeMap::new(),
            room_until: 0,
            ended_ms: 0.0,
            fresh: Vec::new(),
            gaps: Vec::new(),
        }
    }

    pub(super) fn batch(&self) -> u32 {
        self.streams.len() as u32
    }

    /// Sum of the context lengths, tokens.
    pub(super) fn context(&self) -> u64 {
        self.context
    }

    /// (streams by class, sum of their contexts) of a router.
    pub(super) fn of_router(&self, router: usize) -> ([u32; 3], u64) {
        self.by_router[router]
    }

    /// The smallest ITL target of the classes that are here, ms.
    pub(super) fn strictest_itl(&self, targets: &[f64; 3]) -> f64 {
        let here = (0..3).filter(|class| self.by_class[*class] > 0);
        here.map(|class| targets[class])
            .fold(f64::INFINITY, f64::min)
    }

    /// All requests, with the tokens still to come.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.streams
            .iter()
            .map(|(request, stream)| (*request, stream.left(self.steps)))
    }

    /// Class and tokens still to come of each.
    pub(super) fn left_by_class(&self) -> impl Iterator<Item = (Class, u32)> + '_ {
        let of = |stream: &Stream| (stream.sequence.class, stream.left(self.steps));
        self.streams.values().map(of)
    }

    pub(super) fn join(&mut self, sequence: Sequence) {
        let request = sequence.request;
        let reserved = units(sequence.length + HEADROOM.min(sequence.left)) * UNIT;
        let stream = Stream {
            joined: self.steps,
            first_growth: self.steps + reserved - u64::from(sequence.length) + 1,
            sequence,
        };
        // The token just made is computed with the next step.
        let context = u64::from(stream.sequence.length) + 1;
        self.context += context;
        self.by_class[class_number(stream.sequence.class)] += 1;
        let of_router = &mut self.by_router[stream.sequence.router];
        of_router.0[class_number(stream.sequence.class)] += 1;
        of_router.1 += context;
        *self.first_growths.entry(stream.first_growth).or_default() += 1;
        self.ends.insert((stream.ends(), request));
        self.fresh.push(stream.sequence.last_ms);
        self.streams.insert(request, stream);
    }

    /// One token of each; times between tokens are noted.
    pub(super) fn step(&mut self, now_ms: f64) {
        let batch = self.batch();
        let old = batch - (self.fresh.len() as u32).min(batch);
        if old > 0 {
            self.gaps.push((now_ms - self.ended_ms, old));
        }
        for last_ms in std::mem::take(&mut self.fresh) {
            self.note_gap(last_ms, now_ms);
        }
        self.ended_ms = now_ms;
        self.steps += 1;
        self.context += u64::from(batch);
        for (count, context) in &mut self.by_router {
            *context += u64::from(count.iter().sum::<u32>());
        }
    }

    pub(super) fn note_gap(&mut self, last_ms: f64, now_ms: f64) {
        if last_ms.is_finite() {
            self.gaps.push((now_ms - last_ms, 1));
        }
    }

    pub(super) fn take_gaps(&mut self) -> Vec<(f64, u32)> {
        std::mem::take(&mut self.gaps)
    }

    /// Takes one out that has made its last token.
    pub(super) fn take_finished(&mut self) -> Option<Stream> {
        let (step, request) = *self.ends.first()?;
        (step <= self.steps).then(|| self.take(request))?
    }

    /// Takes the youngest of the lowest class out.
    pub(super) fn take_victim(&mut self) -> Option<(Stream, u32)> {
        let youngest = self.streams.iter().max_by_key(|(request, stream)| {
            (
                class_number(stream.sequence.class),
                stream.joined,
                **request,
            )
        });
        let request = *youngest?.0;
        let stream = self.take(request)?;
        let left = stream.left(self.steps);
        Some((stream, left))
    }

    fn take(&mut self, request: u32) -> Option<Stream> {
        let stream = self.streams.remove(&request)?;
        self.ends.remove(&(stream.ends(), request));
        let made = self.steps - stream.joined;
        let context = u64::from(stream.sequence.length) + 1 + made;
        self.context -= context;
        self.by_class[class_number(stream.sequence.class)] -= 1;
        let of_router = &mut self.by_router[stream.sequence.router];
        of_router.0[class_number(stream.sequence.class)] -= 1;
        of_router.1 -= context;
        if stream.first_growth <= self.room_until {
            self.phases[(stream.first_growth % UNIT) as usize] -= 1;
        } else if let Some(count) = self.first_growths.get_mut(&stream.first_growth) {
            *count -= 1;
            if *count == 0 {
                self.first_growths.remove(&stream.first_growth);
            }
        }
        Some(stream)
    }

    /// Units that the next step needs beyond what is there.
    pub(super) fn growth(&self) -> u64 {
        let next = self.steps + 1;
        let first = self.first_growths.get(&next).copied().unwrap_or(0);
        self.phases[(next % UNIT) as usize] + first
    }

    /// The units that [`Streams::growth`] told are there.
    pub(super) fn grown(&mut self) {
        self.room_until = self.steps + 1;
        if let Some(first) = self.first_growths.remove(&self.room_until) {
            self.phases[(self.room_until % UNIT) as usize] += first;
        }
    }

    /// Units that a stream got beyond those it joined with.
    pub(super) fn grown_by(&self, stream: &Stream) -> u64 {
        if self.room_until < stream.first_growth {
            return 0;
        }
        (self.room_until - stream.first_growth) / UNIT + 1
    }
}

/// Interactive 0, standard 1, batch 2.
pub(crate) fn class_number(class: Class) -> usize {
    class.index()
}
