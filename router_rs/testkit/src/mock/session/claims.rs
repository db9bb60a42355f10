//! A generation that another router left here: found, and given to who claims it.

use kvmesh_wire::{
    output_digest,
    v1::{Claim, Continuation, Find, Found, Place},
};

use super::{Session, Step};

impl Session {
    /// Says what is here of what it was asked for, unless it is told to wait.
    pub(super) fn answer_finds(&mut self) {
        if self.state.faults.plan().hold_finds {
            return;
        }
        for find in std::mem::take(&mut self.finds) {
            self.find(find);
        }
    }

    fn find(&mut self, find: Find) {
        let left = self.state.config.left.as_deref();
        let left = left.filter(|left| left.generation == find.generation);
        self.found.push(match left {
            None => Found {
                generation: find.generation,
                ..Found::default()
            },
            Some(left) => {
                let from = from(left);
                let had = from.output_ids.get(..find.next_index as usize);
                Found {
                    model: from.model.clone(),
                    output_digest: had.map_or(0, output_digest),
                    ..held(left)
                }
            }
        });
    }

    /// Gives what was claimed, unless it is told to wait: the generation goes on in this
    /// session, under the owner that claimed it last.
    pub(super) async fn answer_claims(&mut self) -> Step {
        if self.state.faults.plan().hold_claims {
            return Ok(());
        }
        for claim in std::mem::take(&mut self.claims) {
            self.give(claim).await?;
        }
        Ok(())
    }

    async fn give(&mut self, claim: Claim) -> Step {
        let left = self.state.config.left.clone();
        let Some(left) = left.filter(|left| left.generation == claim.generation) else {
            return Ok(());
        };
        self.flush(0, true, None).await?;
        // It runs once.
        let before = self
            .running
            .iter()
            .position(|of| of.generation == claim.generation);
        if let Some(at) = before {
            self.running.swap_remove(at);
        }
        self.found.push(Found {
            owner: claim.owner,
            output_ids: from(&left).output_ids,
            resume_state: left.resume_state.clone(),
            ..held(&left)
        });
        self.flush(0, true, None).await?;
        self.place(Place {
            owner: claim.owner,
            ..*left
        });
        Ok(())
    }
}

fn from(left: &Place) -> Continuation {
    left.continuation.clone().unwrap_or_default()
}

fn held(left: &Place) -> Found {
    Found {
        generation: left.generation.clone(),
        known: true,
        owner: left.owner,
        attempt: left.attempt,
        next_index: u32::try_from(from(left).output_ids.len()).unwrap_or(u32::MAX),
        stage: left.stage,
        ..Found::default()
    }
}
