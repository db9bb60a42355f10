//! A worker's first frame.

use kvmesh_wire::v1::{self, worker_frame::Frame};

use crate::{Fence, GenerationId, HASH_SCHEME, Violation};

/// Tokens of a hash value of the cache lane.
const UNIT_TOKENS: u32 = 16;

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
    if model.name.is_empty() || model.context_length == 0 || model.vocabulary_size == 0 {
        return Err(Violation::Malformed("hello with an empty model"));
    }
    let Some(capabilities) = record.capabilities.as_ref() else {
        return Err(Violation::Malformed("hello without capabilities"));
    };
    if capabilities.block_tokens == 0 {
        return Err(Violation::Malformed("hello without a block size"));
    }
    Ok(Hello {
        version: (version.major, version.minor),
        unread: reads_cache(capabilities).err(),
        last_event: hello.last_event,
        resume_event: hello.resume_event,
        step_model: hello.step_model,
        reattached: hello
            .reattached
            .iter()
            .map(reattached)
            .collect::<Result<_, _>>()?,
        record,
    })
}

fn reattached(kept: &v1::Reattach) -> Result<(GenerationId, Fence), Violation> {
    let id = GenerationId::from_wire(&kept.generation)
        .ok_or(Violation::Malformed("a generation that is not 16 bytes"))?;
    let fence = Fence {
        owner: kept.owner,
        attempt: kept.attempt,
    };
    Ok((id, fence))
}

/// Why a worker's cache lane cannot be read: what it holds is known by what was
/// sent there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unread {
    /// Its values are of another hash scheme.
    HashScheme(u32),
    /// Its blocks do not end where values are taken: at multiples of 16 tokens.
    BlockTokens(u32),
}

/// Whether a worker's cache lane can be read.
///
/// # Errors
/// Why not.
pub fn reads_cache(capabilities: &v1::Capabilities) -> Result<(), Unread> {
    if capabilities.hash_scheme != HASH_SCHEME {
        return Err(Unread::HashScheme(capabilities.hash_scheme));
    }
    if !capabilities.block_tokens.is_multiple_of(UNIT_TOKENS) {
        return Err(Unread::BlockTokens(capabilities.block_tokens));
    }
    Ok(())
}

/// A worker's hello with everything a session needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// Protocol version: (major, minor).
    pub version: (u32, u32),
    /// Who this is; model and capabilities are set and valid.
    pub record: v1::WorkerRecord,
    /// Why its cache lane is not read.
    pub unread: Option<Unread>,
    /// Last cache event so far.
    pub last_event: u64,
    /// First cache event that follows, where no snapshot comes.
    pub resume_event: u64,
    /// Step-time model fitted at start.
    pub step_model: Option<v1::StepModel>,
    /// Attempts that it still has, of those that the router named.
    pub reattached: Vec<(GenerationId, Fence)>,
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
    fn a_cache_is_read_where_its_values_are_those_of_this_router() {
        let of = |hash_scheme, block_tokens| {
            reads_cache(&v1::Capabilities {
                hash_scheme,
                block_tokens,
                ..v1::Capabilities::default()
            })
        };
        assert_eq!(of(HASH_SCHEME, 32), Ok(()));
        assert_eq!(of(2, 32), Err(Unread::HashScheme(2)));
        assert_eq!(of(HASH_SCHEME, 24), Err(Unread::BlockTokens(24)));
    }

    #[test]
    fn a_model_has_a_name_a_context_and_a_vocabulary() {
        let whole = v1::ModelRecord {
            name: "m".to_owned(),
            context_length: 1,
            vocabulary_size: 1,
            ..v1::ModelRecord::default()
        };
        let told = |change: fn(&mut v1::ModelRecord)| {
            let mut model = whole.clone();
            change(&mut model);
            let record = v1::WorkerRecord {
                worker_id: "w".to_owned(),
                model: Some(model),
                capabilities: Some(v1::Capabilities {
                    block_tokens: 16,
                    ..v1::Capabilities::default()
                }),
                ..v1::WorkerRecord::default()
            };
            let said = v1::WorkerHello {
                version: Some(v1::ProtocolVersion { major: 1, minor: 0 }),
                record: Some(record),
                ..v1::WorkerHello::default()
            };
            let frame = Some(Frame::Hello(said));
            hello(v1::WorkerFrame { frame }).map(|_| ())
        };
        assert_eq!(told(|_| {}), Ok(()));
        let empty: [fn(&mut v1::ModelRecord); 3] = [
            |model| model.name.clear(),
            |model| model.context_length = 0,
            |model| model.vocabulary_size = 0,
        ];
        for change in empty {
            let wrong = Violation::Malformed("hello with an empty model");
            assert_eq!(told(change), Err(wrong));
        }
    }

    #[test]
    fn names_are_short_and_plain() {
        for (name, valid) in [("w-1.a_B", true), ("", false), ("a b", false), ("ä", false)] {
            assert_eq!(valid_name(name), valid, "{name}");
        }
        assert!(!valid_name(&"x".repeat(129)));
    }
}
