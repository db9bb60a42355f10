//! Those that wait on a worker: who goes before a request, and what it does to
//! those behind it.
//!
//! Own prompts are known one by one, by their virtual deadlines. Of all others
//! the class is known and how much of it there is: they are taken to have come
//! just now, each with an average prompt of its class.

use super::{Asked, People};
use crate::facts::Facts;
use crate::request::{Class, PerClass};
use crate::worker::Prompt;

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

    fn ms(&self, facts: &Facts) -> f64 {
        if self.tokens > 0.0 {
            facts.steps_ms(self.tokens, self.context)
        } else {
            0.0
        }
    }
}

/// Where a request stands on a worker with these own prompts.
pub(crate) fn line(facts: &Facts, prompts: &[Prompt], asked: &Asked, people: &People) -> Line {
    if !facts.waits {
        return Line::default();
    }
    let mut known: PerClass<(f64, f64)> = [(0.0, 0.0); 3];
    for prompt in prompts {
        let of = &mut known[prompt.class.index()];
        *of = (of.0 + 1.0, of.1 + prompt.tokens as f64);
    }
    let (mut ahead, mut behind) = (Part::default(), Part::default());
    for prompt in prompts {
        let class = prompt.class.index();
        // Reports know better how much of them is left.
        let left = (facts.waiting_tokens[class] / known[class].1.max(1.0)).min(1.0);
        let first = prompt.virtual_deadline_ms <= asked.virtual_deadline_ms;
        let side = if first { &mut ahead } else { &mut behind };
        side.add(
            prompt.tokens as f64 * left,
            prompt.context as f64 * left,
            people.weights.ttft[class],
        );
    }
    for class in Class::ALL {
        let at = class.index();
        let tokens = facts.waiting_tokens[at] - known[at].1;
        if tokens <= 0.0 {
            continue;
        }
        let count = (facts.waiting[at] - known[at].0).max(1.0);
        let each = tokens / count;
        let work_ms = facts.step.tokens_ms(each, each * each / 2.0);
        let key = asked.now_ms
            + people.targets.of(class).allowance_ms
            + people.targets.work_weight * work_ms;
        let first = key <= asked.virtual_deadline_ms;
        let side = if first { &mut ahead } else { &mut behind };
        side.add(tokens, tokens * each / 2.0, count * people.weights.ttft[at]);
    }
    Line {
        ahead_ms: ahead.ms(facts),
        behind_ms: behind.ms(facts),
        behind: behind.weight,
    }
}

/// What it does to those that wait there: each of them waits for its prompt.
pub(crate) fn queued_ms(line: &Line, prefill_ms: f64) -> f64 {
    line.behind * prefill_ms
}
