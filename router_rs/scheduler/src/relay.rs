//! What is in no model of a first token: frames, wake-ups, the client's stream.
//!
//! The models are of service: steps, and bytes that move. Between a worker and
//! a client there is more, and on small models it is a good part of the whole.
//! It is learnt by worker, from requests that did not wait: what their first
//! token took over what was modelled of it. Service time only, as all that is
//! learnt (SCHEDULING 3): a worker with a queue does not look far away.

/// First tokens that are remembered; older ones are forgotten.
const REMEMBERED: usize = 33;
/// Before so many nothing is said.
const FEWEST: usize = 5;
/// The most that is believed, ms: no network and no client is so far.
const MOST_MS: f64 = 250.0;
/// A request that waited for longer, ms and as a share of its computing, says
/// nothing: its wait was predicted, or mispredicted, by another model.
const WAITED_MS: f64 = 5.0;
const WAITED_SHARE: f64 = 0.1;

/// Without first tokens what is known halves in this time, ms: a worker that
/// looked far away, since its clients read slowly, is tried again.
const HALVES_IN_MS: f64 = 30_000.0;

/// What a first token took, as it was measured.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct FirstToken {
    /// All of it, from placement to the client's stream, ms.
    pub ttft_ms: f64,
    /// Waiting in the worker's queue, ms.
    pub wait_ms: f64,
    /// What was predicted of computing, pulling and moving, ms.
    pub modelled_ms: f64,
}

/// The median of what the last first tokens of a worker took over their models.
#[derive(Debug, Clone, Default)]
pub struct Relay {
    /// The last ones, the oldest is overwritten next.
    last: Vec<f64>,
    next: usize,
    ms: f64,
}

impl Relay {
    /// Nothing is learnt.
    pub fn new() -> Self {
        Self::default()
    }

    /// What is to be added to a prediction, ms; 0 until enough was seen.
    pub fn ms(&self) -> f64 {
        self.ms
    }

    /// The same after so many ms without anything learnt.
    pub fn ms_after_idle(&self, idle_ms: f64) -> f64 {
        self.ms * (-idle_ms.max(0.0) / HALVES_IN_MS).exp2()
    }

    /// A first token came. Returns whether it taught something: one that
    /// waited, or that is no measurement, does not.
    pub fn observe(&mut self, seen: &FirstToken) -> bool {
        let sound = [seen.ttft_ms, seen.wait_ms, seen.modelled_ms]
            .iter()
            .all(|ms| ms.is_finite() && *ms >= 0.0);
        let waited = seen.wait_ms > WAITED_MS.max(WAITED_SHARE * seen.modelled_ms);
        if !sound || waited || seen.ttft_ms == 0.0 {
            return false;
        }
        let rest = seen.ttft_ms - seen.modelled_ms;
        if self.last.len() < REMEMBERED {
            self.last.push(rest);
        } else {
            self.last[self.next] = rest;
        }
        self.next = (self.next + 1) % REMEMBERED;
        if self.last.len() >= FEWEST {
            let mut sorted = self.last.clone();
            sorted.sort_unstable_by(f64::total_cmp);
            // A half of them may be anything: stalls, clients that sleep.
            self.ms = sorted[sorted.len() / 2].clamp(0.0, MOST_MS);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(ttft_ms: f64, wait_ms: f64, modelled_ms: f64) -> FirstToken {
        FirstToken {
            ttft_ms,
            wait_ms,
            modelled_ms,
        }
    }

    fn after(all: impl IntoIterator<Item = FirstToken>) -> f64 {
        let mut relay = Relay::new();
        for one in all {
            relay.observe(&one);
        }
        relay.ms()
    }

    #[test]
    fn it_is_what_no_model_says_whatever_the_prompt() {
        let prompts = (0..50).map(|n| f64::from(20 + 7 * n));
        let ms = after(prompts.map(|modelled| seen(modelled + 14.0, 0.0, modelled)));
        assert!((ms - 14.0).abs() < 1e-9, "{ms}");
    }

    #[test]
    fn stalls_and_queues_do_not_move_it() {
        let mixed = (0..200).map(|n| match n % 5 {
            0 => seen(2_000.0, 0.0, 50.0),
            1 => seen(900.0, 840.0, 50.0),
            _ => seen(62.0, 1.0, 50.0),
        });
        let ms = after(mixed);
        assert!((ms - 12.0).abs() < 1e-9, "{ms}");
        // All of them queued: nothing is known.
        assert_eq!(after((0..50).map(|_| seen(900.0, 840.0, 50.0))), 0.0);
    }

    #[test]
    fn it_is_bounded_and_follows_a_change() {
        assert_eq!(after((0..50).map(|_| seen(9_000.0, 0.0, 10.0))), MOST_MS);
        // Models that say too much are the models' to mend.
        assert_eq!(after((0..50).map(|_| seen(10.0, 0.0, 40.0))), 0.0);
        let near = (0..100).map(|_| seen(12.0, 0.0, 10.0));
        let far = (0..REMEMBERED).map(|_| seen(50.0, 0.0, 10.0));
        assert_eq!(after(near.chain(far)), 40.0);
    }

    #[test]
    fn it_fades_where_nothing_comes_any_more() {
        let mut relay = Relay::new();
        for _ in 0..FEWEST {
            relay.observe(&seen(90.0, 0.0, 10.0));
        }
        assert_eq!(relay.ms_after_idle(0.0), 80.0);
        assert_eq!(relay.ms_after_idle(HALVES_IN_MS), 40.0);
        assert!(relay.ms_after_idle(20.0 * HALVES_IN_MS) < 1e-3);
    }

    #[test]
    fn few_and_broken_ones_say_nothing() {
        assert_eq!(after((1..FEWEST).map(|_| seen(24.0, 0.0, 10.0))), 0.0);
        let mut relay = Relay::new();
        for broken in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
            assert!(!relay.observe(&seen(broken, 0.0, 1.0)));
        }
    }
}
