//! What one could choose who knew lengths and coefficients.

use crate::engine::{Engine, Outcome, Sequence, Stage};
use crate::trace::Trace;
use kvmesh_kv_index::WorkerSlot;
use kvmesh_scheduler::{Considered, Plan};
use std::collections::BTreeMap;

/// Chooses among plans by rolling the worker that computes the prompt forward
/// with the request and without: the smallest growth of the sum of first-token
/// times of everyone who waits there, the request's own included. Among plans
/// that differ in the decode side alone, which no first token waits for, it is
/// the one that costs least. `sequence` gives the request as the stage of a plan
/// has it.
pub(crate) fn choose<'a>(
    plans: &[Considered],
    sequence: impl Fn(Stage) -> Sequence,
    trace: &Trace,
    now_ms: f64,
    engine: impl Fn(WorkerSlot) -> (&'a Engine, f64),
) -> usize {
    let mut costs: BTreeMap<(WorkerSlot, bool), f64> = BTreeMap::new();
    let mut best = (f64::INFINITY, 0);
    for (at, plan) in plans.iter().enumerate() {
        let on = plan.plan.prefill();
        let stage = match plan.plan {
            Plan::Whole { .. } => Stage::Whole,
            Plan::Split { .. } => Stage::Prefill,
        };
        let key = (on, stage == Stage::Whole);
        let cost = *costs.entry(key).or_insert_with(|| {
            let (there, left_ms) = engine(on);
            let mut with = there.clone();
            with.submit(sequence(stage));
            let with = first_tokens_ms(with, trace, now_ms, left_ms);
            let without = first_tokens_ms(there.clone(), trace, now_ms, left_ms);
            // Where those that wait have no room for ever, one more has none.
            if without.is_finite() {
                with - without
            } else {
                f64::INFINITY
            }
        });
        // Plans come cheapest first: among equals the first stays.
        if cost < best.0 - 1e-9 {
            best = (cost, at);
        }
    }
    best.1
}

/// Sum of the times to the first tokens of all prompts on a worker, ms from
/// now. `left_ms`: until the step that runs ends.
fn first_tokens_ms(mut engine: Engine, trace: &Trace, now_ms: f64, left_ms: f64) -> f64 {
    let mut waiting = engine.waiting();
    if waiting == 0 {
        return 0.0;
    }
    let (mut after_ms, mut sum) = (left_ms, 0.0);
    let mut outcomes = Vec::new();
    if !engine.running() {
        match engine.begin_step(trace, &mut outcomes) {
            Some(step) => after_ms = step.duration_ms,
            None => return f64::INFINITY,
        }
    }
    while waiting > 0 {
        outcomes.clear();
        engine.end_step(now_ms + after_ms, trace, &mut outcomes);
        for outcome in &outcomes {
            match outcome {
                Outcome::Token { request, .. } => {
                    sum += after_ms;
                    waiting -= 1;
                    engine.handed_over(*request, trace);
                }
                Outcome::Returned { .. } => sum += after_ms,
                _ => {}
            }
        }
        match engine.begin_step(trace, &mut outcomes) {
            Some(step) => after_ms += step.duration_ms,
            // What is left waits for room that only others can make.
            None => return sum + waiting as f64 * after_ms,
        }
    }
    sum
}
