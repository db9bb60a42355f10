//! Tasks that are needed for as long as the mesh runs.
//!
//! A panic in one is a bug of ours. It costs what the task was at, and is told in
//! a log line and a metric; the next turn of the task finds the rest as it was.

use std::{future::Future, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt as _;

use super::{Core, session::text_of};

/// Wait before a task that panicked is started again: one that panics at each
/// start costs little.
const AGAIN_AFTER: Duration = Duration::from_millis(50);

impl Core {
    /// Spawns a task that is started again where it panics. It has to end when
    /// the mesh stops.
    pub(super) fn spawn_kept<F>(
        self: &Arc<Self>,
        task: &'static str,
        run: impl Fn(Arc<Self>) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let core = Arc::clone(self);
        self.tasks.spawn(async move {
            loop {
                let turn = AssertUnwindSafe(run(Arc::clone(&core)));
                let Err(panic) = turn.catch_unwind().await else {
                    return;
                };
                let what = text_of(&*panic);
                tracing::error!(event = "panic", task, what, "a task of the mesh panicked");
                core.counters.task_panics.add(1);
                tokio::select! {
                    () = core.stop.cancelled() => return,
                    () = tokio::time::sleep(AGAIN_AFTER) => {}
                }
            }
        });
    }
}
