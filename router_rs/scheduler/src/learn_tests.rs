//! What SCHEDULING 3 asks of the learning, on synthetic steps.

use super::*;

/// splitmix64, as a number in 0..1.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() * limit as f64) as u64
    }

    /// About normal: the sum of twelve uniforms.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.next()).sum::<f64>() - 6.0
    }
}

const TRUTH: StepModel = StepModel {
    a_ms: 8.0,
    b_ms: 0.5,
    c_ms: 3e-4,
    d_ms: 2.0,
    e_ms: 0.004,
    relative_error: 0.0,
    saturating_chunk: 256,
};

fn step(rng: &mut Rng, truth: &StepModel, slower: f64, noise: f64) -> StepSample {
    let prefill_tokens = if rng.next() < 0.5 { rng.below(256) } else { 0 };
    let prefill_context = prefill_tokens * rng.below(4_096);
    let decode_batch = rng.below(32) as u32 + 1;
    let decode_context = u64::from(decode_batch) * (100 + rng.below(2_000));
    let exact = truth.step_ms(
        prefill_tokens,
        prefill_context,
        decode_batch,
        decode_context,
    );
    let duration_ms = exact * slower * (noise * rng.normal()).exp();
    StepSample {
        prefill_tokens,
        prefill_context,
        decode_batch,
        decode_context,
        duration_ms,
    }
}

/// Mean relative error of predictions over the operating range.
fn mean_error(model: &StepModel, truth: &StepModel, slower: f64) -> f64 {
    let errors = errors(model, truth, slower);
    errors.iter().sum::<f64>() / errors.len() as f64
}

/// Relative errors of predictions over the operating range, least first.
fn errors(model: &StepModel, truth: &StepModel, slower: f64) -> Vec<f64> {
    let mut rng = Rng(99);
    let errors = (0..500).map(|_| {
        let s = step(&mut rng, truth, slower, 0.0);
        let got = model.step_ms(
            s.prefill_tokens,
            s.prefill_context,
            s.decode_batch,
            s.decode_context,
        );
        (got / s.duration_ms - 1.0).abs()
    });
    let mut errors: Vec<f64> = errors.collect();
    errors.sort_by(f64::total_cmp);
    errors
}

#[test]
fn predictions_come_within_five_percent_of_noisy_steps() {
    for seed in 0..20 {
        let mut rng = Rng(seed);
        let mut learner = Learner::new(StepModel::default());
        for _ in 0..2_000 {
            let mut sample = step(&mut rng, &TRUTH, 1.0, 0.1);
            if rng.next() < 0.01 {
                sample.duration_ms *= 5.0;
            }
            learner.observe(&sample);
        }
        let errors = errors(learner.model(), &TRUTH, 1.0);
        // Of 95 in 100; the corners of the range are hardly among 2,000 noisy steps.
        let error = errors[errors.len() * 95 / 100];
        assert!(error < 0.05, "seed {seed}: {error}");
    }
}

#[test]
fn a_slow_down_is_followed_within_fifty_steps() {
    for (seed, slower) in (0..20).flat_map(|seed| [(seed, 2.0), (seed, 0.5)]) {
        let mut rng = Rng(seed);
        let mut learner = Learner::new(TRUTH);
        for _ in 0..2_000 {
            learner.observe(&step(&mut rng, &TRUTH, 1.0, 0.1));
        }
        for _ in 0..50 {
            learner.observe(&step(&mut rng, &TRUTH, slower, 0.1));
        }
        let error = mean_error(learner.model(), &TRUTH, slower);
        assert!(error < 0.15, "seed {seed}, {slower}: {error}");
    }
}

#[test]
fn a_million_steps_in_one_narrow_regime_stay_bounded_and_it_follows_then() {
    let mut rng = Rng(7);
    let mut learner = Learner::new(StepModel::default());
    for _ in 0..1_000_000 {
        let duration_ms = TRUTH.decode_ms(4, 2_000) * (0.1 * rng.normal()).exp();
        let sample = StepSample {
            decode_batch: 4,
            decode_context: 2_000,
            duration_ms,
            ..StepSample::default()
        };
        learner.observe(&sample);
    }
    for row in &learner.covariance {
        assert!(
            row.iter().all(|value| value.abs() <= 1.0 + 1e-9),
            "{:?}",
            learner.covariance
        );
    }
    let error = (learner.model().decode_ms(4, 2_000) / TRUTH.decode_ms(4, 2_000) - 1.0).abs();
    assert!(error < 0.05, "{error}");
    for _ in 0..300 {
        learner.observe(&step(&mut rng, &TRUTH, 1.0, 0.1));
    }
    let error = mean_error(learner.model(), &TRUTH, 1.0);
    assert!(error < 0.08, "{error}");
}

#[test]
fn a_stall_is_not_believed_but_the_fifth_in_a_row_is() {
    let mut learner = Learner::new(TRUTH);
    let sample = |duration_ms| StepSample {
        decode_batch: 4,
        decode_context: 2_000,
        duration_ms,
        ..StepSample::default()
    };
    let usual = TRUTH.decode_ms(4, 2_000);
    for _ in 0..4 {
        assert!(!learner.observe(&sample(10.0 * usual)));
    }
    assert!((learner.model().decode_ms(4, 2_000) - usual).abs() < 1e-9);
    for _ in 0..20 {
        assert!(learner.observe(&sample(10.0 * usual)));
    }
    let now = learner.model().decode_ms(4, 2_000);
    assert!(
        (now / (10.0 * usual) - 1.0).abs() < 0.1,
        "{now} for {}",
        10.0 * usual
    );
}

#[test]
fn idleness_widens_the_error_bar_and_leaves_the_mean() {
    let learner = Learner::new(TRUTH);
    let idle = learner.model_after_idle(90_000.0);
    assert!(idle.relative_error > learner.model().relative_error);
    assert_eq!(
        StepModel {
            relative_error: 0.0,
            ..idle
        },
        TRUTH
    );
    assert_eq!(&learner.model_after_idle(30_000.0), learner.model());
}
