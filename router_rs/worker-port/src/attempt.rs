//! The identity of an attempt.

use kvmesh_wire::v1::{Cancel, HandOver, Opening, Place, StageEnd};

/// An attempt: one placement of a generation, by one owner.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId {
    /// The generation.
    pub generation: [u8; 16],
    /// Number of the router that owns it, from 1.
    pub owner: u32,
    /// Number of the placement, from 1.
    pub attempt: u32,
}

impl AttemptId {
    /// `None` where the fields name no attempt.
    pub(crate) fn parse(generation: &[u8], owner: u32, attempt: u32) -> Option<Self> {
        let generation = generation.try_into().ok()?;
        (owner > 0 && attempt > 0).then_some(Self {
            generation,
            owner,
            attempt,
        })
    }
}

/// Messages that name an attempt.
pub(crate) trait NamesAttempt {
    /// The attempt; `None` where the fields name none.
    fn attempt_id(&self) -> Option<AttemptId>;
}

macro_rules! names_attempt {
    ($($message:ty),*) => {
        $(impl NamesAttempt for $message {
            fn attempt_id(&self) -> Option<AttemptId> {
                AttemptId::parse(&self.generation, self.owner, self.attempt)
            }
        })*
    };
}

names_attempt!(Place, Cancel, HandOver, Opening, StageEnd);
