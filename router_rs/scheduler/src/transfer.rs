//! What moving KV takes, learnt for each pair of workers.

use crate::worker::Abilities;
use kvmesh_kv_index::WorkerSlot;

/// Transfers after which an observation weighs half.
const HALF_LIFE: f64 = 30.0;
/// Transfers that the prior counts for.
const PRIOR_WEIGHT: f64 = 2.0;
/// Largest factor by which one transfer may differ from its prediction, as far
/// as learning goes.
const CLIP: f64 = 4.0;

/// By which kind of path KV goes: what is believed of it before it is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// One copy within a host's memory.
    SharedMemory,
    /// TCP between hosts.
    Network,
}

impl Path {
    /// The path between two workers.
    pub fn between(source: &Abilities, target: &Abilities) -> Self {
        let same = !source.host.is_empty() && source.host == target.host;
        if same {
            Self::SharedMemory
        } else {
            Self::Network
        }
    }

    /// The path between two hosts by their numbers; 0 is not known.
    pub(crate) fn between_hosts(source: u32, target: u32) -> Self {
        if source != 0 && source == target {
            Self::SharedMemory
        } else {
            Self::Network
        }
    }

    /// Its prior: a copy runs at some 2.5 GB/s on a core; a network of 10
    /// Gbit/s brings 1.1.
    pub const fn prior(self) -> TransferRate {
        match self {
            Self::SharedMemory => TransferRate {
                fixed_ms: 1.0,
                bytes_per_ms: 2.5e6,
            },
            Self::Network => TransferRate {
                fixed_ms: 2.0,
                bytes_per_ms: 1.1e6,
            },
        }
    }
}

/// A fixed part and a rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TransferRate {
    /// ms a transfer, however small.
    pub fixed_ms: f64,
    /// Bytes a millisecond.
    pub bytes_per_ms: f64,
}

impl TransferRate {
    /// Whether both of its parts are worse.
    fn is_under(self, other: Self) -> bool {
        self.fixed_ms > other.fixed_ms && self.bytes_per_ms < other.bytes_per_ms
    }

    /// The better part of both.
    fn quicker(self, other: Self) -> Self {
        Self {
            fixed_ms: self.fixed_ms.min(other.fixed_ms),
            bytes_per_ms: self.bytes_per_ms.max(other.bytes_per_ms),
        }
    }

    /// Time of a transfer of so many bytes, ms.
    pub fn ms(&self, bytes: f64) -> f64 {
        self.fixed_ms + bytes / self.bytes_per_ms
    }
}

/// The quickest of a source of which nothing is learnt, by path.
const QUICKEST: [TransferRate; 2] = [Path::SharedMemory.prior(), Path::Network.prior()];

/// What is learnt of transfers, by (source, target).
#[derive(Debug, Clone, Default)]
pub struct TransferRates {
    /// By source, then target: looked up for every pair of a choice, and small for that.
    believed: Vec<Vec<Option<Believed>>>,
    /// What that comes from.
    rows: Vec<Vec<Option<Learnt>>>,
    /// By source: the least fixed part and the highest rate that is believed of a
    /// path of each kind.
    quickest: Vec<[TransferRate; 2]>,
}

/// What is believed of a path between two.
#[derive(Debug, Clone, Copy)]
struct Believed {
    path: Path,
    rate: TransferRate,
}

/// Weighted least squares of t = fixed + bytes / rate, by sums that forget.
#[derive(Debug, Clone, Copy)]
struct Learnt {
    path: Path,
    rate: TransferRate,
    prior: TransferRate,
    /// Sums of weight, bytes, bytes squared, ms, and bytes times ms.
    sums: [f64; 5],
}

impl TransferRates {
    /// Nothing is learnt.
    pub const fn new() -> Self {
        Self {
            believed: Vec::new(),
            rows: Vec::new(),
            quickest: Vec::new(),
        }
    }

    /// What a transfer takes: learnt, or the path's prior.
    pub fn rate(&self, source: WorkerSlot, target: WorkerSlot, path: Path) -> TransferRate {
        // One that moved to another host has another path.
        self.believed(source, target)
            .filter(|believed| believed.path == path)
            .map_or_else(|| path.prior(), |believed| believed.rate)
    }

    /// What was learnt of a transfer; `None`: none was seen.
    pub fn known(&self, source: WorkerSlot, target: WorkerSlot) -> Option<TransferRate> {
        self.believed(source, target).map(|believed| believed.rate)
    }

    fn believed(&self, source: WorkerSlot, target: WorkerSlot) -> Option<Believed> {
        let of_source = self.believed.get(source.0 as usize)?;
        *of_source.get(target.0 as usize)?
    }

    /// A transfer took so long, waiting for the source to compute not
    /// included. Nothing is learnt from one without bytes or time.
    pub fn observe(
        &mut self,
        source: WorkerSlot,
        target: WorkerSlot,
        path: Path,
        bytes: u64,
        ms: f64,
    ) {
        if bytes == 0 || !ms.is_finite() || ms <= 0.0 {
            return;
        }
        let (row, column) = (source.0 as usize, target.0 as usize);
        if self.rows.len() <= row {
            self.rows.resize_with(row + 1, Vec::new);
            self.believed.resize_with(row + 1, Vec::new);
            self.quickest.resize(row + 1, QUICKEST);
        }
        if self.rows[row].len() <= column {
            self.rows[row].resize(column + 1, None);
            self.believed[row].resize(column + 1, None);
        }
        let before = self.rows[row][column];
        let mut learnt = before
            .filter(|learnt| learnt.path == path)
            .unwrap_or_else(|| Learnt::new(path));
        learnt.observe(bytes as f64, ms);
        self.rows[row][column] = Some(learnt);
        self.believed[row][column] = Some(Believed {
            path,
            rate: learnt.rate,
        });
        let quickest = self.quickest[row][path as usize].quicker(learnt.rate);
        self.quickest[row][path as usize] = quickest;
        // Was it the quickest itself, others may be so now.
        let may_fall = |before: Learnt| before.path != path || !before.rate.is_under(quickest);
        if before.is_some_and(may_fall) {
            self.look_for_quickest(row);
        }
    }

    /// What a transfer from a worker takes at least, to whomever by such a path:
    /// the least fixed part and the highest rate that are believed of any.
    pub(crate) fn quickest(&self, source: WorkerSlot, path: Path) -> TransferRate {
        let of_source = self.quickest.get(source.0 as usize);
        of_source.unwrap_or(&QUICKEST)[path as usize]
    }

    fn look_for_quickest(&mut self, row: usize) {
        let mut quickest = QUICKEST;
        for learnt in self.rows[row].iter().flatten() {
            let of_path = &mut quickest[learnt.path as usize];
            *of_path = of_path.quicker(learnt.rate);
        }
        self.quickest[row] = quickest;
    }

    /// A worker left: its slot may go to another.
    pub fn forget(&mut self, worker: WorkerSlot) {
        let at = worker.0 as usize;
        if let Some(row) = self.rows.get_mut(at) {
            row.clear();
            self.believed[at].clear();
            self.look_for_quickest(at);
        }
        for row in 0..self.rows.len() {
            if self.rows[row].get_mut(at).and_then(Option::take).is_some() {
                self.believed[row][at] = None;
                self.look_for_quickest(row);
            }
        }
    }
}

impl Learnt {
    /// The prior counts as two transfers: a small one and one of 64 MiB.
    fn new(path: Path) -> Self {
        let prior = path.prior();
        let mut sums = [0.0; 5];
        for bytes in [0.0, f64::from(1 << 26)] {
            add(
                &mut sums,
                &prior,
                PRIOR_WEIGHT / 2.0,
                bytes,
                prior.ms(bytes),
            );
        }
        Self {
            path,
            rate: prior,
            prior,
            sums,
        }
    }

    fn observe(&mut self, bytes: f64, ms: f64) {
        let predicted = self.rate.ms(bytes);
        let ms = ms.clamp(predicted / CLIP, predicted * CLIP);
        let keep = 0.5f64.powf(1.0 / HALF_LIFE);
        self.sums.iter_mut().for_each(|sum| *sum *= keep);
        add(&mut self.sums, &self.prior, 1.0, bytes, ms);
        let [weight, x, xx, y, xy] = self.sums;
        let spread = weight * xx - x * x;
        let slope = if spread > 1e-9 * weight * xx {
            (weight * xy - x * y) / spread
        } else {
            0.0
        };
        // Neither part is negative: where one would be, the other explains all.
        let mean = y / weight;
        let fixed = mean - slope * x / weight;
        self.rate = if slope <= 0.0 {
            // All sizes took as long: a rate that does not matter.
            TransferRate {
                fixed_ms: mean,
                bytes_per_ms: 1e12,
            }
        } else if fixed < 0.0 {
            TransferRate {
                fixed_ms: 0.0,
                bytes_per_ms: (xx / xy).max(1.0),
            }
        } else {
            TransferRate {
                fixed_ms: fixed,
                bytes_per_ms: (1.0 / slope).max(1.0),
            }
        };
    }
}

/// Adds a point; errors are relative, so it weighs by the inverse square of
/// what its size takes by the prior: of one size all weigh the same, however
/// long they took.
fn add(sums: &mut [f64; 5], prior: &TransferRate, weight: f64, bytes: f64, ms: f64) {
    let scale = prior.ms(bytes);
    let weight = weight / (scale * scale);
    let parts = [1.0, bytes, bytes * bytes, ms, bytes * ms];
    for (sum, part) in sums.iter_mut().zip(parts) {
        *sum += weight * part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: WorkerSlot = WorkerSlot(1);
    const B: WorkerSlot = WorkerSlot(4);

    #[test]
    fn a_pair_that_was_never_seen_has_its_paths_prior() {
        let rates = TransferRates::new();
        for path in [Path::SharedMemory, Path::Network] {
            assert_eq!(rates.rate(A, B, path), path.prior());
        }
        assert_eq!(rates.known(A, B), None);
    }

    #[test]
    fn rate_and_fixed_part_are_learnt_apart_and_followed() {
        let mut rates = TransferRates::new();
        for (fixed_ms, bytes_per_ms) in [(5.0, 4e5), (0.5, 8e6)] {
            let truth = TransferRate {
                fixed_ms,
                bytes_per_ms,
            };
            for n in 0..300u64 {
                let bytes = 1 << (16 + n % 10);
                rates.observe(A, B, Path::Network, bytes, truth.ms(bytes as f64));
            }
            let got = rates.rate(A, B, Path::Network);
            for bytes in [1e5, 1e6, 3e7] {
                let error = got.ms(bytes) / truth.ms(bytes) - 1.0;
                assert!(error.abs() < 0.05, "{bytes}: {got:?} for {truth:?}");
            }
        }
        // The way back and other pairs know nothing of it.
        assert_eq!(rates.rate(B, A, Path::Network), Path::Network.prior());
        rates.forget(A);
        assert_eq!(rates.rate(A, B, Path::Network), Path::Network.prior());
    }

    #[test]
    fn the_quickest_is_as_quick_as_any_of_its_kind_and_follows_when_they_slow_down() {
        let mut rates = TransferRates::new();
        let targets = [WorkerSlot(2), WorkerSlot(3), B];
        let path = Path::Network;
        assert_eq!(rates.quickest(A, path), path.prior());
        for n in 0..400u64 {
            let target = targets[n as usize % targets.len()];
            // Quick ones at first, then all of them slow.
            let ms = if n < 200 { 0.1 } else { 900.0 } * (1 + n % 5) as f64;
            rates.observe(A, target, path, 1 << (16 + n % 10), ms);
            let quickest = rates.quickest(A, path);
            let known = targets.iter().filter_map(|target| rates.known(A, *target));
            let known: Vec<_> = known.chain([path.prior()]).collect();
            let fixed = known.iter().map(|rate| rate.fixed_ms);
            let speed = known.iter().map(|rate| rate.bytes_per_ms);
            assert_eq!(quickest.fixed_ms, fixed.fold(f64::INFINITY, f64::min));
            assert_eq!(quickest.bytes_per_ms, speed.fold(0.0, f64::max));
        }
        assert_eq!(
            rates.quickest(A, Path::SharedMemory),
            Path::SharedMemory.prior()
        );
        rates.forget(A);
        assert_eq!(rates.quickest(A, path), path.prior());
    }

    #[test]
    fn the_quickest_that_left_is_not_counted_any_more() {
        let mut rates = TransferRates::new();
        let path = Path::Network;
        for n in 0..50 {
            rates.observe(A, B, path, 1 << (16 + n % 10), 0.01);
        }
        assert!(rates.quickest(A, path).bytes_per_ms > path.prior().bytes_per_ms);
        rates.forget(B);
        assert_eq!(rates.quickest(A, path), path.prior());
    }

    #[test]
    fn what_was_learnt_of_one_path_says_nothing_of_another() {
        let mut rates = TransferRates::new();
        let (near, far) = (Path::SharedMemory, Path::Network);
        for n in 0..50 {
            rates.observe(A, B, near, 1 << (16 + n % 10), 0.01);
        }
        assert!(rates.rate(A, B, near).bytes_per_ms > near.prior().bytes_per_ms);
        // It moved to another host.
        assert_eq!(rates.rate(A, B, far), far.prior());
        rates.observe(A, B, far, 1 << 20, 40.0);
        assert_ne!(rates.rate(A, B, far), far.prior());
        assert_eq!(rates.rate(A, B, near), near.prior());
        assert_eq!(rates.quickest(A, near), near.prior());
    }

    #[test]
    fn what_is_no_measurement_teaches_nothing() {
        let mut rates = TransferRates::new();
        rates.observe(A, B, Path::Network, 0, 5.0);
        rates.observe(A, B, Path::Network, 5, 0.0);
        rates.observe(A, B, Path::Network, 5, f64::NAN);
        assert_eq!(rates.rate(A, B, Path::Network), Path::Network.prior());
    }

    #[test]
    fn sizes_that_are_all_alike_give_sound_figures() {
        let mut rates = TransferRates::new();
        for _ in 0..500 {
            rates.observe(A, B, Path::SharedMemory, 1 << 20, 3.0);
        }
        let got = rates.rate(A, B, Path::SharedMemory);
        assert!((got.ms(f64::from(1 << 20)) - 3.0).abs() < 0.1, "{got:?}");
        assert!(got.fixed_ms >= 0.0 && got.bytes_per_ms > 0.0);
    }
}
