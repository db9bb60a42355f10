//! What happens to a worker's streams where its session's task panics.
//!
//! Such a panic is a bug of ours, and it may come again with the next frame. It
//! costs what a broken session costs: streams are planned anew or end with
//! UNAVAILABLE, and the worker is dialled again, later each time.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use futures_util::FutureExt as _;
use kvmesh_session::{
    WorkerIndex,
    generation::{Event as GenerationEvent, Loss},
};
use tokio_util::sync::CancellationToken;

use super::{
    super::open::{Brought, Open},
    Alarms, Queue, Session, new_link, redial_after,
};

impl Session {
    /// Keeps the session up until it is stopped, whatever happens in it.
    pub(in crate::mesh) async fn supervised(mut self, stop: CancellationToken) {
        // Outside of what may panic: what it has not sent is lost, too, and has
        // to hear of it.
        let mut queue: Queue = None;
        loop {
            let run = AssertUnwindSafe(self.run(&stop, &mut queue));
            let Err(panic) = run.catch_unwind().await else {
                return;
            };
            self.after_panic(&*panic, &mut queue);
            if !self.pause(&stop).await {
                return;
            }
        }
    }

    fn after_panic(&mut self, panic: &(dyn Any + Send), queue: &mut Queue) {
        let worker = self.worker.name();
        let what = text_of(panic);
        tracing::error!(event = "panic", %worker, what, "a session's task panicked");
        self.core.counters.session_panics.add(1);
        self.panics = self.panics.saturating_add(1);
        self.redial = redial_after(self.panics);
        self.worker.detach();
        self.end_queue(queue);
        // What was half changed is not gone on with. A new link knows nothing of
        // the worker's cache, so that its next hello begins an empty view.
        self.link = new_link(&self.core, &self.worker);
        self.alarms = Alarms::new(Instant::now());
        self.reattach_at = None;
        self.named.clear();
        self.kept.clear();
        self.brought = Brought::default();
        self.lose(Loss::Broken);
        self.publish();
        self.worker
            .set_detail("its session ended in a panic of this router".to_owned());
    }

    /// Closes the queue of commands. What is in it never left: it is lost.
    pub(super) fn end_queue(&self, queue: &mut Queue) {
        let Some((handle, mut commands)) = queue.take() else {
            return;
        };
        handle.closed.cancel();
        // Closed before it is emptied: nothing more comes in.
        commands.close();
        while let Ok((_, outgoing)) = commands.try_recv() {
            if let Some(open) = outgoing.open {
                lost(&open, self.worker.index, Loss::Broken);
            }
        }
    }
}

/// A generation lost its worker. One that panics at that takes no other with it.
pub(super) fn lost(open: &Arc<Open>, worker: WorkerIndex, loss: Loss) {
    let apply = || open.apply(GenerationEvent::SessionLost { worker, loss });
    if let Err(panic) = catch_unwind(AssertUnwindSafe(apply)) {
        let (generation, what) = (open.id, text_of(&*panic));
        tracing::error!(event = "panic", %generation, what, "a generation panicked");
        open.abandon(Some(worker));
    }
}

/// What a panic said, where it said a text.
pub(crate) fn text_of(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    let text = owned.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no text")
}
