//! What a router may ask for, and what is refused at the door.

use kvmesh_wire::v1::{
    Opening, Place, Reattach, RefusalReason, Refused, RouterFrame, RouterHello, Stage,
    WorkerRecord, opening::Answer, router_frame::Frame,
};
use tonic::Status;

use crate::{attempt::AttemptId, replay::Wanted};

/// Version of the protocol that is spoken here.
pub(crate) const MAJOR: u32 = 1;
pub(crate) const MINOR: u32 = 0;

/// The first frame of a session.
pub(crate) fn hello(frame: Option<RouterFrame>) -> Result<RouterHello, Status> {
    let Some(Frame::Hello(hello)) = frame.and_then(|frame| frame.frame) else {
        return Err(Status::invalid_argument(
            "the first frame of a session is hello",
        ));
    };
    let version = hello.version.unwrap_or_default();
    if version.major != MAJOR {
        return Err(Status::failed_precondition(format!(
            "protocol {}.{} is not spoken here; allowed is {MAJOR}.x",
            version.major, version.minor
        )));
    }
    let named = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if !(1..=128).contains(&hello.router_id.len()) || !hello.router_id.bytes().all(named) {
        return Err(Status::invalid_argument(
            "router_id: allowed are 1 to 128 characters of A-Z a-z 0-9 . _ -",
        ));
    }
    Ok(hello)
}

/// What a router that comes back names of what it has here.
pub(crate) fn reattached(hello: &RouterHello) -> Result<Vec<Wanted>, Status> {
    let wanted = |named: &Reattach| {
        let id = AttemptId::parse(&named.generation, named.owner, named.attempt);
        Ok(Wanted {
            id: id.ok_or_else(unnamed)?,
            next_index: named.next_index,
        })
    };
    hello.reattach.iter().map(wanted).collect()
}

/// A command names no attempt.
pub(crate) fn unnamed() -> Status {
    Status::invalid_argument(
        "a command names no attempt: generation is 16 bytes, owner and attempt count from 1",
    )
}

/// Why a placement cannot run on this worker; `None`: the engine decides.
pub(crate) fn refusal(place: &Place, record: &WorkerRecord, draining: bool) -> Option<Refused> {
    if draining {
        return Some(Refused {
            reason: RefusalReason::Draining.into(),
            message: "the worker takes no new work".to_owned(),
            field: String::new(),
        });
    }
    let model = record.model.as_ref();
    let continuation = place.continuation.as_ref();
    let asked = continuation.map_or("", |asked| asked.model.as_str());
    let adapter = continuation.map_or("", |asked| asked.adapter.as_str());
    let staged = Stage::try_from(place.stage).is_ok_and(|stage| stage != Stage::Unspecified);
    let (field, message) = if !staged {
        ("", "stage is not set".to_owned())
    } else if continuation.is_none_or(|asked| asked.prompt_ids.is_empty()) {
        ("input", "the prompt is empty".to_owned())
    } else if model.is_none_or(|model| model.name != asked) {
        ("model", format!("model {asked} is not served here"))
    } else if !adapter.is_empty() && model.is_none_or(|model| !model.adapters.contains_key(adapter))
    {
        ("adapter", format!("adapter {adapter} is not served here"))
    } else {
        return None;
    };
    Some(Refused {
        reason: RefusalReason::Unsupported.into(),
        message,
        field: field.to_owned(),
    })
}

/// The answer to a place that is refused.
pub(crate) fn refused(place: &Place, refusal: Refused) -> Opening {
    Opening {
        generation: place.generation.clone(),
        owner: place.owner,
        attempt: place.attempt,
        stage: place.stage,
        answer: Some(Answer::Refused(refusal)),
    }
}
