//! Which trace a request belongs to (W3C Trace Context), and whether it is exported.

/// Bits of a trace id by which a share is taken: those that W3C Trace Context
/// level 2 has random.
const SHARE_BITS: u32 = 56;
/// A parent that is exported itself.
const SAMPLED: u8 = 1;
/// The trace id's last bits are random.
const RANDOM: u8 = 2;

/// A request's place in its trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Context {
    pub(super) trace: u128,
    /// The client's span; 0 where it named none.
    pub(super) parent: u64,
    /// This router's span of the request.
    pub(super) own: u64,
    flags: u8,
}

impl Context {
    /// From a traceparent that is well-formed. One that was made at the door names the
    /// router's own span, and no parent.
    pub(super) fn of(traceparent: &str, has_parent: bool) -> Option<Self> {
        let mut parts = traceparent.split('-').skip(1);
        let trace = u128::from_str_radix(parts.next()?, 16).ok()?;
        let named = u64::from_str_radix(parts.next()?, 16).ok()?;
        let flags = u8::from_str_radix(parts.next()?, 16).ok()?;
        let (parent, own) = match has_parent {
            true => (named, span_id()),
            false => (0, named),
        };
        Some(Self {
            trace,
            parent,
            own,
            flags,
        })
    }

    /// Whether its spans are exported: where the parent's are, and of the others those
    /// whose id is below the bound of [`below`].
    pub(super) fn exported(&self, below: u64) -> bool {
        #[allow(clippy::cast_possible_truncation)]
        let low = self.trace as u64 & ((1 << SHARE_BITS) - 1);
        (self.parent != 0 && self.flags & SAMPLED != 0) || low < below
    }

    /// The place of a span below this router's.
    pub(super) fn below(&self) -> Self {
        Self {
            parent: self.own,
            own: span_id(),
            ..*self
        }
    }

    /// What is passed on: this router's span as the parent, exported.
    pub(super) fn traceparent(&self) -> String {
        self.text((self.flags & RANDOM) | SAMPLED)
    }

    fn text(&self, flags: u8) -> String {
        format!("00-{:032x}-{:016x}-{flags:02x}", self.trace, self.own)
    }
}

/// The traces of which spans are exported.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Share(u64);

impl Share {
    pub(super) fn of(share: f64) -> Self {
        Self(below(share))
    }

    pub(super) fn takes(self, context: &Context) -> bool {
        context.exported(self.0)
    }
}

/// A call's part of the trace of a request that it goes on with: `of` names that request's
/// span, `own` the call's. `None`: there is no such trace.
pub(super) fn below_span(of: &str, own: &str) -> Option<Context> {
    let request = Context::of(of, true)?;
    let call = Context::of(own, false)?;
    let named = request.trace != 0 && request.parent != 0;
    named.then_some(Context {
        own: call.own,
        ..request
    })
}

/// The trace context of a call that goes on with a request, as [`below_span`], and whether
/// its spans are exported where that `share` is. `None`: there is no such trace.
pub(crate) fn goes_on_below(of: &str, own: &str, share: Option<Share>) -> Option<(String, bool)> {
    let context = below_span(of, own)?;
    let exported = share.is_some_and(|share| share.takes(&context));
    let text = match exported {
        true => context.traceparent(),
        false => context.text(context.flags),
    };
    Some((text, exported))
}

/// The bound on trace ids of which this share is below it: every router takes the same.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn below(share: f64) -> u64 {
    (share.clamp(0.0, 1.0) * (1_u64 << SHARE_BITS) as f64) as u64
}

/// A new span's id: never 0, which is none.
pub(super) fn span_id() -> u64 {
    rand::random::<u64>().max(1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

    #[test]
    fn the_clients_span_is_the_parent_and_ours_is_passed_on() {
        let context = Context::of(GIVEN, true).unwrap();
        assert_eq!(context.parent, 0x00f0_67aa_0ba9_02b7);
        let passed = context.traceparent();
        let next = Context::of(&passed, true).unwrap();
        assert_eq!((next.trace, next.parent), (context.trace, context.own));
        assert_ne!(context.own, context.parent);
        assert!(passed.ends_with("-01"), "{passed}");
        // Without a client's there is no parent, and the name that was drawn is ours.
        let drawn = Context::of(GIVEN, false).unwrap();
        assert_eq!((drawn.parent, drawn.own), (0, 0x00f0_67aa_0ba9_02b7));
    }

    #[test]
    fn a_call_that_goes_on_with_a_request_has_its_trace_and_a_span_of_its_own() {
        let drawn = "00-0000000000000000000000000000000a-000000000000000b-00";
        let trace = &GIVEN[3..35];
        let none = (format!("00-{trace}-000000000000000b-00"), false);
        assert_eq!(goes_on_below(GIVEN, drawn, None), Some(none.clone()));
        let all = (format!("00-{trace}-000000000000000b-01"), true);
        let share = Some(Share::of(1.0));
        assert_eq!(goes_on_below(GIVEN, drawn, share), Some(all.clone()));
        // What is told of the request is told of what goes on with it.
        let share = Some(Share::of(0.0));
        assert_eq!(goes_on_below(GIVEN, drawn, share), Some(none));
        let sampled = format!("{}1", &GIVEN[..54]);
        assert_eq!(goes_on_below(&sampled, drawn, share), Some(all));
        let parent = below_span(&sampled, drawn).unwrap().parent;
        assert_eq!(parent, 0x00f0_67aa_0ba9_02b7);
        for nothing in ["", "00", "00-x-y-00", "00-0-1-00", "00-1-0-00"] {
            assert_eq!(goes_on_below(nothing, drawn, share), None, "{nothing}");
        }
    }

    #[test]
    fn a_sampled_parent_is_always_exported_and_of_the_others_a_share() {
        let sampled = format!("{}1", &GIVEN[..54]);
        assert!(Context::of(&sampled, true).unwrap().exported(below(0.0)));
        assert!(!Context::of(GIVEN, true).unwrap().exported(below(0.0)));
        let of = |trace: u128| Context {
            trace,
            parent: 0,
            own: 1,
            flags: 0,
        };
        // The greatest id there is.
        assert!(of(u128::MAX).exported(below(1.0)));
        assert!(!of(0).exported(below(0.0)));
        // Ids spread evenly: of the share 0.25 a quarter of them.
        let step = (1_u128 << SHARE_BITS) / 1_000;
        let taken = (0..1_000).filter(|n| of(n * step).exported(below(0.25)));
        assert_eq!(taken.count(), 251);
    }
}
