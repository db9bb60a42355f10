//! Learning a worker's step times from what its steps took.
//!
//! Recursive least squares with forgetting over the five features of
//! [`StepModel`]. Three bounds make it safe to run for ever (SCHEDULING 3):
//! the covariance never exceeds the prior's, residuals are clipped, and a step
//! far over its prediction counts as a stall unless it is the fifth in a row.

use crate::step_model::StepModel;

/// Number of coefficients.
const N: usize = 5;
/// Steps after which an observation weighs half.
const HALF_LIFE: f64 = 200.0;
/// A step over this many times its prediction is a stall ...
const STALL: f64 = 3.0;
/// ... unless it is this one in a row.
const BELIEVE: u32 = 5;
/// Largest relative error that moves the model.
const CLIP: f64 = 0.5;
/// Relative error that counts towards a change of the worker.
const SURPRISE: f64 = 0.25;
/// Variance of a step's relative error, as far as weighing goes.
const NOISE: f64 = 0.01;

/// What one engine step held and took.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepSample {
    /// Prefill tokens computed.
    pub prefill_tokens: u64,
    /// Sum of prefill tokens times context.
    pub prefill_context: u64,
    /// Decoding requests.
    pub decode_batch: u32,
    /// Sum of their contexts.
    pub decode_context: u64,
    /// What it took, ms.
    pub duration_ms: f64,
}

/// A step model that follows its worker.
#[derive(Debug, Clone)]
pub struct Learner {
    model: StepModel,
    /// Coefficients in units of the prior's scales.
    weights: [f64; N],
    scales: [f64; N],
    covariance: [[f64; N]; N],
    long_in_row: u32,
    /// Large errors in a row; negative where steps were too short.
    surprises: i32,
    /// Mean square of relative residuals.
    variance: f64,
}

impl Learner {
    /// Starts from a prior: the worker's own fit, or the default.
    pub fn new(prior: StepModel) -> Self {
        let mut learner = Self {
            model: prior,
            weights: [1.0; N],
            scales: [0.0; N],
            covariance: prior_covariance(),
            long_in_row: 0,
            surprises: 0,
            variance: prior.relative_error * prior.relative_error,
        };
        learner.rescale(prior);
        learner
    }

    /// The model now.
    pub fn model(&self) -> &StepModel {
        &self.model
    }

    fn rescale(&mut self, prior: StepModel) {
        let given = [prior.a_ms, prior.b_ms, prior.c_ms, prior.d_ms, prior.e_ms];
        let default = StepModel::default();
        let floor = [
            default.a_ms,
            default.b_ms,
            default.c_ms,
            default.d_ms,
            default.e_ms,
        ];
        for i in 0..N {
            // A prior of zero says nothing about the scale.
            self.scales[i] = if given[i] > 0.0 {
                given[i]
            } else {
                floor[i] * 0.01
            };
            self.weights[i] = given[i] / self.scales[i];
        }
    }

    /// The model for a worker that made no step for so long: after 30 s the
    /// error bar widens, the mean stays.
    pub fn model_after_idle(&self, idle_ms: f64) -> StepModel {
        let doubt = 0.1 * ((idle_ms - 30_000.0).max(0.0) / 60_000.0).min(10.0);
        StepModel {
            relative_error: self.model.relative_error.hypot(doubt),
            ..self.model
        }
    }

    /// Takes a step into account. Returns false for one taken as a stall, or
    /// that held nothing.
    pub fn observe(&mut self, sample: &StepSample) -> bool {
        let parts = [
            1.0,
            sample.prefill_tokens as f64,
            sample.prefill_context as f64,
            f64::from(sample.decode_batch),
            sample.decode_context as f64,
        ];
        let predicted: f64 = (0..N)
            .map(|i| self.weights[i] * self.scales[i] * parts[i])
            .sum();
        let sound = sample.duration_ms.is_finite() && sample.duration_ms > 0.0;
        if !sound || sample.prefill_tokens == 0 && sample.decode_batch == 0 {
            return false;
        }
        if sample.duration_ms > STALL * predicted {
            self.long_in_row += 1;
            if self.long_in_row < BELIEVE {
                return false;
            }
        } else {
            self.long_in_row = 0;
        }
        // Errors are relative: a tenth of a long step weighs as a tenth of a
        // short one.
        let unit = predicted.max(sample.duration_ms * 1e-3);
        let features: [f64; N] = std::array::from_fn(|i| self.scales[i] * parts[i] / unit);
        let residual = (sample.duration_ms / unit - self.dot(&features)).clamp(-CLIP, CLIP);
        self.notice_change(residual);
        self.update(&features, residual);
        self.publish(residual);
        true
    }

    fn dot(&self, features: &[f64; N]) -> f64 {
        (0..N).map(|i| self.weights[i] * features[i]).sum()
    }

    /// Forgetting alone follows in hundreds of steps. Errors that are large
    /// and all on one side mean that the worker changed: what is known weighs
    /// as little as a prior again.
    fn notice_change(&mut self, residual: f64) {
        let side = if residual.abs() < SURPRISE {
            0
        } else {
            residual.signum() as i32
        };
        self.surprises = if side != 0 && side == self.surprises.signum() {
            self.surprises + side
        } else {
            side
        };
        if self.surprises.unsigned_abs() >= BELIEVE {
            self.surprises = 0;
            self.covariance = prior_covariance();
        }
    }

    fn update(&mut self, features: &[f64; N], residual: f64) {
        let keep = 0.5f64.powf(1.0 / HALF_LIFE);
        let spread: [f64; N] =
            std::array::from_fn(|i| (0..N).map(|j| self.covariance[i][j] * features[j]).sum());
        let certain: f64 = NOISE + (0..N).map(|i| features[i] * spread[i]).sum::<f64>();
        for (weight, gain) in self.weights.iter_mut().zip(&spread) {
            *weight = (*weight + gain / certain * residual).max(0.0);
        }
        for (row, left) in self.covariance.iter_mut().zip(&spread) {
            for (cell, right) in row.iter_mut().zip(&spread) {
                *cell = (*cell - left * right / certain) / keep;
            }
        }
        // Directions that no step excites would grow for ever: no variance
        // exceeds the prior's. Rows and columns shrink together, so the matrix
        // stays a covariance.
        for i in 0..N {
            if self.covariance[i][i] > 1.0 {
                let shrink = self.covariance[i][i].sqrt().recip();
                for j in 0..N {
                    self.covariance[i][j] *= shrink;
                    self.covariance[j][i] *= shrink;
                }
            }
        }
    }

    fn publish(&mut self, residual: f64) {
        let keep = 0.5f64.powf(1.0 / HALF_LIFE);
        self.variance = keep * self.variance + (1.0 - keep) * residual * residual;
        let [a_ms, b_ms, c_ms, d_ms, e_ms] =
            std::array::from_fn(|i| self.weights[i] * self.scales[i]);
        let relative_error = self.variance.sqrt();
        self.model = StepModel {
            a_ms,
            b_ms,
            c_ms,
            d_ms,
            e_ms,
            relative_error,
            ..self.model
        };
    }
}

fn prior_covariance() -> [[f64; N]; N] {
    std::array::from_fn(|i| std::array::from_fn(|j| if i == j { 1.0 } else { 0.0 }))
}

#[cfg(test)]
#[path = "learn_tests.rs"]
mod tests;
