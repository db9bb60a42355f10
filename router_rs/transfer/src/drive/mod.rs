//! Does what the state machines of transfers say.

mod receiving;
mod sending;

use std::time::Instant;

use kvmesh_wire::v1::{Abort, transfer_frame::Frame};

use crate::{
    event::Event,
    id::{Reason, TransferId},
    node::Shared,
    state::Core,
    timer::Timer,
};

impl Shared {
    fn arm(&self, core: &mut Core, id: TransferId, timer: Timer) {
        let at = Instant::now() + self.settings.length(timer);
        if core.timers.arm(id, timer, at) {
            self.rearmed.notify_all();
        }
    }

    fn tell(&self, core: &mut Core, event: Event) {
        core.push(event);
        self.told.notify_all();
    }
}

pub(crate) fn abort_frame(id: TransferId, reason: Reason, message: String) -> Frame {
    Frame::Abort(Abort {
        transfer_id: id.0.to_vec().into(),
        reason: reason.to_wire() as i32,
        message,
    })
}
