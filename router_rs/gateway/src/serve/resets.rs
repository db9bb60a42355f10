//! Whether a client reset its streams or its connection ended under them.
//!
//! hyper tells a body neither: it is dropped. So the frames that come in are looked at, by
//! their headers alone (RFC 9113, 4.1). A stream that ends early was reset where a
//! RST_STREAM came since all streams were last seen to; else its connection is gone. In
//! doubt it counts as reset: then nothing goes on for nobody.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Length of what a client says first (RFC 9113, 3.4).
const PREFACE: usize = 24;
/// Length of a frame's header.
const HEADER: usize = 9;
/// Type of a frame that resets a stream.
const RST_STREAM: u8 = 3;

/// Whether streams of a connection were reset that have not been seen to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resets(Arc<AtomicBool>);

impl Resets {
    /// Whether a stream that ends early now was reset.
    pub(crate) fn are_pending(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// All streams were seen to.
    pub(super) fn seen_to(&self) {
        // A load is what it mostly costs.
        if self.are_pending() {
            self.0.store(false, Ordering::Release);
        }
    }
}

/// Looks at what comes in over an HTTP/2 connection.
pub(super) struct Watch {
    frames: Frames,
    resets: Resets,
}

impl Watch {
    pub(super) fn new(resets: Resets) -> Self {
        Self {
            frames: Frames::default(),
            resets,
        }
    }

    /// This was read.
    pub(super) fn saw(&mut self, read: &[u8]) {
        if self.frames.take(read) {
            self.resets.0.store(true, Ordering::Release);
        }
    }
}

/// Where in its frames a connection is.
#[derive(Debug)]
struct Frames {
    /// Bytes to pass over before the next header.
    skip: usize,
    header: [u8; HEADER],
    /// Bytes of the header that are here.
    have: usize,
}

impl Default for Frames {
    fn default() -> Self {
        Self {
            skip: PREFACE,
            header: [0; HEADER],
            have: 0,
        }
    }
}

impl Frames {
    /// Takes what was read. Whether a frame among it resets a stream.
    fn take(&mut self, mut read: &[u8]) -> bool {
        let mut resets = false;
        while !read.is_empty() {
            if self.skip > 0 {
                let skip = self.skip.min(read.len());
                self.skip -= skip;
                read = &read[skip..];
                continue;
            }
            let more = (HEADER - self.have).min(read.len());
            self.header[self.have..self.have + more].copy_from_slice(&read[..more]);
            self.have += more;
            read = &read[more..];
            if self.have == HEADER {
                let [a, b, c, kind, ..] = self.header;
                self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
                self.have = 0;
                resets |= kind == RST_STREAM;
            }
        }
        resets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, 0, 0, 0, 0, 1]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn a_reset_is_seen_however_its_frames_are_cut() {
        // Payloads that look like resets.
        let looks_so = frame(RST_STREAM, &[0; 4]);
        let others = [
            vec![RST_STREAM; PREFACE],
            frame(0, &looks_so),
            frame(4, &[]),
        ]
        .concat();
        let whole = [
            others.clone(),
            frame(RST_STREAM, &[0, 0, 0, 8]),
            frame(6, &[3; 8]),
        ]
        .concat();
        for size in 1..whole.len() {
            let mut frames = Frames::default();
            let seen: Vec<bool> = whole.chunks(size).map(|part| frames.take(part)).collect();
            let header = others.len() + HEADER - 1;
            let wanted = (0..seen.len()).map(|at| at == header / size);
            assert!(seen.iter().copied().eq(wanted), "{size}");
        }
    }
}
