//! What waits to be sent to one router, and in which order.
//!
//! Three lanes, drained in this order (PROTOCOLS 1):
//!
//! * step output: never dropped, never reordered; past its bound in bytes or
//!   age the session is closed, for then the router does not read;
//! * load: only the newest, at most one per `load_coalesce`; rides on a step
//!   frame where one goes anyway;
//! * cache: a place in the shared log, or a snapshot where the log has gone on.
//!
//! A slow router fills its own lanes and nobody else's: whoever pushes never
//! waits.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use bytes::Bytes;

use crate::{
    attempt::AttemptId,
    cache_log::CacheLog,
    replay::{Sent, Wanted, replay},
    report::Part,
    session::Held,
    settings::Settings,
    snapshot::Snapshot,
};

/// What a session sends next.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    /// A frame.
    Frame(Bytes),
    /// A load report: it is to be made now.
    Load,
    /// The cache's content has to be read for this router.
    SnapshotWanted,
    /// Nothing until then, or until something is pushed.
    Wait(Option<Instant>),
}

/// Where the cache lane stands.
#[derive(Debug)]
enum Place {
    /// Follows the log.
    Log,
    /// Waits for whoever reads the cache.
    Wanted,
    /// Gets a snapshot.
    Snapshot(Snapshot),
}

/// The sending side of one session.
#[derive(Debug)]
pub(crate) struct Lanes {
    steps: VecDeque<(Instant, Bytes)>,
    step_bytes: usize,
    sent: Sent,
    load_changed: bool,
    load_sent: Option<Instant>,
    /// Load reports that are held back, each with when it goes.
    late_loads: VecDeque<(Instant, Bytes)>,
    next_event: u64,
    place: Place,
}

impl Lanes {
    /// `next_event`: the first cache event that the router lacks.
    pub(crate) fn new(next_event: u64) -> Self {
        Self {
            steps: VecDeque::new(),
            step_bytes: 0,
            sent: Sent::default(),
            load_changed: true,
            load_sent: None,
            late_loads: VecDeque::new(),
            next_event,
            place: Place::Log,
        }
    }

    /// Queues step output.
    pub(crate) fn push(&mut self, frame: Bytes, now: Instant) {
        self.step_bytes += frame.len();
        self.steps.push_back((now, frame));
    }

    /// Says again what is wanted and known of what was said here.
    pub(crate) fn replay(
        &self,
        wanted: &[Wanted],
        held: &BTreeMap<AttemptId, Held>,
    ) -> Vec<(Wanted, Part)> {
        replay(&self.sent, &self.steps, wanted, held)
    }

    /// Forgets what waits beyond a bound, the oldest first, and then all that was sent: what
    /// was said after it would have a hole. Whether something was forgotten.
    pub(crate) fn forget_beyond(&mut self, most: usize) -> bool {
        let mut until = None;
        while self.step_bytes > most
            && let Some((queued, frame)) = self.steps.pop_front()
        {
            self.step_bytes -= frame.len();
            until = Some(queued);
        }
        if let Some(until) = until {
            self.sent.forget(until);
        }
        until.is_some()
    }

    /// Why the session is to be closed; `None`: its lanes are within their bounds.
    pub(crate) fn problem(&self, settings: &Settings, now: Instant) -> Option<String> {
        let (oldest, _) = self.steps.front()?;
        let age = now.saturating_duration_since(*oldest);
        if self.step_bytes > settings.step_lane_bytes {
            return Some(format!(
                "step output of {} bytes waits, allowed are {}",
                self.step_bytes, settings.step_lane_bytes
            ));
        }
        (age > settings.step_lane_age).then(|| {
            format!(
                "step output has waited for {:.1} s, allowed are {:.1} s",
                age.as_secs_f64(),
                settings.step_lane_age.as_secs_f64()
            )
        })
    }

    /// Whether step output waits.
    pub(crate) fn has_steps(&self) -> bool {
        !self.steps.is_empty()
    }

    // -- load --------------------------------------------------------------

    /// The load has changed: it is told when it is due.
    pub(crate) fn mark_load(&mut self) {
        self.load_changed = true;
    }

    /// Whether a load report may go now.
    pub(crate) fn load_is_due(&self, settings: &Settings, now: Instant) -> bool {
        self.load_due(settings).is_none_or(|due| due <= now)
    }

    fn load_due(&self, settings: &Settings) -> Option<Instant> {
        self.load_sent.map(|sent| sent + settings.load_coalesce)
    }

    /// A load report goes now.
    pub(crate) fn load_goes(&mut self, now: Instant) {
        self.load_changed = false;
        self.load_sent = Some(now);
    }

    /// A load report, told as it is now, goes at that time: as many wait as are
    /// made within the delay, one per `load_coalesce` at most.
    pub(crate) fn hold_load(&mut self, goes: Instant, frame: Bytes) {
        self.late_loads.push_back((goes, frame));
    }

    // -- snapshots ---------------------------------------------------------

    /// Somebody begins to read the cache. False: nobody asked for it.
    pub(crate) fn begin_snapshot(&mut self, as_of: u64) -> bool {
        let wanted = matches!(self.place, Place::Wanted);
        if wanted {
            self.place = Place::Snapshot(Snapshot::new(as_of));
        }
        wanted
    }

    /// The snapshot that is being made.
    pub(crate) fn snapshot(&mut self) -> Option<&mut Snapshot> {
        match &mut self.place {
            Place::Snapshot(snapshot) => Some(snapshot),
            _ => None,
        }
    }

    // -- what is sent ------------------------------------------------------

    /// What goes now. `step_ends`: when the running step is expected to end,
    /// which tells what has changed by then, so that nothing else has to.
    pub(crate) fn next(
        &mut self,
        log: &CacheLog,
        settings: &Settings,
        now: Instant,
        step_ends: Option<Instant>,
    ) -> Next {
        if let Some((queued, frame)) = self.steps.pop_front() {
            self.step_bytes -= frame.len();
            self.sent.keep(queued, frame.clone(), settings.replay_bytes);
            return Next::Frame(frame);
        }
        if self.late_loads.front().is_some_and(|(at, _)| *at <= now)
            && let Some((_, frame)) = self.late_loads.pop_front()
        {
            return Next::Frame(frame);
        }
        let mut due = self.late_loads.front().map(|(at, _)| *at);
        if self.load_changed {
            match self.load_due(settings).filter(|at| *at > now) {
                None => return Next::Load,
                Some(at) => due = earlier(due, Some(at)),
            }
        }
        if matches!(self.place, Place::Log) && !log.covers(self.next_event) {
            self.place = Place::Wanted;
            return Next::SnapshotWanted;
        }
        match &mut self.place {
            Place::Wanted => {}
            Place::Log => {
                if let Some((after, frame)) = log.frame_from(self.next_event) {
                    self.next_event = after;
                    return Next::Frame(frame);
                }
                due = earlier(due, log.due(settings.cache_coalesce));
            }
            Place::Snapshot(snapshot) => {
                let frame = snapshot.next(now, settings.snapshot_interval);
                if let Some(next_event) = snapshot.done() {
                    self.next_event = next_event;
                    self.place = Place::Log;
                    if frame.is_none() {
                        return self.next(log, settings, now, step_ends);
                    }
                } else if frame.is_none() {
                    // Pauses are of its own making: no step ends them.
                    return Next::Wait(earlier(due, snapshot.due()));
                }
                if let Some(frame) = frame {
                    return Next::Frame(frame);
                }
            }
        }
        Next::Wait(due.filter(|due| step_ends.is_none_or(|ends| ends > *due)))
    }
}

fn earlier(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::Duration;

    use super::*;
    use crate::cache_log::Change;

    fn frame(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    fn lanes(now: Instant) -> Lanes {
        let mut lanes = Lanes::new(1);
        lanes.load_goes(now);
        lanes
    }

    fn next(lanes: &mut Lanes, log: &CacheLog, now: Instant) -> Next {
        lanes.next(log, &Settings::default(), now, None)
    }

    #[test]
    fn steps_go_before_load_and_load_before_cache_events() {
        let (settings, now) = (Settings::default(), Instant::now());
        let mut log = CacheLog::new(10);
        log.append(1, vec![Change::Cleared], now).unwrap();
        log.publish();
        let mut lanes = lanes(now);
        let later = now + settings.load_coalesce;
        lanes.mark_load();
        lanes.push(frame("one"), now);
        lanes.push(frame("two"), now);
        assert_eq!(next(&mut lanes, &log, later), Next::Frame(frame("one")));
        assert_eq!(next(&mut lanes, &log, later), Next::Frame(frame("two")));
        assert_eq!(next(&mut lanes, &log, later), Next::Load);
        lanes.load_goes(later);
        let (_, cache) = log.frame_from(1).unwrap();
        assert_eq!(next(&mut lanes, &log, later), Next::Frame(cache));
        assert_eq!(next(&mut lanes, &log, later), Next::Wait(None));
    }

    #[test]
    fn load_waits_for_its_time_unless_a_step_ends_before() {
        let (settings, now) = (Settings::default(), Instant::now());
        let (log, mut lanes) = (CacheLog::new(10), lanes(now));
        lanes.mark_load();
        let due = now + settings.load_coalesce;
        assert_eq!(next(&mut lanes, &log, now), Next::Wait(Some(due)));
        let step_ends = Some(now + Duration::from_millis(2));
        assert_eq!(
            lanes.next(&log, &settings, now, step_ends),
            Next::Wait(None)
        );
        assert_eq!(next(&mut lanes, &log, due), Next::Load);
    }

    #[test]
    fn held_loads_go_at_their_times_and_in_their_order() {
        let (settings, now) = (Settings::default(), Instant::now());
        let (log, mut lanes) = (CacheLog::new(10), lanes(now));
        let [first, second] = [300, 500].map(|ms| now + Duration::from_millis(ms));
        lanes.hold_load(first, frame("older"));
        lanes.hold_load(second, frame("newer"));
        let told = |lanes: &mut Lanes, at| lanes.next(&log, &settings, at, None);
        assert_eq!(told(&mut lanes, now), Next::Wait(Some(first)));
        assert_eq!(told(&mut lanes, first), Next::Frame(frame("older")));
        assert_eq!(told(&mut lanes, first), Next::Wait(Some(second)));
        assert_eq!(told(&mut lanes, second), Next::Frame(frame("newer")));
        assert_eq!(told(&mut lanes, second), Next::Wait(None));
    }

    #[test]
    fn a_router_that_lacks_what_the_log_forgot_gets_a_snapshot_and_then_the_log() {
        let (settings, now) = (Settings::default(), Instant::now());
        let mut log = CacheLog::new(1);
        for n in 1..=3 {
            log.append(n, vec![Change::Cleared], now).unwrap();
            log.publish();
        }
        let mut lanes = lanes(now);
        assert_eq!(next(&mut lanes, &log, now), Next::SnapshotWanted);
        assert_eq!(next(&mut lanes, &log, now), Next::Wait(None));
        assert!(lanes.begin_snapshot(log.last_event()));
        assert!(!lanes.begin_snapshot(log.last_event()));
        let chain = vec![5];
        let stores = vec![Change::Stored { parent: 1, chain }; 2];
        lanes.snapshot().unwrap().add(stores);
        assert_eq!(next(&mut lanes, &log, now), Next::Wait(None));
        lanes.snapshot().unwrap().end();
        // Tokens go before it all the same.
        lanes.push(frame("step"), now);
        assert_eq!(next(&mut lanes, &log, now), Next::Frame(frame("step")));
        assert!(matches!(next(&mut lanes, &log, now), Next::Frame(_)));
        log.append(4, vec![Change::Cleared], now).unwrap();
        log.publish();
        let (_, live) = log.frame_from(4).unwrap();
        assert_eq!(next(&mut lanes, &log, now), Next::Frame(live));
        assert_eq!(lanes.next(&log, &settings, now, None), Next::Wait(None));
    }

    #[test]
    fn a_router_that_does_not_read_passes_a_bound() {
        let (settings, now) = (Settings::default(), Instant::now());
        let mut lanes = lanes(now);
        assert_eq!(lanes.problem(&settings, now), None);
        lanes.push(frame("step"), now);
        assert_eq!(lanes.problem(&settings, now), None);
        let late = now + settings.step_lane_age + Duration::from_millis(1);
        assert!(
            lanes
                .problem(&settings, late)
                .unwrap()
                .contains("allowed are 10.0 s")
        );
        lanes.push(vec![0; settings.step_lane_bytes].into(), now);
        assert!(
            lanes
                .problem(&settings, now)
                .unwrap()
                .contains("bytes waits")
        );
    }
}
