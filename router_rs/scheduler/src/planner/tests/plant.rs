//! Pools to try a controller on.

use super::*;
use crate::step_model::StepModel;

/// Between two looks.
pub(super) const LOOK_MS: f64 = 1_000.0;
const PROMPT_MS: f64 = 200.0;
/// Of a stream, tokens.
pub(super) const CONTEXT: f64 = 1_500.0;

/// Workers as a fluid: prompts wait where more come than are computed, and
/// streams are as many as make the tokens that are asked for.
pub(super) struct Plant {
    pub(super) roles: Vec<Role>,
    /// Workers whose role is not to be changed: another's, draining.
    pub(super) steady: Vec<bool>,
    step: StepModel,
    pub(super) waiting_ms: f64,
    /// Of a stream.
    pub(super) context: f64,
    demand: Demand,
    pub(super) now_ms: f64,
}

impl Plant {
    pub(super) fn new(prefill: usize, decode: usize) -> Self {
        let mut roles = vec![Role::Prefill; prefill];
        roles.resize(prefill + decode, Role::Decode);
        Self {
            steady: vec![true; roles.len()],
            roles,
            step: StepModel {
                a_ms: 10.0,
                d_ms: 0.3,
                e_ms: 1e-4,
                ..StepModel::default()
            },
            waiting_ms: 0.0,
            context: CONTEXT,
            demand: Demand::default(),
            now_ms: 0.0,
        }
    }

    pub(super) fn count(&self, role: Role) -> usize {
        self.roles.iter().filter(|other| **other == role).count()
    }

    /// A second passes: prompts keep `load` workers busy, `rate` tokens a ms
    /// are asked for.
    pub(super) fn second(&mut self, load: f64, rate: f64) -> Pools {
        self.now_ms += LOOK_MS;
        self.demand.requests[0] += load * LOOK_MS / PROMPT_MS;
        self.demand.prompt_ms[0] += load * LOOK_MS;
        self.demand.output_tokens[0] += rate * LOOK_MS;
        self.demand.attended_tokens[0] += rate * LOOK_MS * self.context;
        // A worker for both does half of either.
        let half = self.count(Role::Both) as f64 / 2.0;
        let computing = self.count(Role::Prefill) as f64 + half;
        let decoding = self.count(Role::Decode) as f64 + half;
        self.waiting_ms = (self.waiting_ms + (load - computing) * LOOK_MS).clamp(0.0, 60_000.0);
        let each = rate / decoding;
        let rest = 1.0 - each * (self.step.d_ms + self.step.e_ms * self.context);
        let batch = if rest > 0.0 {
            (each * self.step.a_ms / rest).min(256.0)
        } else {
            256.0
        };
        let worker = |(at, role): (usize, &Role)| {
            let mut worker = PoolWorker {
                slot: WorkerSlot(at as u32),
                role: *role,
                steady: self.steady[at],
                step: self.step,
                waiting_ms: [0.0; 3],
                streams: [0.0; 3],
                context: 0.0,
                max_batch: 256.0,
                room_used: 0.0,
            };
            let share = if *role == Role::Both { 0.5 } else { 1.0 };
            if *role != Role::Decode {
                worker.waiting_ms[0] = share * self.waiting_ms / computing;
            }
            if *role != Role::Prefill {
                worker.streams[0] = share * batch;
                worker.context = share * batch * self.context;
                worker.room_used = share * batch * self.context / (512.0 * CONTEXT);
            }
            worker
        };
        Pools {
            model: "m".into(),
            workers: self.roles.iter().enumerate().map(worker).collect(),
            demand: self.demand,
        }
    }

    /// Workers that take work and do a stage.
    pub(super) fn able(&self, stage: Role) -> usize {
        let roles = self.roles.iter().zip(&self.steady);
        let does = |role: Role| role == stage || role == Role::Both;
        roles
            .filter(|(role, steady)| **steady && does(**role))
            .count()
    }

    pub(super) fn apply(&mut self, flip: &Flip) {
        let role = &mut self.roles[flip.worker.0 as usize];
        assert_eq!(*role, flip.from);
        *role = flip.to;
    }
}
