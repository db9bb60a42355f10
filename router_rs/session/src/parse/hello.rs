//! A worker's first frame.

use kvmesh_wire::v1::{self, worker_frame::Frame};

use crate::Violation;

/// Takes the first frame of a session.
///
/// # Errors
/// [`Violation::Malformed`] where it is not a hello, or lacks what a hello
/// must have.
pub fn hello(frame: v1::WorkerFrame) -> Result<Hello, Violation> {
    let Some(Frame::Hello(hello)) = frame.frame else {
        return Err(Violation::Malformed("the first frame is not a hello"));
    };
    let version = hello
        .version
        .ok_or(Violation::Malformed("hello without a version"))?;
    let record = hello
        .record
        .ok_or(Violation::Malformed("hello without a record"))?;
    if !valid_name(&record.worker_id) {
        return Err(Violation::Malformed("hello without a valid worker id"));
    }
    let model = record
        .model
        .as_ref()
        .ok_or(Violation::Malformed("hello without a model"))?;
    if model.name.is_empty() || model.context_length == 0 {
        return Err(Violation::Malformed("hello with an empty model"));
    }
    let Some(capabilities) = record.capabilities.as_ref() else {
        return Err(Violation::Malformed("hello without capabilities"));
    };
    if capabilities.block_tokens == 0 || !capabilities.block_tokens.is_multiple_of(16) {
        return Err(Violation::Malformed(
            "hello with a block size that is no multiple of 16",
        ));
    }
    Ok(Hello {
        version: (version.major, version.minor),
        hash_scheme: capabilities.hash_scheme,
        last_event: hello.last_event,
        resume_event: hello.resume_event,
        step_model: hello.step_model,
        record,
    })
}

/// A worker's hello with everything a session needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// Protocol version: (major, minor).
    pub version: (u32, u32),
    /// Who this is; model and capabilities are set and valid.
    pub record: v1::WorkerRecord,
    /// Hash scheme of its cache lane.
    pub hash_scheme: u32,
    /// Last cache event so far.
    pub last_event: u64,
    /// First cache event that follows, where no snapshot comes.
    pub resume_event: u64,
    /// Step-time model fitted at start.
    pub step_model: Option<v1::StepModel>,
}

/// Whether a text can be a worker's or a router's id: 1 to 128 characters of
/// `[A-Za-z0-9._-]`.
#[must_use]
pub fn valid_name(name: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    (1..=128).contains(&name.len()) && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_plain() {
        for (name, valid) in [("w-1.a_B", true), ("", false), ("a b", false), ("ä", false)] {
            assert_eq!(valid_name(name), valid, "{name}");
        }
        assert!(!valid_name(&"x".repeat(129)));
    }
}
