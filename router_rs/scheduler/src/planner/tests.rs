#![allow(clippy::unwrap_used)]

use super::*;
use crate::step_model::StepModel;
use proptest::prelude::*;

const LOOK_MS: f64 = 1_000.0;
const PROMPT_MS: f64 = 200.0;
const CONTEXT: f64 = 1_500.0;

/// Workers as a fluid: prompts wait where more come than are computed, and
/// streams are as many as make the tokens that are asked for.
struct Plant {
    roles: Vec<Role>,
    /// Workers whose role is not to be changed: another's, draining.
    steady: Vec<bool>,
    step: StepModel,
    waiting_ms: f64,
    demand: Demand,
    now_ms: f64,
}

impl Plant {
    fn new(prefill: usize, decode: usize) -> Self {
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
            demand: Demand::default(),
            now_ms: 0.0,
        }
    }

    fn count(&self, role: Role) -> usize {
        self.roles.iter().filter(|other| **other == role).count()
    }

    /// A second passes: prompts keep `load` workers busy, `rate` tokens a ms
    /// are asked for.
    fn second(&mut self, load: f64, rate: f64) -> Pools {
        self.now_ms += LOOK_MS;
        self.demand.requests[0] += load * LOOK_MS / PROMPT_MS;
        self.demand.prompt_ms[0] += load * LOOK_MS;
        self.demand.output_tokens[0] += rate * LOOK_MS;
        let (prefill, decode) = (
            self.count(Role::Prefill) as f64,
            self.count(Role::Decode) as f64,
        );
        self.waiting_ms = (self.waiting_ms + (load - prefill) * LOOK_MS).clamp(0.0, 60_000.0);
        let each = rate / decode;
        let rest = 1.0 - each * (self.step.d_ms + self.step.e_ms * CONTEXT);
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
            match role {
                Role::Prefill => worker.waiting_ms[0] = self.waiting_ms / prefill,
                _ => {
                    worker.streams[0] = batch;
                    worker.context = batch * CONTEXT;
                    worker.room_used = batch / 512.0;
                }
            }
            worker
        };
        Pools {
            model: "m".into(),
            workers: self.roles.iter().enumerate().map(worker).collect(),
            demand: self.demand,
        }
    }

    fn apply(&mut self, flip: &Flip) {
        let role = &mut self.roles[flip.worker.0 as usize];
        assert_eq!(*role, flip.from);
        *role = flip.to;
    }
}

/// Seconds of one load; the flips, each done at once.
fn run(
    plant: &mut Plant,
    planner: &mut Planner,
    seconds: usize,
    load: f64,
    rate: f64,
) -> Vec<Role> {
    let mut flips = Vec::new();
    for second in 0..seconds {
        // What comes swings a tenth about its mean.
        let swing = 1.0 + 0.1 * (second as f64 * 1.7).sin();
        let pools = plant.second(load * swing, rate * swing);
        let advice = planner.look(&[pools], plant.now_ms).pop().unwrap();
        if let Ok(flip) = advice.flip {
            plant.apply(&flip);
            flips.push(flip.to);
        }
    }
    flips
}

fn planner() -> Planner {
    Planner::new(PlannerSettings::default())
}

#[test]
fn a_pool_that_is_short_gets_workers_until_it_is_not() {
    let (mut plant, mut planner) = (Plant::new(1, 7), planner());
    let flips = run(&mut plant, &mut planner, 1_200, 3.2, 1.0);
    // Three keep up; more may be needed for what had piled up by then.
    assert!(flips.len() >= 3 && flips.iter().all(|to| *to == Role::Prefill));
    let pools = plant.second(3.2, 1.0);
    let advice = planner.look(&[pools], plant.now_ms).pop().unwrap();
    assert_eq!(advice.flip, Err(Hold::Enough));
    assert!(advice.now.worst() < 1.0, "{advice:?}");
}

#[test]
fn a_load_that_shifts_is_followed_there_and_back() {
    let (mut plant, mut planner) = (Plant::new(4, 4), planner());
    assert!(run(&mut plant, &mut planner, 300, 2.0, 1.0).is_empty());
    let to_prefill = run(&mut plant, &mut planner, 600, 5.2, 1.0);
    assert!(!to_prefill.is_empty());
    assert!(to_prefill.iter().all(|to| *to == Role::Prefill));
    let to_decode = run(&mut plant, &mut planner, 900, 0.5, 8.0);
    assert!(!to_decode.is_empty());
    assert!(to_decode.iter().all(|to| *to == Role::Decode));
    let pools = plant.second(0.5, 8.0);
    let advice = planner.look(&[pools], plant.now_ms).pop().unwrap();
    assert!(plant.count(Role::Decode) > 4, "{advice:?}");
}

#[test]
fn one_flip_at_a_time_and_none_within_the_dwell() {
    let (mut plant, mut planner) = (Plant::new(1, 7), planner());
    let mut holds = Vec::new();
    let mut at = Vec::new();
    for _ in 0..400 {
        let pools = plant.second(6.0, 0.1);
        // Nobody does it: it is not said again before patience and dwell end.
        match planner.look(&[pools], plant.now_ms).pop().unwrap().flip {
            Ok(_) => at.push(plant.now_ms),
            Err(hold) => holds.push(hold),
        }
    }
    let settings = PlannerSettings::default();
    assert!(at.len() >= 4, "{at:?}");
    for pair in at.windows(2) {
        assert!(pair[1] - pair[0] >= settings.dwell_ms, "{at:?}");
    }
    for wanted in [
        Hold::Learning,
        Hold::Confirming,
        Hold::Flipping,
        Hold::Dwelling,
    ] {
        assert!(holds.contains(&wanted), "{wanted:?}");
    }
}

#[test]
fn a_worker_that_drains_neither_counts_nor_moves() {
    let (mut plant, mut planner) = (Plant::new(1, 2), planner());
    plant.steady[2] = false;
    let flips = run(&mut plant, &mut planner, 300, 3.0, 0.1);
    assert!(flips.is_empty());
    let pools = plant.second(3.0, 0.1);
    let advice = planner.look(&[pools], plant.now_ms).pop().unwrap();
    assert_eq!(advice.flip, Err(Hold::NobodyToSpare));
    assert_eq!((advice.now.prefill, advice.now.decode), (1, 1));
}

#[test]
fn the_worker_with_least_to_lose_goes() {
    let (mut plant, mut planner) = (Plant::new(1, 3), planner());
    for _ in 0..300 {
        let mut pools = plant.second(3.0, 0.5);
        pools.workers[2].streams[0] = 0.0;
        if let Ok(flip) = planner.look(&[pools], plant.now_ms).pop().unwrap().flip {
            assert_eq!((flip.worker, flip.from), (WorkerSlot(2), Role::Decode));
            return;
        }
    }
    panic!("no flip");
}

#[test]
fn models_are_looked_at_apart_and_one_that_goes_is_forgotten() {
    let (mut short, mut calm, mut planner) = (Plant::new(1, 3), Plant::new(2, 2), planner());
    let mut flips = 0;
    for _ in 0..120 {
        let pools = short.second(3.0, 0.1);
        let mut other = calm.second(0.5, 0.1);
        other.model = "other".into();
        let advice = planner.look(&[pools, other], short.now_ms);
        assert!(advice[1].flip.is_err(), "{advice:?}");
        flips += usize::from(advice[0].flip.is_ok());
    }
    assert!(flips > 0);
    planner.look(&[], short.now_ms);
    let pools = short.second(3.0, 0.1);
    let advice = planner.look(&[pools], short.now_ms).pop().unwrap();
    assert_eq!(advice.flip, Err(Hold::Learning));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Under one load, whatever it is, flips go one way, and end.
    #[test]
    fn a_constant_load_never_swings(
        prefill in 1usize..12,
        decode in 1usize..12,
        load in 0.0f64..14.0,
        rate in 0.0f64..20.0,
    ) {
        let (mut plant, mut planner) = (Plant::new(prefill, decode), planner());
        let flips = run(&mut plant, &mut planner, 1_800, load, rate);
        prop_assert!(flips.windows(2).all(|pair| pair[0] == pair[1]), "{:?}", flips);
        prop_assert!(run(&mut plant, &mut planner, 600, load, rate).len() <= 1);
    }

    /// Whatever comes, each pool keeps a worker that takes work.
    #[test]
    fn no_pool_is_ever_emptied(
        prefill in 1usize..5,
        decode in 1usize..5,
        phases in prop::collection::vec((0.0f64..10.0, 0.0f64..20.0, 0usize..10), 1..8),
    ) {
        let (mut plant, mut planner) = (Plant::new(prefill, decode), planner());
        for (load, rate, shaky) in phases {
            let workers = plant.steady.len();
            plant.steady = (0..workers).map(|at| at != shaky).collect();
            for _ in 0..150 {
                let pools = plant.second(load, rate);
                let advice = planner.look(&[pools], plant.now_ms).pop().unwrap();
                if let Ok(flip) = advice.flip {
                    prop_assert!(plant.steady[flip.worker.0 as usize]);
                    plant.apply(&flip);
                    let left = plant.roles.iter().zip(&plant.steady);
                    let left = left.filter(|(role, steady)| **role == flip.from && **steady);
                    prop_assert!(left.count() >= 1);
                }
            }
        }
    }
}
