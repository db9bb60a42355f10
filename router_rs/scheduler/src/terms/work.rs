//! What to book for a stage.

use crate::booking::Work;
use crate::fit::tokens_held;
use crate::request::{Class, PerClass, RequestView};
use crate::step_model::prefill_context;
use crate::worker::{ByClass, WorkerView};

/// For the prompt.
pub(crate) fn prefill(worker: &WorkerView, request: &RequestView<'_>) -> Work {
    let cached = request.cached_on(worker.slot);
    let tokens = request.sequence() - cached;
    let mut classes = ByClass {
        waiting: one(request.class),
        ..ByClass::default()
    };
    classes.waiting_tokens[request.class.index()] = tokens;
    Work {
        prefills: 1,
        prefill_tokens: tokens,
        prefill_context: prefill_context(cached, tokens) as u64,
        blocks: new_blocks(worker, request),
        classes,
        ..Work::default()
    }
}

/// For the output.
pub(crate) fn decode(worker: &WorkerView, request: &RequestView<'_>) -> Work {
    Work {
        decodes: 1,
        decode_context: request.sequence(),
        blocks: new_blocks(worker, request),
        classes: ByClass {
            decoding: one(request.class),
            ..ByClass::default()
        },
        ..Work::default()
    }
}

/// For both.
pub(crate) fn whole(worker: &WorkerView, request: &RequestView<'_>) -> Work {
    let prompt = prefill(worker, request);
    Work {
        decodes: 1,
        decode_context: request.sequence(),
        classes: ByClass {
            decoding: one(request.class),
            ..prompt.classes
        },
        ..prompt
    }
}

fn one(class: Class) -> PerClass<u32> {
    Class::ALL.map(|other| u32::from(other == class))
}

fn new_blocks(worker: &WorkerView, request: &RequestView<'_>) -> u64 {
    worker.blocks(tokens_held(request))
        - request.cached_on(worker.slot) / u64::from(worker.abilities.block_tokens.max(1))
}
