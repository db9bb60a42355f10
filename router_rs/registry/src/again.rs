//! Tasks that outlive their own panics.

use std::{future::Future, panic::AssertUnwindSafe, time::Duration};

use futures_util::FutureExt as _;

use crate::backoff::jittered;

/// Runs one turn of a task. A panic in it is a bug of ours: it is told in a log
/// line and followed by a pause, so that the task can go on with the next turn.
pub(crate) async fn turn(task: &'static str, pause: Duration, turn: impl Future<Output = ()>) {
    if let Err(panic) = AssertUnwindSafe(turn).catch_unwind().await {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let what = text.unwrap_or("no text");
        tracing::error!(
            event = "panic",
            task,
            what,
            "a task of the registry panicked"
        );
        tokio::time::sleep(jittered(pause)).await;
    }
}
