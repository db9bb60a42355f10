//! Sums of predicted work by virtual deadline, without a walk over all that
//! wait.

use crate::queue::Key;

/// Entries of a run: it is cut in two above this.
const RUN: usize = 128;

/// Work by key. A sum takes a step a run of entries, and those of one run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ahead {
    /// Never empty ones, in order.
    runs: Vec<Run>,
}

#[derive(Debug, Clone)]
struct Run {
    /// Keys and work, ms, in order.
    entries: Vec<(Key, f64)>,
    /// Of all of them, ms: added up anew at each change, so that it does not
    /// drift.
    work_ms: f64,
}

impl Run {
    fn of(entries: Vec<(Key, f64)>) -> Self {
        let mut run = Self {
            entries,
            work_ms: 0.0,
        };
        run.count();
        run
    }

    fn count(&mut self) {
        self.work_ms = self.entries.iter().map(|(_, work)| work).sum();
    }

    fn last(&self) -> Option<Key> {
        self.entries.last().map(|(key, _)| *key)
    }
}

impl Ahead {
    /// Adds an entry; a key is there once.
    pub(crate) fn insert(&mut self, key: Key, work_ms: f64) {
        let at = self.run_of(key).min(self.runs.len().saturating_sub(1));
        let Some(run) = self.runs.get_mut(at) else {
            self.runs.push(Run::of(vec![(key, work_ms)]));
            return;
        };
        let place = run.entries.partition_point(|(other, _)| *other < key);
        run.entries.insert(place, (key, work_ms));
        if run.entries.len() > RUN {
            let rest = Run::of(run.entries.split_off(RUN / 2));
            self.runs.insert(at + 1, rest);
        }
        self.runs[at].count();
    }

    /// Takes an entry out, if it is there.
    pub(crate) fn remove(&mut self, key: Key) {
        let at = self.run_of(key);
        let Some(run) = self.runs.get_mut(at) else {
            return;
        };
        if let Ok(place) = run.entries.binary_search_by_key(&key, |(key, _)| *key) {
            run.entries.remove(place);
            run.count();
            if run.entries.is_empty() {
                self.runs.remove(at);
            }
        }
    }

    /// Work of all entries with this virtual deadline or an earlier one, ms.
    pub(crate) fn before_ms(&self, deadline_ms: f64) -> f64 {
        let mut sum = 0.0;
        for run in &self.runs {
            if run
                .last()
                .is_some_and(|last| last.deadline_ms() <= deadline_ms)
            {
                sum += run.work_ms;
                continue;
            }
            let before = run.entries.iter();
            let before = before.take_while(|(key, _)| key.deadline_ms() <= deadline_ms);
            return sum + before.map(|(_, work)| work).sum::<f64>();
        }
        sum
    }

    /// Work of all entries, ms.
    pub(crate) fn work_ms(&self) -> f64 {
        self.runs.iter().map(|run| run.work_ms).sum()
    }

    /// The first run that ends at this key or later.
    fn run_of(&self, key: Key) -> usize {
        self.runs
            .partition_point(|run| run.last().is_some_and(|last| last < key))
    }
}

#[cfg(test)]
mod tests {
    use super::Ahead;
    use crate::queue::Key;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        /// Against a map that is walked.
        #[test]
        fn sums_are_those_of_a_walk(
            changes in prop::collection::vec((0u32..400, 0u32..1_000, any::<bool>()), 1..900),
            asked in 0u32..400,
        ) {
            let (mut ahead, mut map) = (Ahead::default(), BTreeMap::new());
            for (deadline, work, goes) in changes {
                let key = Key::new(f64::from(deadline), 0);
                ahead.remove(key);
                map.remove(&deadline);
                if !goes {
                    ahead.insert(key, f64::from(work));
                    map.insert(deadline, work);
                }
            }
            let before: u32 = map.range(..=asked).map(|(_, work)| work).sum();
            prop_assert_eq!(ahead.before_ms(f64::from(asked)), f64::from(before));
            prop_assert_eq!(ahead.work_ms(), f64::from(map.values().sum::<u32>()));
        }
    }
}
