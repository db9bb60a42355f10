#![allow(clippy::unwrap_used)]

mod plant;

use super::*;
use plant::{CONTEXT, LOOK_MS, Plant};
use proptest::prelude::*;

/// Seconds of one load; the flips, each done at once.
fn run(
    plant: &mut Plant,
    planner: &mut Planner,
    seconds: usize,
    load: f64,
    rate: f64,
) -> Vec<Flip> {
    let mut flips = Vec::new();
    for second in 0..seconds {
        // What comes swings a tenth about its mean.
        let swing = 1.0 + 0.1 * (second as f64 * 1.7).sin();
        let pools = plant.second(load * swing, rate * swing);
        let advice = planner.look(&[pools], plant.now_ms).pop().unwrap();
        if let Ok(flip) = advice.flip {
            planner.began(flip.worker, flip.to, plant.now_ms);
            plant.apply(&flip);
            flips.push(flip);
        }
    }
    flips
}

/// A second of one load, and what is said then.
fn look(
    plant: &mut Plant,
    planner: &mut Planner,
    load: f64,
    rate: f64,
) -> Result<(WorkerSlot, Role), Hold> {
    let pools = plant.second(load, rate);
    let advice = planner.look(&[pools], plant.now_ms).pop().unwrap();
    advice.flip.map(|flip| (flip.worker, flip.to))
}

/// Looks until a flip is recommended.
fn recommended(
    plant: &mut Plant,
    planner: &mut Planner,
    load: f64,
    rate: f64,
) -> (WorkerSlot, Role) {
    for _ in 0..600 {
        if let Ok(flip) = look(plant, planner, load, rate) {
            return flip;
        }
    }
    panic!("no flip");
}

fn planner() -> Planner {
    Planner::new(PlannerSettings::default())
}

#[test]
fn a_pool_that_is_short_gets_workers_until_it_is_not() {
    let (mut plant, mut planner) = (Plant::new(1, 7), planner());
    let flips = run(&mut plant, &mut planner, 1_200, 3.2, 1.0);
    // Three keep up; more may be needed for what had piled up by then.
    assert!(flips.len() >= 3 && flips.iter().all(|flip| flip.to == Role::Prefill));
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
    assert!(to_prefill.iter().all(|flip| flip.to == Role::Prefill));
    let to_decode = run(&mut plant, &mut planner, 900, 0.5, 8.0);
    assert!(!to_decode.is_empty());
    assert!(to_decode.iter().all(|flip| flip.to == Role::Decode));
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
        match planner.look(&[pools], plant.now_ms).pop().unwrap().flip {
            Ok(flip) => {
                planner.began(flip.worker, flip.to, plant.now_ms);
                at.push((plant.now_ms, flip));
            }
            Err(hold) => holds.push(hold),
        }
        // It takes a while to be seen.
        if let Some((began_ms, flip)) = at.last()
            && plant.now_ms == began_ms + 5.0 * LOOK_MS
        {
            plant.apply(&flip.clone());
        }
    }
    let settings = PlannerSettings::default();
    assert!(at.len() >= 4, "{at:?}");
    for pair in at.windows(2) {
        assert!(pair[1].0 - pair[0].0 >= settings.dwell_ms, "{at:?}");
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
fn a_flip_is_recommended_to_whoever_looks_until_somebody_does_it() {
    let (mut plant, mut planner) = (Plant::new(1, 7), planner());
    let flip = recommended(&mut plant, &mut planner, 6.0, 0.1);
    for _ in 0..100 {
        assert_eq!(look(&mut plant, &mut planner, 6.0, 0.1), Ok(flip));
    }
    // What operators do to another worker is none of it.
    planner.began(WorkerSlot(0), Role::Both, plant.now_ms);
    assert_eq!(look(&mut plant, &mut planner, 6.0, 0.1), Ok(flip));
    planner.began(flip.0, flip.1, plant.now_ms);
    assert_eq!(
        look(&mut plant, &mut planner, 6.0, 0.1),
        Err(Hold::Flipping)
    );
}

#[test]
fn a_flip_that_was_done_elsewhere_counts_from_when_it_is_seen() {
    let (mut plant, mut planner) = (Plant::new(1, 7), planner());
    let (worker, to) = recommended(&mut plant, &mut planner, 6.0, 0.1);
    plant.roles[worker.0 as usize] = to;
    assert_eq!(
        look(&mut plant, &mut planner, 6.0, 0.1),
        Err(Hold::Dwelling)
    );
}

#[test]
fn a_flip_that_is_not_done_blocks_nothing_once_patience_ends() {
    let settings = PlannerSettings {
        margin: 0.5,
        ..PlannerSettings::default()
    };
    for refused in [false, true] {
        let (mut plant, mut planner) = (Plant::new(4, 4), Planner::new(settings.clone()));
        let (worker, to) = recommended(&mut plant, &mut planner, 4.4, 6.6);
        assert_eq!(to, Role::Prefill);
        planner.began(worker, to, plant.now_ms);
        let began_ms = plant.now_ms;
        if refused {
            planner.failed(worker, plant.now_ms);
        }
        // It never is. What comes changes by less than would undo one that was done, and
        // decoding is short.
        let mut held = Vec::new();
        loop {
            match look(&mut plant, &mut planner, 2.4, 8.0) {
                Ok((_, Role::Decode)) => break,
                Ok(_) => {}
                Err(hold) => held.push(hold),
            }
            assert!(plant.now_ms < began_ms + 200_000.0, "{held:?}");
        }
        let flipping = held.iter().filter(|hold| **hold == Hold::Flipping).count();
        let patience = (settings.patience_ms / LOOK_MS) as usize;
        assert_eq!(flipping, if refused { 0 } else { patience - 1 });
        for wrong in [Hold::StillAsked, Hold::Dwelling] {
            assert!(!held.contains(&wrong), "{held:?}");
        }
    }
}

#[test]
fn a_flip_that_is_late_was_done_all_the_same() {
    let (mut plant, mut planner) = (Plant::new(1, 7), planner());
    let (worker, to) = recommended(&mut plant, &mut planner, 6.0, 0.1);
    planner.began(worker, to, plant.now_ms);
    let patience = PlannerSettings::default().patience_ms / LOOK_MS;
    for _ in 0..=patience as usize {
        let _ = look(&mut plant, &mut planner, 6.0, 0.1);
    }
    plant.roles[worker.0 as usize] = to;
    assert_eq!(
        look(&mut plant, &mut planner, 6.0, 0.1),
        Err(Hold::Dwelling)
    );
}

#[test]
fn what_was_short_before_a_long_pause_is_confirmed_anew() {
    let settings = PlannerSettings::default();
    let (mut plant, mut planner) = (Plant::new(1, 7), planner());
    while look(&mut plant, &mut planner, 6.0, 0.1) != Err(Hold::Confirming) {
        assert!(plant.now_ms < 60_000.0, "it is not short");
    }
    // Nobody looks meanwhile.
    plant.now_ms += settings.memory_ms;
    assert_eq!(
        look(&mut plant, &mut planner, 6.0, 0.1),
        Err(Hold::Confirming)
    );
}

#[test]
fn contexts_that_grow_undo_a_flip_though_prompts_and_tokens_come_as_before() {
    let (mut plant, mut planner) = (Plant::new(4, 4), planner());
    let roles = |flips: Vec<Flip>| flips.iter().map(|flip| flip.to).collect::<Vec<_>>();
    let flips = run(&mut plant, &mut planner, 300, 3.9, 4.5);
    assert_eq!(roles(flips), [Role::Prefill]);
    // More of each prompt is cached: there is no more to compute.
    plant.context *= 2.0;
    let flips = run(&mut plant, &mut planner, 300, 3.9, 4.5);
    assert_eq!(roles(flips), [Role::Decode]);
    // Prompts wait as they did before. It does not swing.
    assert!(run(&mut plant, &mut planner, 3_600, 3.9, 4.5).is_empty());
    let asked = look(&mut plant, &mut planner, 3.9, 4.5);
    assert_eq!(asked, Err(Hold::StillAsked));
    // And back.
    plant.context = CONTEXT;
    let flips = run(&mut plant, &mut planner, 300, 3.9, 4.5);
    assert_eq!(roles(flips), [Role::Prefill]);
}

#[test]
fn workers_that_go_undo_a_flip_and_one_that_is_away_for_a_moment_does_not() {
    let (mut plant, mut planner) = (Plant::new(4, 4), planner());
    assert_eq!(run(&mut plant, &mut planner, 300, 3.9, 4.5).len(), 1);
    // Decoding gets short by less than undoes it.
    let load = (3.9, 5.4);
    let mut asked = || look(&mut plant, &mut planner, load.0, load.1);
    let mut looks = 0;
    while asked() != Err(Hold::StillAsked) {
        looks += 1;
        assert!(looks < 200, "decoding is not short");
    }
    for _ in 0..300 {
        assert_eq!(asked(), Err(Hold::StillAsked));
    }
    let last = plant.roles.len() - 1;
    plant.steady[last] = false;
    let away = look(&mut plant, &mut planner, load.0, load.1);
    assert_eq!(away, Err(Hold::Confirming));
    plant.steady[last] = true;
    for _ in 0..30 {
        let back = look(&mut plant, &mut planner, load.0, load.1);
        assert_eq!(back, Err(Hold::StillAsked));
    }
    plant.roles.pop();
    plant.steady.pop();
    let confirm = PlannerSettings::default().confirm_ms / LOOK_MS;
    for _ in 1..confirm as usize {
        let gone = look(&mut plant, &mut planner, load.0, load.1);
        assert_eq!(gone, Err(Hold::Confirming));
    }
    let (_, to) = look(&mut plant, &mut planner, load.0, load.1).unwrap();
    assert_eq!(to, Role::Decode);
}

#[test]
fn a_worker_that_drains_neither_counts_nor_moves() {
    let (mut plant, mut planner) = (Plant::new(1, 2), planner());
    plant.steady[2] = false;
    let flips = run(&mut plant, &mut planner, 300, 3.0, 0.1);
    // The other one is the last that decodes: it is shared, and no more is to be had.
    let changes: Vec<_> = flips.iter().map(|flip| (flip.worker, flip.to)).collect();
    assert_eq!(changes, [(WorkerSlot(1), Role::Both)]);
    let pools = plant.second(3.0, 0.1);
    let advice = planner.look(&[pools], plant.now_ms).pop().unwrap();
    assert_eq!(advice.flip, Err(Hold::NobodyToSpare));
    let now = advice.now;
    assert_eq!((now.prefill, now.decode, now.both), (1, 0, 1));
}

#[test]
fn where_a_pool_has_one_worker_it_is_shared_and_goes_back_when_it_is_needed() {
    let (mut plant, mut planner) = (Plant::new(1, 1), planner());
    assert!(run(&mut plant, &mut planner, 120, 0.4, 0.3).is_empty());
    // More prompts than one worker computes: half of the other helps.
    let shared = run(&mut plant, &mut planner, 600, 1.3, 0.3);
    assert_eq!(shared.len(), 1, "{shared:?}");
    assert_eq!(
        (shared[0].from, shared[0].to, shared[0].relieves),
        (Role::Decode, Role::Both, Role::Prefill)
    );
    assert!(plant.waiting_ms < 1_000.0, "it did not help");
    // It stays while nobody is short.
    assert!(run(&mut plant, &mut planner, 600, 0.3, 0.3).is_empty());
    // More tokens than half of a worker makes.
    let back = run(&mut plant, &mut planner, 600, 0.3, 1.3);
    assert_eq!(back.len(), 1, "{back:?}");
    assert_eq!(
        (back[0].worker, back[0].from, back[0].to),
        (shared[0].worker, Role::Both, Role::Decode)
    );
}

#[test]
fn a_prefill_worker_alone_is_shared_where_decoding_is_short() {
    let (mut plant, mut planner) = (Plant::new(1, 1), planner());
    let flips = run(&mut plant, &mut planner, 600, 0.2, 2.3);
    let changes: Vec<_> = flips.iter().map(|flip| (flip.from, flip.to)).collect();
    assert_eq!(changes, [(Role::Prefill, Role::Both)]);
    assert_eq!(flips[0].relieves, Role::Decode);
}

#[test]
fn a_lent_worker_goes_on_to_the_other_pool_once_its_own_has_somebody_else() {
    let (mut plant, mut planner) = (Plant::new(1, 1), planner());
    assert_eq!(run(&mut plant, &mut planner, 300, 1.3, 0.1).len(), 1);
    // A worker joins that decodes.
    plant.roles.push(Role::Decode);
    plant.steady.push(true);
    let on = run(&mut plant, &mut planner, 600, 1.55, 0.1);
    let changes: Vec<_> = on.iter().map(|flip| (flip.worker, flip.to)).collect();
    assert_eq!(changes, [(WorkerSlot(1), Role::Prefill)]);
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
        let one_way = flips.windows(2).all(|pair| pair[0].relieves == pair[1].relieves);
        prop_assert!(one_way, "{:?}", flips);
        prop_assert!(run(&mut plant, &mut planner, 600, load, rate).len() <= 1);
    }

    /// The same of pools so small that workers are shared.
    #[test]
    fn a_constant_load_never_swings_where_workers_are_shared(
        prefill in 1usize..3,
        decode in 1usize..3,
        load in 0.0f64..3.0,
        rate in 0.0f64..5.0,
    ) {
        let (mut plant, mut planner) = (Plant::new(prefill, decode), planner());
        let flips = run(&mut plant, &mut planner, 1_800, load, rate);
        let one_way = flips.windows(2).all(|pair| pair[0].relieves == pair[1].relieves);
        prop_assert!(one_way, "{:?}", flips);
        prop_assert!(run(&mut plant, &mut planner, 600, load, rate).len() <= 1);
    }

    /// Contexts that change once, whatever else comes, turn it round once at most.
    #[test]
    fn contexts_that_change_do_not_make_it_swing(
        prefill in 1usize..9,
        decode in 1usize..9,
        load in 0.0f64..10.0,
        rate in 0.0f64..14.0,
        grow in 0.25f64..4.0,
    ) {
        let (mut plant, mut planner) = (Plant::new(prefill, decode), planner());
        run(&mut plant, &mut planner, 600, load, rate);
        plant.context *= grow;
        run(&mut plant, &mut planner, 300, load, rate);
        let flips = run(&mut plant, &mut planner, 1_800, load, rate);
        let one_way = flips.windows(2).all(|pair| pair[0].relieves == pair[1].relieves);
        prop_assert!(one_way, "{:?}", flips);
        prop_assert!(run(&mut plant, &mut planner, 600, load, rate).len() <= 1);
    }

    /// Whatever comes: who does a stage is never left without anybody that takes
    /// work, and only a pool without anybody to spare is shared.
    #[test]
    fn no_role_is_ever_emptied(
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
                let Ok(flip) = advice.flip else { continue };
                prop_assert!(plant.steady[flip.worker.0 as usize]);
                let before = [Role::Prefill, Role::Decode].map(|stage| plant.able(stage));
                if flip.to == Role::Both {
                    // One that takes work is all that this pool has.
                    let pool = plant.roles.iter().zip(&plant.steady);
                    let pool = pool.filter(|(role, steady)| **role == flip.from && **steady);
                    prop_assert_eq!(pool.count(), 1);
                }
                planner.began(flip.worker, flip.to, plant.now_ms);
                plant.apply(&flip);
                for (stage, before) in [Role::Prefill, Role::Decode].into_iter().zip(before) {
                    prop_assert!(plant.able(stage) >= before.min(1), "{:?}", flip);
                }
            }
        }
    }

    /// Workers that somebody made `both` stay so, whatever comes.
    #[test]
    fn whom_somebody_else_made_both_never_flips(
        prefill in 0usize..3,
        decode in 0usize..3,
        both in 1usize..4,
        phases in prop::collection::vec((0.0f64..6.0, 0.0f64..10.0), 1..6),
    ) {
        let (mut plant, mut planner) = (Plant::new(prefill, decode), planner());
        plant.roles.resize(prefill + decode + both, Role::Both);
        plant.steady.resize(prefill + decode + both, true);
        for (load, rate) in phases {
            for flip in run(&mut plant, &mut planner, 150, load, rate) {
                prop_assert!((flip.worker.0 as usize) < prefill + decode, "{:?}", flip);
            }
        }
    }
}
