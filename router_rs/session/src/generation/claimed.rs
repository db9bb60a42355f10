//! A generation that another router began (PROTOCOLS 2, Resume).

use smallvec::SmallVec;

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
        let mut generation = Self {
            policy,
            fence: take.fence,
            last_attempt: take.fence.attempt,
            next_index,
            max_tokens,
            refusals: 0,
            failures: 0,
            deaths: 0,
            deaths_alone: 0,
            alone: false,
            deadline,
            excluded: SmallVec::new(),
            state: State::Planning,
            moving: None,
            unclaimed: None,
        };
        let mut actions = Actions::new();
        if deadline {
            actions.push(Action::Arm(Timer::Deadline));
        }
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
