//! The waits that judge a worker, by given instants.
//!
//! A worker is suspect or lost when no frame of it came for too long. A router
//! that stood still meanwhile (its process was paused, or the machine was too
//! busy to run it) knows nothing of that: the frames lie in its sockets. It
//! shows in the look itself, which then comes much later than it was due. Such
//! a look fires nothing and moves the waits on the worker by its lateness; what
//! came is read before the next one.

use std::time::{Duration, Instant};

use kvmesh_session::link::Timer;
use smallvec::SmallVec;

/// Longest time between two looks: a standstill is known to within that.
const LOOK: Duration = Duration::from_millis(250);
/// A look that is later than this was held up. Far more than a scheduler's usual
/// delay, and little beside the second that makes a worker suspect.
const LATE: Duration = Duration::from_millis(100);

/// A wait for the worker's next frame.
#[derive(Clone, Copy, Debug)]
struct Wait {
    armed: Instant,
    over: Instant,
}

/// What a look found.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// Waits that are over, in the order in which they are to be fed.
    pub(super) fired: SmallVec<[Timer; 3]>,
    /// How long the router stood still, where a wait would have been over.
    pub(super) forgiven: Option<Duration>,
}

/// The instants at which a worker is suspect, lost, and let in again.
#[derive(Debug)]
pub(super) struct Alarms {
    suspect: Option<Wait>,
    lost: Option<Wait>,
    /// When an ejection ends: no wait on the worker, so that no standstill
    /// moves it.
    probe: Option<Instant>,
    /// When the next look is due.
    due: Instant,
}

impl Alarms {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            suspect: None,
            lost: None,
            probe: None,
            due: now + LOOK,
        }
    }

    /// Starts a wait, anew if it runs. Only the three above are kept here.
    pub(super) fn arm(&mut self, timer: Timer, now: Instant, after: Duration) {
        let wait = Wait {
            armed: now,
            over: now + after,
        };
        match timer {
            Timer::Suspect => self.suspect = Some(wait),
            Timer::Lost => self.lost = Some(wait),
            Timer::Probe => self.probe = Some(wait.over),
            Timer::Redial | Timer::Greeting | Timer::Reattach => {}
        }
    }

    /// Gives a wait up.
    pub(super) fn disarm(&mut self, timer: Timer) {
        match timer {
            Timer::Suspect => self.suspect = None,
            Timer::Lost => self.lost = None,
            Timer::Probe => self.probe = None,
            Timer::Redial | Timer::Greeting | Timer::Reattach => {}
        }
    }

    /// Nobody looked until now since nothing was to be looked at: a session
    /// begins.
    pub(super) fn begin(&mut self, now: Instant) {
        self.due = self.next(now);
    }

    /// When the next look is due.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Looks at the waits; takes out those that are over.
    pub(super) fn look(&mut self, now: Instant) -> Look {
        let late = now.saturating_duration_since(self.due);
        let mut look = Look::default();
        if late > LATE {
            look.forgiven = self.move_waits(late, now).then_some(late);
        } else {
            if self.suspect.take_if(|wait| wait.over <= now).is_some() {
                look.fired.push(Timer::Suspect);
            }
            if self.lost.take_if(|wait| wait.over <= now).is_some() {
                look.fired.push(Timer::Lost);
            }
        }
        if self.probe.take_if(|over| *over <= now).is_some() {
            look.fired.push(Timer::Probe);
        }
        // Not before what lay in the sockets can have been read.
        self.due = match late > LATE {
            true => now + LOOK,
            false => self.next(now),
        };
        look
    }

    fn next(&self, now: Instant) -> Instant {
        let waits = [self.suspect, self.lost].into_iter().flatten();
        let waits = waits.map(|wait| wait.over).chain(self.probe);
        // One that fired may have armed another that is over already.
        waits.fold(now + LOOK, Instant::min).max(now)
    }

    /// Gives the worker the time that the router stood still. A wait that was
    /// armed after the look was due began when the router ran again. Says
    /// whether one would have been over.
    fn move_waits(&mut self, late: Duration, now: Instant) -> bool {
        let mut over = false;
        for wait in [&mut self.suspect, &mut self.lost].into_iter().flatten() {
            if wait.armed <= self.due {
                over |= wait.over <= now;
                wait.over += late;
            }
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUSPECT: Duration = Duration::from_secs(1);
    const LOST: Duration = Duration::from_secs(3);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A frame came.
    fn frame(alarms: &mut Alarms, now: Instant) {
        alarms.arm(Timer::Suspect, now, SUSPECT);
        alarms.arm(Timer::Lost, now, LOST);
    }

    /// Looks whenever it is due until `until`; gives what fired, and when.
    fn run(alarms: &mut Alarms, from: Instant, until: Instant) -> Vec<(Timer, Duration)> {
        let mut fired = Vec::new();
        while alarms.due() <= until {
            let now = alarms.due();
            let look = alarms.look(now);
            assert_eq!(look.forgiven, None, "each look was in time");
            fired.extend(look.fired.into_iter().map(|timer| (timer, now - from)));
        }
        fired
    }

    #[test]
    fn a_silent_worker_is_suspect_and_lost_in_time() {
        let zero = Instant::now();
        let mut alarms = Alarms::new(zero);
        frame(&mut alarms, zero);
        let fired = run(&mut alarms, zero, zero + ms(10_000));
        assert_eq!(fired, [(Timer::Suspect, SUSPECT), (Timer::Lost, LOST)]);
    }

    #[test]
    fn frames_move_the_waits() {
        let zero = Instant::now();
        let mut alarms = Alarms::new(zero);
        for at in (0..10_000).step_by(250) {
            frame(&mut alarms, zero + ms(at));
            assert_eq!(run(&mut alarms, zero, zero + ms(at + 249)), []);
        }
    }

    #[test]
    fn a_router_that_stood_still_reads_before_it_believes() {
        // Whenever the pause begins between two loads, and however long it is.
        for began in (0..=250).step_by(10) {
            for paused in [1_000, 4_000, 60_000] {
                let zero = Instant::now();
                let mut alarms = Alarms::new(zero);
                frame(&mut alarms, zero);
                let before = zero + ms(began);
                assert_eq!(run(&mut alarms, zero, before), []);
                let awake = before + ms(paused);
                let look = alarms.look(awake);
                assert!(look.fired.is_empty(), "{look:?}");
                assert!(look.forgiven.is_some(), "{began} {paused}");
                // What lay in the socket is read at once.
                frame(&mut alarms, awake + ms(1));
                assert_eq!(run(&mut alarms, awake, awake + ms(1_000)), []);
            }
        }
    }

    #[test]
    fn a_worker_that_is_silent_after_the_pause_is_lost_all_the_same() {
        let zero = Instant::now();
        let mut alarms = Alarms::new(zero);
        frame(&mut alarms, zero);
        let awake = zero + ms(4_000);
        assert!(alarms.look(awake).fired.is_empty());
        let fired = run(&mut alarms, awake, awake + ms(10_000));
        // The look was due after 250 ms: 750 of the second were left.
        let left = |of: Duration| of - LOOK;
        assert_eq!(
            fired,
            [(Timer::Suspect, left(SUSPECT)), (Timer::Lost, left(LOST))]
        );
    }

    #[test]
    fn nothing_fires_before_a_second_look_even_where_no_time_is_left() {
        let zero = Instant::now();
        let mut alarms = Alarms::new(zero);
        frame(&mut alarms, zero);
        // It was due at the very instant at which the worker would be suspect.
        assert_eq!(run(&mut alarms, zero, zero + ms(999)), []);
        assert_eq!(alarms.due(), zero + SUSPECT);
        let awake = zero + ms(5_000);
        assert!(alarms.look(awake).fired.is_empty());
        assert_eq!(alarms.due(), awake + LOOK);
        frame(&mut alarms, awake + ms(200));
        assert!(alarms.look(awake + LOOK).fired.is_empty());
    }

    #[test]
    fn a_wait_that_began_after_the_pause_is_not_moved() {
        let zero = Instant::now();
        let mut alarms = Alarms::new(zero);
        frame(&mut alarms, zero);
        let awake = zero + ms(4_000);
        // The frames were read before the look.
        frame(&mut alarms, awake);
        let look = alarms.look(awake + ms(1));
        assert_eq!((look.fired.len(), look.forgiven), (0, None));
        let fired = run(&mut alarms, awake, awake + ms(10_000));
        assert_eq!(fired, [(Timer::Suspect, SUSPECT), (Timer::Lost, LOST)]);
    }

    #[test]
    fn a_small_delay_moves_nothing_and_a_probe_is_never_moved() {
        let zero = Instant::now();
        let mut alarms = Alarms::new(zero);
        frame(&mut alarms, zero);
        assert_eq!(run(&mut alarms, zero, zero + ms(999)), []);
        let fired = alarms.look(zero + SUSPECT + LATE).fired;
        assert_eq!(fired.as_slice(), [Timer::Suspect]);
        alarms.arm(Timer::Probe, zero, ms(5_000));
        let fired = alarms.look(zero + ms(9_000)).fired;
        assert_eq!(fired.as_slice(), [Timer::Probe]);
    }
}
