//! Those that wait on a worker: who goes before a request, and what it does to
//! those behind it.
//!
//! Own prompts are known one by one, by their virtual deadlines. Of all others
//! the class is known and how much of it there is: they are taken to have come
//! just now, each with an average prompt of its class.

use super::Asked;
use crate::deadline::{ClassTargets, Weights};
use crate::facts::Facts;
use crate::request::{Class, PerClass};
use crate::worker::{ByClass, Prompt, WorkerView};

/// What waits on a worker, counted once a change.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Waiting {
    /// Prompts of which only the class is known.
    pub(crate) others: PerClass<Group>,
    /// Own ones: all of them, ...
    pub(crate) own: Group,
    /// ... between which virtual deadlines, ...
    pub(crate) first_ms: f64,
    pub(crate) last_ms: f64,
    /// ... and which share of each is left, by class.
    left: PerClass<f64>,
}

/// Some prompts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Group {
    /// From now to their virtual deadlines, ms.
    pub(crate) ahead_of_ms: f64,
    /// Computing them, ms.
    pub(crate) work_ms: f64,
    /// Each by the weight of its class.
    pub(crate) weight: f64,
}

/// Prompts on a worker, seen from a request that joins them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Line {
    /// Computing those before it, ms.
    pub(crate) ahead_ms: f64,
    /// Computing those behind it, ms.
    pub(crate) behind_ms: f64,
    /// Those behind it, each by the weight of its class.
    pub(crate) behind: f64,
}

impl Line {
    fn add(&mut self, first: bool, work_ms: f64, weight: f64) {
        if first {
            self.ahead_ms += work_ms;
        } else {
            self.behind_ms += work_ms;
            self.behind += weight;
        }
    }
}

impl Waiting {
    pub(crate) fn of(
        facts: &Facts,
        worker: &WorkerView,
        there: &ByClass,
        targets: &ClassTargets,
        weights: &Weights,
    ) -> Self {
        let mut known: PerClass<(f64, f64)> = [(0.0, 0.0); 3];
        for prompt in &worker.prompts {
            let of = &mut known[prompt.class.index()];
            *of = (of.0 + 1.0, of.1 + prompt.tokens as f64);
        }
        let tokens = there.waiting_tokens.map(|tokens| tokens as f64);
        // Reports know better how much of the own ones is left.
        let left = Class::ALL.map(|class| {
            let at = class.index();
            (tokens[at] / known[at].1.max(1.0)).min(1.0)
        });
        let (mut first_ms, mut last_ms) = (f64::INFINITY, f64::NEG_INFINITY);
        let mut own = Group::default();
        for prompt in &worker.prompts {
            first_ms = first_ms.min(prompt.virtual_deadline_ms);
            last_ms = last_ms.max(prompt.virtual_deadline_ms);
            own.work_ms += prompt_ms(facts, prompt, &left);
            own.weight += weights.ttft[prompt.class.index()];
        }
        let others = Class::ALL.map(|class| {
            let at = class.index();
            let rest = tokens[at] - known[at].1;
            if rest <= 0.0 {
                return Group::default();
            }
            let count = (f64::from(there.waiting[at]) - known[at].0).max(1.0);
            let each = rest / count;
            let work_ms = facts.step.tokens_ms(each, each * each / 2.0);
            Group {
                ahead_of_ms: targets.of(class).allowance_ms + targets.work_weight * work_ms,
                work_ms: facts.flow_ms(rest, rest * each / 2.0),
                weight: count * weights.ttft[at],
            }
        });
        Self {
            others,
            own,
            first_ms,
            last_ms,
            left,
        }
    }
}

/// Computing an own prompt that waits on a worker, ms.
pub(crate) fn own_prompt_ms(facts: &Facts, prompt: &Prompt) -> f64 {
    prompt_ms(facts, prompt, &facts.line.left)
}

fn prompt_ms(facts: &Facts, prompt: &Prompt, left: &PerClass<f64>) -> f64 {
    let work_ms = facts.flow_ms(prompt.tokens as f64, prompt.context as f64);
    left[prompt.class.index()] * work_ms
}

/// Where a request stands on a worker with these own prompts.
pub(crate) fn line(
    facts: &Facts,
    prompts: &[Prompt],
    asked: &Asked,
    weights: &PerClass<f64>,
) -> Line {
    let mut line = Line::default();
    if !facts.waits {
        return line;
    }
    let waiting = &facts.line;
    let deadline = asked.virtual_deadline_ms;
    for group in &waiting.others {
        let first = asked.now_ms + group.ahead_of_ms <= deadline;
        line.add(first, group.work_ms, group.weight);
    }
    let own = &waiting.own;
    if waiting.last_ms <= deadline || deadline < waiting.first_ms {
        line.add(waiting.last_ms <= deadline, own.work_ms, own.weight);
        return line;
    }
    for prompt in prompts {
        let first = prompt.virtual_deadline_ms <= deadline;
        let work_ms = prompt_ms(facts, prompt, &waiting.left);
        line.add(first, work_ms, weights[prompt.class.index()]);
    }
    line
}

/// What it does to those that wait there: each of them waits for its prompt.
pub(crate) fn queued_ms(line: &Line, prefill_ms: f64) -> f64 {
    line.behind * prefill_ms
}
