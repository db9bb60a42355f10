//! Those that wait on a worker: who goes before a request, and what it does to
//! those behind it.
//!
//! Own prompts are known one by one, by their virtual deadlines. Of all others
//! the class is known and how much of it there is: they are taken to have come
//! just now, each with an average prompt of its class.

use super::{Facts, People, steps_ms};
use crate::request::{Class, PerClass, RequestView};
use crate::worker::WorkerView;

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

/// Tokens, contexts and weights on one side of a request.
#[derive(Default)]
struct Part {
    tokens: f64,
    context: f64,
    weight: f64,
}

impl Part {
    fn add(&mut self, tokens: f64, context: f64, weight: f64) {
        self.tokens += tokens;
        self.context += context;
        self.weight += weight;
    }

    fn ms(&self, worker: &WorkerView, facts: &Facts) -> f64 {
        if self.tokens > 0.0 {
            steps_ms(worker, facts, self.tokens, self.context)
        } else {
            0.0
        }
    }
}

/// Where a request stands on a worker.
pub(crate) fn line(
    worker: &WorkerView,
    facts: &Facts,
    request: &RequestView<'_>,
    now_ms: f64,
    people: &People,
) -> Line {
    let there = &facts.waiting;
    if worker.prompts.is_empty() && there.waiting_tokens == [0; 3] {
        return Line::default();
    }
    let mut known: PerClass<(u32, u64)> = [(0, 0); 3];
    for prompt in &worker.prompts {
        let of = &mut known[prompt.class.index()];
        *of = (of.0 + 1, of.1 + prompt.tokens);
    }
    let (mut ahead, mut behind) = (Part::default(), Part::default());
    for prompt in &worker.prompts {
        let class = prompt.class.index();
        // Reports know better how much of them is left.
        let own = known[class].1.max(1) as f64;
        let left = (there.waiting_tokens[class] as f64 / own).min(1.0);
        let first = prompt.virtual_deadline_ms <= request.virtual_deadline_ms;
        let side = if first { &mut ahead } else { &mut behind };
        side.add(
            prompt.tokens as f64 * left,
            prompt.context as f64 * left,
            people.weights.ttft[class],
        );
    }
    for class in Class::ALL {
        let at = class.index();
        let tokens = there.waiting_tokens[at].saturating_sub(known[at].1) as f64;
        if tokens == 0.0 {
            continue;
        }
        let count = f64::from(there.waiting[at].saturating_sub(known[at].0).max(1));
        let each = tokens / count;
        let work_ms = worker.step.tokens_ms(each, each * each / 2.0);
        let key =
            now_ms + people.targets.of(class).allowance_ms + people.targets.work_weight * work_ms;
        let side = if key <= request.virtual_deadline_ms {
            &mut ahead
        } else {
            &mut behind
        };
        side.add(tokens, tokens * each / 2.0, count * people.weights.ttft[at]);
    }
    Line {
        ahead_ms: ahead.ms(worker, facts),
        behind_ms: behind.ms(worker, facts),
        behind: behind.weight,
    }
}

/// What it does to those that wait there: each of them waits for its prompt.
pub(crate) fn queued_ms(line: &Line, prefill_ms: f64) -> f64 {
    line.behind * prefill_ms
}
