//! Under loom (make loom): every order in which threads can meet. Else: what one
//! thread can show by reading while it writes.
#![allow(clippy::unwrap_used)]

use super::*;

/// Two halves that are changed one after the other, and what was done to them.
#[derive(Debug, Default, Clone, PartialEq)]
struct Pair {
    left: u64,
    right: u64,
    passes: Vec<(u64, Pass)>,
}

/// Sets both halves.
struct Set(u64);

impl Set {
    fn set(&self, pair: &mut Pair, pass: Pass) {
        pair.left = self.0;
        pair.right = self.0;
        pair.passes.push((self.0, pass));
    }
}

impl Kept<Pair> for Set {
    fn make(&mut self, copy: &mut Pair, pass: Pass) {
        self.set(copy, pass);
    }

    fn weight(&self) -> usize {
        1
    }
}

fn pairs(most: usize) -> LeftRight<Pair, Set> {
    LeftRight::new([Pair::default(), Pair::default()], most)
}

fn set(pairs: &LeftRight<Pair, Set>, value: u64) {
    pairs.write(|copy, pass| Set(value).set(copy, pass), || Some(Set(value)));
}

fn set_heavy(pairs: &LeftRight<Pair, Set>, value: u64) {
    pairs.write(|copy, pass| Set(value).set(copy, pass), || None);
}

/// Each change came to both copies in order, first to one and then to the other.
#[cfg(not(loom))]
fn assert_taken(pairs: &LeftRight<Pair, Set>, values: u64) {
    let [a, b] = [0, 1].map(|which| pairs.copies[which].read().unwrap().clone());
    for (at, (one, two)) in a.passes.iter().zip(&b.passes).enumerate() {
        assert_eq!((one.0, two.0), (at as u64 + 1, at as u64 + 1));
        assert_ne!(one.1, two.1, "change {}", one.0);
    }
    assert_eq!(
        (a.passes.len(), b.passes.len()),
        (values as usize, values as usize)
    );
}

#[cfg(not(loom))]
mod one_thread {
    use super::*;

    #[test]
    fn a_change_is_seen_when_it_returns() {
        let pairs = pairs(100);
        for value in 1..10 {
            set(&pairs, value);
            assert_eq!(pairs.read(|pair| (pair.left, pair.right)), (value, value));
        }
        assert_taken(&pairs, 9);
    }

    #[test]
    fn changes_wait_for_a_reader_that_stays_and_no_longer() {
        let pairs = pairs(100);
        set(&pairs, 1);
        pairs.read(|pair| {
            for value in 2..10 {
                set(&pairs, value);
            }
            assert_eq!(pair.left, 1, "a reader sees one state as long as it stays");
            // The copy that was free took one; the others need this one's.
            assert!(pairs.is_behind());
            assert_eq!(pairs.read(|pair| pair.left), 2);
        });
        assert!(!pairs.is_behind(), "who leaves last brings the rest in");
        assert_eq!(pairs.read(|pair| (pair.left, pair.right)), (9, 9));
        set(&pairs, 10);
        assert_taken(&pairs, 10);
    }

    /// It has no part in a heavy change, and who reads meanwhile sees what was
    /// there before.
    #[test]
    fn a_heavy_change_waits_for_a_reader_that_stays() {
        let pairs = pairs(100);
        std::thread::scope(|scope| {
            let writer = pairs.read(|_| {
                // The copy that is not read takes it, this one's comes later.
                set(&pairs, 1);
                let writer = scope.spawn(|| set_heavy(&pairs, 2));
                for _ in 0..1_000 {
                    assert_eq!(pairs.read(|pair| (pair.left, pair.right)), (1, 1));
                }
                writer
            });
            writer.join().unwrap();
        });
        assert!(!pairs.is_behind());
        assert_eq!(pairs.read(|pair| (pair.left, pair.right)), (2, 2));
        assert_taken(&pairs, 2);
    }

    #[test]
    fn a_reader_helps_only_so_far() {
        let pairs = pairs(usize::MAX);
        let most = HELP as u64;
        pairs.read(|_| (1..=3 * most).for_each(|value| set(&pairs, value)));
        assert!(pairs.is_behind());
        for _ in 0..4 {
            pairs.read(|_| ());
        }
        assert!(!pairs.is_behind());
        assert_eq!(pairs.read(|pair| pair.left), 3 * most);
        set(&pairs, 3 * most + 1);
        assert_taken(&pairs, 3 * most + 1);
        assert_eq!(pairs.log().kept.len(), 0);
    }
}

#[cfg(loom)]
mod every_order {
    use super::*;
    use loom::{sync::Arc, thread};

    /// A reader sees whole changes in order, and once all threads are done
    /// nothing waits but what a next look brings in.
    fn model(readers: usize, writes: u64, most: usize, heavy: Option<u64>) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || {
            let pairs = Arc::new(pairs(most));
            let threads: Vec<_> = (0..readers)
                .map(|_| {
                    let pairs = pairs.clone();
                    thread::spawn(move || {
                        let look = |pair: &Pair| {
                            assert_eq!(pair.left, pair.right);
                            pair.left
                        };
                        let first = pairs.read(look);
                        assert!(first <= pairs.read(look));
                    })
                })
                .collect();
            for value in 1..=writes {
                if heavy == Some(value) {
                    set_heavy(&pairs, value);
                } else {
                    set(&pairs, value);
                }
            }
            for thread in threads {
                thread.join().unwrap();
            }
            pairs.read(|_| ());
            assert_eq!(pairs.read(|pair| pair.left), writes);
            assert!(!pairs.is_behind());
        });
    }

    #[test]
    fn one_reader_and_three_changes() {
        model(1, 3, 100, None);
    }

    #[test]
    fn two_readers_and_two_changes() {
        model(2, 2, 100, None);
    }

    #[test]
    fn a_full_log_is_waited_for() {
        model(1, 3, 0, None);
    }

    #[test]
    fn a_heavy_change_between_two_others() {
        model(1, 3, 100, Some(2));
    }

    #[test]
    fn a_heavy_change_beside_two_readers() {
        model(2, 2, 100, Some(2));
    }
}
