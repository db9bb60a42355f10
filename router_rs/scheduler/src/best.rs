//! The best few of many, most of which are ruled out unseen.

/// The cheapest few, cheapest first. Of those that cost the same, which ones
/// are kept differs from request to request (`mix`): a crowd of idle workers is
/// not always met at its first eight.
pub(crate) struct Best {
    keep: usize,
    mix: u32,
    /// Cost of the last one kept, where all places are taken.
    worst: f64,
    pub(crate) kept: Vec<(f64, u32)>,
}

impl Best {
    pub(crate) fn new(keep: usize, mix: u32, of: usize) -> Self {
        Self {
            keep,
            mix,
            worst: f64::INFINITY,
            kept: Vec::with_capacity(keep.min(of)),
        }
    }

    /// Chooses among these. `floor` is never over `cost`, and much cheaper to
    /// count. Which ones are kept does not depend on it.
    pub(crate) fn choose(
        &mut self,
        of: &[u32],
        floor: impl Fn(u32) -> f64,
        mut cost: impl FnMut(u32) -> f64,
    ) {
        if of.len() <= self.keep {
            of.iter().for_each(|at| self.offer(cost(*at), *at));
            return;
        }
        // Those with the lowest floors set the bar for all others.
        let mut lowest = Self::new(self.keep, self.mix, of.len());
        of.iter().for_each(|at| lowest.offer(floor(*at), *at));
        let first = lowest.kept;
        first.iter().for_each(|(_, at)| self.offer(cost(*at), *at));
        for at in of {
            // One that was counted twice would be kept twice.
            let seen = || first.iter().any(|(_, other)| other == at);
            if floor(*at) > self.worst || seen() {
                continue;
            }
            self.offer(cost(*at), *at);
        }
    }

    /// Looks at one.
    #[inline]
    pub(crate) fn offer(&mut self, cost: f64, at: u32) {
        if cost <= self.worst {
            self.insert(cost, at);
        }
    }

    fn insert(&mut self, cost: f64, at: u32) {
        let mix = self.mix;
        let order = |a: &(f64, u32), b: &(f64, u32)| {
            a.0.total_cmp(&b.0)
                .then_with(|| (a.1 ^ mix).cmp(&(b.1 ^ mix)))
        };
        let one = (cost, at);
        let full = self.kept.len() == self.keep;
        if full
            && self
                .kept
                .last()
                .is_some_and(|last| order(&one, last).is_ge())
        {
            return;
        }
        if full {
            self.kept.pop();
        }
        let place = self
            .kept
            .partition_point(|other| order(other, &one).is_lt());
        self.kept.insert(place, one);
        if self.kept.len() == self.keep
            && let Some(last) = self.kept.last()
        {
            self.worst = last.0;
        }
    }
}
