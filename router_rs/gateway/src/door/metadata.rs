//! What travels beside a call: names for finding it again, and its deadline.

use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue};

use crate::{error::RequestError, serve::grpc};

/// Longest `x-request-id` that is taken over, in bytes.
const MAX_REQUEST_ID: usize = 128;
/// Longest `baggage` that is passed on, in bytes (W3C Baggage).
const MAX_BAGGAGE: usize = 8_192;
/// Longest `tracestate` that is passed on, in bytes (W3C Trace Context).
const MAX_TRACESTATE: usize = 512;

/// What travels beside a call.
#[derive(Clone, Debug)]
pub(crate) struct CallMetadata {
    pub(crate) request_id: String,
    pub(crate) traceparent: String,
    /// Whether the client brought it.
    pub(crate) has_parent: bool,
    /// Whether spans of the call are exported.
    pub(crate) traced: bool,
    pub(crate) tracestate: String,
    pub(crate) baggage: String,
    pub(crate) arrived: Instant,
    pub(crate) deadline: Option<Instant>,
}

impl CallMetadata {
    /// Reads it; what is absent or malformed is made anew, except a deadline.
    pub(crate) fn read(headers: &HeaderMap, arrived: Instant) -> Self {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let request_id = text("x-request-id")
            .filter(|id| !id.is_empty() && id.len() <= MAX_REQUEST_ID)
            .map_or_else(|| format!("{:032x}", rand::random::<u128>()), str::to_owned);
        let given = text("traceparent").filter(|value| is_traceparent(value));
        let tracestate = text("tracestate").filter(|state| state.len() <= MAX_TRACESTATE);
        let baggage = text("baggage").filter(|baggage| baggage.len() <= MAX_BAGGAGE);
        Self {
            request_id,
            has_parent: given.is_some(),
            traced: false,
            traceparent: given.map_or_else(new_traceparent, str::to_owned),
            // State belongs to the parent that it came with.
            tracestate: given.and(tracestate).unwrap_or_default().to_owned(),
            baggage: baggage.unwrap_or_default().to_owned(),
            arrived,
            deadline: None,
        }
    }

    /// Reads the deadline of `grpc-timeout`.
    pub(crate) fn read_deadline(&mut self, headers: &HeaderMap) -> Result<(), RequestError> {
        // Beyond this a deadline is none; the sum stays an instant.
        const LONGEST: Duration = Duration::from_secs(366 * 86_400);
        let timeout = grpc::timeout(headers)?.filter(|timeout| *timeout < LONGEST);
        self.deadline = timeout.map(|timeout| self.arrived + timeout);
        Ok(())
    }

    /// What goes back to the client.
    pub(crate) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(8);
        if let Ok(value) = HeaderValue::from_str(&self.request_id) {
            headers.insert("x-request-id", value);
        }
        if let Ok(value) = HeaderValue::from_str(&self.traceparent) {
            headers.insert("traceparent", value);
        }
        headers
    }
}

fn new_traceparent() -> String {
    let (trace, span): (u128, u64) = rand::random();
    format!("00-{trace:032x}-{span:016x}-00")
}

/// W3C Trace Context: version, trace id, parent id, flags, in lower-case hex.
fn is_traceparent(value: &str) -> bool {
    let mut parts = value.split('-');
    let mut part = |length: usize| {
        let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        parts
            .next()
            .filter(|part| part.len() == length && part.bytes().all(lower_hex))
    };
    let (version, trace, parent, flags) = (part(2), part(32), part(16), part(2));
    let not_zero = |part: Option<&str>| part.is_some_and(|part| part.bytes().any(|b| b != b'0'));
    version.is_some_and(|version| version != "ff")
        && not_zero(trace)
        && not_zero(parent)
        && flags.is_some()
        && (version != Some("00") || value.len() == 55)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_taken_over_only_if_it_is_one() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert!(is_traceparent(good));
        assert!(is_traceparent(&new_traceparent()));
        for bad in [
            "",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        ] {
            assert!(!is_traceparent(bad), "{bad}");
        }
    }
}
