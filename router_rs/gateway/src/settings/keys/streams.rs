//! Settings of streams that go on at another worker or router.

use super::super::key::{HOUR, Key, Kind, key};

pub(super) const STREAMS: &[Key] = &[
    key(
        "hand_overs_at_once",
        Kind::Number(1, 1_024),
        "4",
        "Streams of a worker that drains which are handed over at the same time.",
    ),
    key(
        "hand_over_tries",
        Kind::Number(0, 100),
        "6",
        "Hand-overs of one stream that may fail, each to another worker where there is one, before it stays where it is. 0: none is tried.",
    ),
    key(
        "tenant_resumes_per_s",
        Kind::Real(0.0, 1e9),
        "1000",
        "Calls of Resume a second of one tenant, on average; those of a second may come at once. Each may ask all workers. 0: any.",
    ),
    key(
        "resume_timeout",
        Kind::Time(10, HOUR),
        "1s",
        "Longest wait for workers to say whether they have a stream that is resumed, and again for one to give it.",
    ),
];
