//! Log lines of a test's thread, for tests of what is logged.
#![allow(clippy::unwrap_used)]

use std::{
    io,
    sync::{Arc, LazyLock, Mutex},
};

use serde_json::Value;
use tracing::{Dispatch, Level, level_filters::LevelFilter, subscriber::DefaultGuard};

/// Wants no line, and is there as long as the process. `tracing` asks once for a line
/// whether anybody wants it, and keeps the answer for all threads: where it knows one
/// subscriber it asks that of the thread that came by first, which is another test's
/// without any; where it knows two it asks them all.
static SECOND: LazyLock<Dispatch> = LazyLock::new(|| {
    let nothing = tracing_subscriber::fmt().with_max_level(LevelFilter::OFF);
    Dispatch::new(nothing.finish())
});

/// What was logged, a JSON object a line.
#[derive(Clone, Default)]
pub(crate) struct LogLines(Arc<Mutex<Vec<u8>>>);

impl io::Write for LogLines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LogLines {
    /// Keeps what this thread logs, up to this level, while the guard lives.
    pub(crate) fn at(level: Level) -> (Self, DefaultGuard) {
        LazyLock::force(&SECOND);
        let lines = Self::default();
        let to = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_max_level(level)
            .with_writer(move || to.clone())
            .finish();
        (lines, tracing::subscriber::set_default(subscriber))
    }

    pub(crate) fn all(&self) -> Vec<Value> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }
}

/// A line that a thread came by first that keeps none.
#[test]
fn what_another_thread_came_by_first_is_kept_here() {
    let says = || tracing::info!("said");
    let (lines, _guard) = LogLines::at(Level::INFO);
    std::thread::spawn(says).join().unwrap();
    says();
    assert_eq!(lines.all().len(), 1);
}
