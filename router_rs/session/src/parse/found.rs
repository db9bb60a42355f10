//! What a worker says of a generation that is looked for, or claimed.

use kvmesh_wire::v1;

use crate::{Fence, GenerationId, Stage, Violation};

/// Answer to Find or Claim.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Found {
    /// The generation.
    pub generation: GenerationId,
    /// What is there.
    pub what: Holds,
}

/// What a worker has of a generation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Holds {
    /// Nothing, or nothing that this tenant may have.
    Nothing,
    /// This. Answer to Find.
    This(Held, Told),
    /// This, which is now the claiming session's. Answer to Claim.
    Claimed(Held, Box<Left>),
    /// Nothing was claimed: this owner number, or a higher one, is in force.
    Refused {
        /// The owner number in force.
        owner: u32,
    },
}

/// An attempt that a worker has, running or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Held {
    /// Owner number in force and attempt.
    pub fence: Fence,
    /// Next output index to be made.
    pub next_index: u32,
    /// The stage.
    pub stage: Stage,
}

/// What is said of an attempt before it is claimed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Told {
    /// The model, by name. Empty: the worker does not tell.
    pub model: String,
    /// [`kvmesh_wire::output_digest`] of the output ids that the client has.
    pub output_digest: u64,
}

/// What another router goes on from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Left {
    /// All output ids so far: as many as the next index says.
    pub output_ids: Vec<u32>,
    /// The owner's [`v1::ResumeState`], as it left it.
    pub resume_state: bytes::Bytes,
}

/// # Errors
/// [`Violation::Malformed`].
pub(super) fn found(found: v1::Found) -> Result<Found, Violation> {
    let generation = GenerationId::from_wire(&found.generation)
        .ok_or(Violation::Malformed("a generation that is not 16 bytes"))?;
    if found.refused {
        let what = Holds::Refused { owner: found.owner };
        return Ok(Found { generation, what });
    }
    if !found.known {
        let what = Holds::Nothing;
        return Ok(Found { generation, what });
    }
    let stage = Stage::from_wire(found.stage).ok_or(Violation::Malformed("no such stage"))?;
    if found.owner == 0 || found.attempt == 0 {
        return Err(Violation::Malformed("a found generation without attempt"));
    }
    let held = Held {
        fence: Fence {
            owner: found.owner,
            attempt: found.attempt,
        },
        next_index: found.next_index,
        stage,
    };
    let what = if found.resume_state.is_empty() {
        let told = Told {
            model: found.model,
            output_digest: found.output_digest,
        };
        Holds::This(held, told)
    } else if found.output_ids.len() == found.next_index as usize {
        Holds::Claimed(
            held,
            Box::new(Left {
                output_ids: found.output_ids,
                resume_state: found.resume_state,
            }),
        )
    } else {
        return Err(Violation::Malformed("a claimed output with a hole"));
    };
    Ok(Found { generation, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> v1::Found {
        v1::Found {
            generation: vec![7; 16].into(),
            known: true,
            owner: 1,
            attempt: 2,
            next_index: 2,
            stage: v1::Stage::Decode.into(),
            ..v1::Found::default()
        }
    }

    #[test]
    fn what_is_found_is_told_from_what_is_claimed_and_from_what_is_refused() {
        let held = Held {
            fence: Fence {
                owner: 1,
                attempt: 2,
            },
            next_index: 2,
            stage: Stage::Decode,
        };
        let what = |wire| found(wire).map(|found| found.what);
        assert_eq!(what(known()), Ok(Holds::This(held, Told::default())));
        let told = v1::Found {
            model: "m".to_owned(),
            output_digest: 7,
            ..known()
        };
        assert!(matches!(what(told), Ok(Holds::This(of, told))
            if of == held && (told.model.as_str(), told.output_digest) == ("m", 7)));
        let claimed = v1::Found {
            output_ids: vec![5, 6],
            resume_state: b"state".as_slice().into(),
            ..known()
        };
        assert!(matches!(what(claimed), Ok(Holds::Claimed(of, left))
            if of == held && left.output_ids == [5, 6]));
        let refused = v1::Found {
            refused: true,
            owner: 3,
            ..known()
        };
        assert_eq!(what(refused), Ok(Holds::Refused { owner: 3 }));
        let unknown = v1::Found {
            generation: vec![7; 16].into(),
            ..v1::Found::default()
        };
        assert_eq!(what(unknown), Ok(Holds::Nothing));
    }

    #[test]
    fn what_cannot_be_gone_on_from_is_malformed() {
        let hole = v1::Found {
            output_ids: vec![5],
            resume_state: b"state".as_slice().into(),
            ..known()
        };
        let nameless = v1::Found {
            generation: vec![7; 3].into(),
            ..known()
        };
        let never_placed = v1::Found {
            attempt: 0,
            ..known()
        };
        let stageless = v1::Found {
            stage: 0,
            ..known()
        };
        for bad in [hole, nameless, never_placed, stageless] {
            assert!(matches!(found(bad), Err(Violation::Malformed(_))));
        }
    }
}
