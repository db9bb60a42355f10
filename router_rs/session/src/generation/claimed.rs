//! A generation that another router began (PROTOCOLS 2, Resume).

use super::{Action, Actions, Cause, Generation, Policy, State, Timer, attempt::Attempt};
use crate::takeover::Take;

impl Generation {
    /// One that was claimed: where a worker goes on with it its attempt is in force, and its
    /// answer comes once more; else it asks for a plan. `deadline` says whether the client
    /// gave one.
    #[must_use]
    pub fn claimed(
        take: &Take,
        max_tokens: u32,
        deadline: bool,
        policy: Policy,
    ) -> (Self, Actions) {
        let next_index = u32::try_from(take.left.output_ids.len()).unwrap_or(u32::MAX);
        let (mut generation, mut actions) =
            Self::planning(take.fence, next_index, max_tokens, deadline, policy);
        generation.owner = take.owner;
        generation.last_attempt = take.last_attempt;
        if let Some((worker, stage)) = take.runs {
            generation.state = State::Running(Attempt::claimed(worker, stage, next_index));
            actions.push(Action::Arm(Timer::Answer {
                attempt: take.fence.attempt,
                stage,
            }));
        } else {
            generation.plan(Cause::Claimed, &mut actions);
        }
        (generation, actions)
    }
}
