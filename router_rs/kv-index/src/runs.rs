//! The list of runs, by number, in pages that come and go with what is in them.
//!
//! A growing vector would keep room for as many runs again, and the room that the most runs
//! ever took: what a bound on memory cannot count by what is held.

use crate::run::Run;
use crate::table::MOST_RUNS;
use std::ops::{Index, IndexMut};

/// Runs of a page: 4 KiB.
const PAGE: usize = 64;
/// Bytes of a page, its allocation included.
const PAGE_BYTES: usize = PAGE * size_of::<Run>() + 64;

/// Runs by number; 0 is nobody's.
#[derive(Debug)]
pub(crate) struct Runs {
    pages: Vec<Page>,
    /// Numbers that were ever in use, 0 included.
    len: usize,
    /// Those of them that are not now.
    free: Vec<u32>,
    /// Pages that have memory.
    held: usize,
}

#[derive(Debug, Default)]
struct Page {
    /// All of them, or none.
    runs: Box<[Run]>,
    /// How many are in use.
    used: u8,
}

impl Runs {
    pub(crate) fn new() -> Self {
        let mut runs = Self {
            pages: Vec::new(),
            len: 0,
            free: Vec::new(),
            held: 0,
        };
        // Nobody's.
        runs.take();
        runs
    }

    /// A number that is not in use, with an empty run; `None` where all are.
    pub(crate) fn take(&mut self) -> Option<usize> {
        let number = match self.free.pop() {
            Some(number) => number as usize,
            None if self.len == MOST_RUNS => return None,
            None => {
                self.len += 1;
                self.len - 1
            }
        };
        if self.pages.len() == number / PAGE {
            self.pages.push(Page::default());
        }
        let page = &mut self.pages[number / PAGE];
        if page.used == 0 {
            page.runs = (0..PAGE).map(|_| Run::default()).collect();
            self.held += 1;
        }
        page.used += 1;
        Some(number)
    }

    /// A number that was taken is not in use any more, and its run is gone.
    pub(crate) fn release(&mut self, number: usize) {
        let page = &mut self.pages[number / PAGE];
        page.used -= 1;
        if page.used == 0 {
            page.runs = Box::default();
            self.held -= 1;
        } else {
            page.runs[number % PAGE] = Run::default();
        }
        self.free.push(number as u32);
    }

    /// The run of a number that is in use; for another one an empty run, or none.
    pub(crate) fn get(&self, number: usize) -> Option<&Run> {
        self.pages.get(number / PAGE)?.runs.get(number % PAGE)
    }

    /// Above all numbers in use.
    pub(crate) fn end(&self) -> usize {
        self.len
    }

    /// Bytes of the list itself, not of what its runs have on the heap.
    pub(crate) fn bytes(&self) -> usize {
        self.held * PAGE_BYTES
            + self.pages.capacity() * size_of::<Page>()
            + self.free.capacity() * size_of::<u32>()
    }

    #[cfg(test)]
    pub(crate) fn is_free(&self, number: usize) -> bool {
        self.free.contains(&(number as u32))
    }
}

impl Index<usize> for Runs {
    type Output = Run;

    fn index(&self, number: usize) -> &Run {
        &self.pages[number / PAGE].runs[number % PAGE]
    }
}

impl IndexMut<usize> for Runs {
    fn index_mut(&mut self, number: usize) -> &mut Run {
        &mut self.pages[number / PAGE].runs[number % PAGE]
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn pages_go_with_their_last_run_and_numbers_come_back() {
        let mut runs = Runs::new();
        let empty = runs.bytes();
        let numbers: Vec<usize> = (0..10 * PAGE).map(|_| runs.take().unwrap()).collect();
        assert_eq!(numbers, (1..=10 * PAGE).collect::<Vec<_>>());
        let full = runs.bytes();
        assert!(full >= empty + 10 * PAGE * size_of::<Run>());
        for number in &numbers {
            runs[*number].put(&[7]);
            assert_eq!(runs[*number].len(), 1);
        }
        for number in numbers.iter().rev() {
            runs.release(*number);
        }
        // What is left of ten pages: a word a number.
        assert!(
            runs.bytes() < empty + full / 8,
            "{} of {full}",
            runs.bytes()
        );
        assert!(runs.get(5 * PAGE).is_none());
        assert_eq!(runs.end(), 10 * PAGE + 1);
        for number in numbers {
            assert_eq!(runs.take(), Some(number));
            assert_eq!(runs[number].len(), 0);
        }
    }
}
