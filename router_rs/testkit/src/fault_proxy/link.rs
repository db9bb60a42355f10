//! One direction of a proxied connection.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::tcp::{ReadHalf, WriteHalf},
    sync::watch,
    time::{Duration, Instant, sleep_until},
};

use super::{LinkPlan, ProxyPlan};

/// Bytes held back; above, nothing is read.
const HELD: usize = 16 << 20;
/// Bytes read at once.
const READ: usize = 64 << 10;

/// How a direction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Its sender closed it, and all was passed on.
    Finished,
    /// It is to be closed in order.
    Cut,
    /// It is to be reset.
    Reset,
}

/// Bytes on their way, and what is due to happen to them.
struct Link {
    plan: LinkPlan,
    /// Bytes written since the plan was set.
    passed: u64,
    held: VecDeque<(Instant, Bytes)>,
    held_bytes: usize,
    write_not_before: Instant,
}

/// Passes bytes on until an end comes.
pub(super) async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut plans: watch::Receiver<ProxyPlan>,
    of: impl Fn(&ProxyPlan) -> &LinkPlan,
) -> Ended {
    let mut link = Link {
        plan: of(&plans.borrow_and_update()).clone(),
        passed: 0,
        held: VecDeque::new(),
        held_bytes: 0,
        write_not_before: Instant::now(),
    };
    let mut buffer = BytesMut::with_capacity(READ);
    let mut at_end = false;
    loop {
        if let Some(ended) = link.ended() {
            return ended;
        }
        if at_end && link.held.is_empty() {
            // The other end may be gone already: then there is no one to tell.
            let _ = to.shutdown().await;
            return Ended::Finished;
        }
        let due = link.due();
        let next = link.next();
        tokio::select! {
            // A plan that was set before bytes were sent is in force for them.
            biased;
            changed = plans.changed() => {
                if changed.is_err() {
                    return Ended::Cut;
                }
                let plan = of(&plans.borrow_and_update()).clone();
                if plan != link.plan {
                    link.plan = plan;
                    link.passed = 0;
                }
            }
            () = sleep_until(due), if next.is_some() && due > Instant::now() => {}
            written = write(&mut to, next.as_ref()), if next.is_some() && due <= Instant::now() => {
                match written {
                    Ok(count) => link.wrote(count),
                    Err(_) => return Ended::Reset,
                }
            }
            read = from.read_buf(&mut buffer), if link.reads() && !at_end => match read {
                Ok(0) => at_end = true,
                Ok(_) => link.hold(buffer.split().freeze()),
                Err(_) => return Ended::Reset,
            },
        }
        if buffer.capacity() < READ {
            buffer.reserve(READ);
        }
    }
}

async fn write(to: &mut WriteHalf<'_>, bytes: Option<&Bytes>) -> std::io::Result<usize> {
    match bytes {
        Some(bytes) => to.write(bytes).await,
        None => Ok(0),
    }
}

impl Link {
    fn reads(&self) -> bool {
        !self.plan.stall && self.held_bytes < HELD
    }

    fn hold(&mut self, bytes: Bytes) {
        if self.plan.drop {
            return;
        }
        self.held_bytes += bytes.len();
        self.held
            .push_back((Instant::now() + self.plan.delay, bytes));
    }

    /// When the next bytes may be written.
    fn due(&self) -> Instant {
        let due = self
            .held
            .front()
            .map_or(self.write_not_before, |(due, _)| *due);
        due.max(self.write_not_before)
    }

    /// The next bytes to write, up to where something is to happen.
    fn next(&self) -> Option<Bytes> {
        if self.plan.stall {
            return None;
        }
        let (_, bytes) = self.held.front()?;
        let mut length = bytes.len() as u64;
        let borders = [self.plan.cut_after, self.plan.reset_after];
        for border in borders.into_iter().flatten() {
            length = length.min(border.saturating_sub(self.passed));
        }
        if let Some(rate) = self.plan.bytes_per_s {
            // A hundredth of a second at a time.
            length = length.min((rate / 100).max(1));
        }
        let mut next = bytes.slice(..length as usize);
        if let Some(at) = self.plan.flip_at
            && let Some(inside) = at.checked_sub(self.passed)
            && inside < length
        {
            let mut flipped = BytesMut::from(next.as_ref());
            flipped[inside as usize] ^= 1;
            next = flipped.freeze();
        }
        Some(next)
    }

    fn wrote(&mut self, count: usize) {
        self.passed += count as u64;
        self.held_bytes -= count;
        if let Some((_, bytes)) = self.held.front_mut() {
            bytes.advance(count);
            if bytes.is_empty() {
                self.held.pop_front();
            }
        }
        if let Some(rate) = self.plan.bytes_per_s {
            let takes = Duration::from_secs_f64(count as f64 / rate.max(1) as f64);
            self.write_not_before = Instant::now() + takes;
        }
    }

    fn ended(&self) -> Option<Ended> {
        let reached = |border: Option<u64>| border.is_some_and(|border| self.passed >= border);
        if reached(self.plan.reset_after) {
            Some(Ended::Reset)
        } else if reached(self.plan.cut_after) {
            Some(Ended::Cut)
        } else {
            None
        }
    }
}
