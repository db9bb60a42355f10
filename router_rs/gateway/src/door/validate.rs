//! Values of a request: from what a client sent to what cannot be invalid.

use std::sync::Arc;

use kvmesh_scheduler::ClassTargets;
use kvmesh_text::{Chat, MAX_STOP_BYTES, MAX_STOPS, Message, TextSettings};
use kvmesh_wire::v1::{self, RequestClass};

use super::CallMetadata;
use crate::{
    access::Caller,
    error::{RequestError, Violation, Violations},
    mesh::{ServedModel, class_of},
    request::AdmittedRequest,
};

const MAX_LOGIT_BIAS: usize = 1_024;
const MAX_STOP_IDS: usize = 64;
const MAX_KEPT: usize = 64;
const MAX_KEPT_BYTES: usize = 256;
/// Most tools that a chat may offer.
pub(crate) const MAX_TOOLS: usize = 128;
const MAX_LOGPROBS: u32 = 20;
const MAX_HINT_BYTES: usize = 256;
const MAX_TARGET_MS: u32 = 3_600_000;
const MAX_GRAMMAR_BYTES: usize = 1 << 20;

/// The class of a request that names none.
pub(crate) struct DefaultClass {
    default: RequestClass,
}

impl DefaultClass {
    pub(crate) fn new(default: &str) -> Self {
        let default = match default {
            "interactive" => RequestClass::Interactive,
            "batch" => RequestClass::Batch,
            _ => RequestClass::Standard,
        };
        Self { default }
    }

    fn class(&self, asked: RequestClass) -> RequestClass {
        if asked == RequestClass::Unspecified {
            self.default
        } else {
            asked
        }
    }
}

/// Collects what is wrong, so that one answer names all of it.
#[derive(Default)]
struct Check(Vec<Violation>);

impl Check {
    fn that(&mut self, holds: bool, field: &str, allowed: impl FnOnce() -> String) {
        if !holds {
            self.0.push(Violation {
                field: field.to_owned(),
                description: allowed(),
            });
        }
    }

    /// NaN is within no range.
    fn range(&mut self, value: f32, least: f32, most: f32, field: &str) {
        let allowed = || format!("{least} to {most}, not {value}");
        self.that((least..=most).contains(&value), field, allowed);
    }

    fn over_zero(&mut self, value: f32, most: f32, field: &str) {
        let allowed = || format!("above 0 up to {most}, not {value}");
        self.that(value > 0.0 && value <= most, field, allowed);
    }

    fn done(self) -> Result<(), RequestError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(RequestError::Invalid(Violations(self.0)))
        }
    }
}

/// Everything that can be said before the prompt is tokenised.
pub(super) fn values(
    request: &v1::GenerateRequest,
    model: &ServedModel,
) -> Result<(), RequestError> {
    let mut check = Check::default();
    if let Some(sampling) = &request.sampling {
        check_sampling(sampling, model, &mut check);
    }
    let text = request
        .output
        .as_ref()
        .and_then(|output| output.text)
        .unwrap_or(true);
    if let Some(stopping) = &request.stopping {
        check_stopping(stopping, model, text, &mut check);
    }
    if let Some(hints) = &request.hints {
        check_hints(hints, &mut check);
    }
    let adapters = &model.record.adapters;
    let adapter = &request.adapter;
    check.that(
        adapter.is_empty() || adapters.contains_key(adapter),
        "adapter",
        || {
            let mut known: Vec<_> = adapters.keys().map(String::as_str).collect();
            known.sort_unstable();
            format!("one of: {}", known.join(", "))
        },
    );
    let kept = request
        .output
        .iter()
        .flat_map(|output| &output.kept_special_tokens);
    check.that(
        kept.clone().count() <= MAX_KEPT
            && kept
                .clone()
                .all(|text| (1..=MAX_KEPT_BYTES).contains(&text.len())),
        "output.kept_special_tokens",
        || format!("at most {MAX_KEPT} texts, each 1 to {MAX_KEPT_BYTES} bytes"),
    );
    let logprobs = request.output.as_ref().and_then(|output| output.logprobs);
    check.that(
        logprobs.is_none_or(|n| n <= MAX_LOGPROBS),
        "output.logprobs",
        || format!("0 to {MAX_LOGPROBS}"),
    );
    if let Some(grammar) = &request.grammar {
        check_grammar(grammar, &mut check);
    }
    if let Some(from) = &request.continue_from {
        check_ids(
            &from.token_ids,
            "continue_from.token_ids",
            model,
            &mut check,
        );
    }
    check.done()?;
    supported(request, logprobs, model)
}

fn check_sampling(sampling: &v1::Sampling, model: &ServedModel, check: &mut Check) {
    let vocabulary = model.record.vocabulary_size;
    check.range(
        sampling.temperature.unwrap_or(1.0),
        0.0,
        100.0,
        "sampling.temperature",
    );
    check.that(sampling.top_k <= vocabulary, "sampling.top_k", || {
        format!("0 to {vocabulary}")
    });
    check.over_zero(sampling.top_p.unwrap_or(1.0), 1.0, "sampling.top_p");
    check.range(sampling.min_p, 0.0, 1.0, "sampling.min_p");
    let repetition = sampling.repetition_penalty.unwrap_or(1.0);
    check.over_zero(repetition, 10.0, "sampling.repetition_penalty");
    check.range(
        sampling.frequency_penalty,
        -2.0,
        2.0,
        "sampling.frequency_penalty",
    );
    check.range(
        sampling.presence_penalty,
        -2.0,
        2.0,
        "sampling.presence_penalty",
    );
    let biases = &sampling.logit_bias;
    check.that(
        biases.len() <= MAX_LOGIT_BIAS,
        "sampling.logit_bias",
        || format!("at most {MAX_LOGIT_BIAS} entries"),
    );
    for (at, bias) in biases.iter().take(MAX_LOGIT_BIAS).enumerate() {
        let id = format!("sampling.logit_bias[{at}].token_id");
        check.that(bias.token_id < vocabulary, &id, || {
            format!("0 to {}", vocabulary.saturating_sub(1))
        });
        check.range(
            bias.bias,
            -100.0,
            100.0,
            &format!("sampling.logit_bias[{at}].bias"),
        );
    }
}

fn check_stopping(stopping: &v1::Stopping, model: &ServedModel, text: bool, check: &mut Check) {
    let stops = &stopping.stop;
    check.that(stops.len() <= MAX_STOPS, "stopping.stop", || {
        format!("at most {MAX_STOPS} strings, not {}", stops.len())
    });
    check.that(text || stops.is_empty(), "stopping.stop", || {
        "stop strings need output.text".to_owned()
    });
    for (at, stop) in stops.iter().take(MAX_STOPS).enumerate() {
        let good = (1..=MAX_STOP_BYTES).contains(&stop.len());
        check.that(good, &format!("stopping.stop[{at}]"), || {
            format!("1 to {MAX_STOP_BYTES} bytes")
        });
    }
    let ids = &stopping.stop_token_ids;
    check.that(ids.len() <= MAX_STOP_IDS, "stopping.stop_token_ids", || {
        format!("at most {MAX_STOP_IDS} ids")
    });
    let vocabulary = model.record.vocabulary_size;
    check.that(
        ids.iter().all(|id| *id < vocabulary),
        "stopping.stop_token_ids",
        || format!("each 0 to {}", vocabulary.saturating_sub(1)),
    );
    let max = stopping.max_tokens;
    check.that(
        max == 0 || stopping.min_tokens <= max,
        "stopping.min_tokens",
        || format!("0 to max_tokens, which is {max}"),
    );
}

fn check_hints(hints: &v1::Hints, check: &mut Check) {
    check.that(
        RequestClass::try_from(hints.request_class).is_ok(),
        "hints.request_class",
        || "one of INTERACTIVE, STANDARD and BATCH".to_owned(),
    );
    let bytes = || format!("at most {MAX_HINT_BYTES} bytes");
    check.that(
        hints.conversation_id.len() <= MAX_HINT_BYTES,
        "hints.conversation_id",
        bytes,
    );
    check.that(
        hints.cache_salt.len() <= MAX_HINT_BYTES,
        "hints.cache_salt",
        bytes,
    );
    let target = || format!("0 to {MAX_TARGET_MS} ms");
    check.that(
        hints.ttft_target_ms <= MAX_TARGET_MS,
        "hints.ttft_target_ms",
        target,
    );
    check.that(
        hints.itl_target_ms <= MAX_TARGET_MS,
        "hints.itl_target_ms",
        target,
    );
}

fn check_grammar(grammar: &v1::Grammar, check: &mut Check) {
    use v1::grammar::Kind;
    let bytes = match &grammar.kind {
        Some(Kind::JsonSchema(text) | Kind::Regex(text) | Kind::Ebnf(text)) => text.len(),
        Some(Kind::JsonObject(wanted)) => usize::from(*wanted),
        None => 0,
    };
    check.that((1..=MAX_GRAMMAR_BYTES).contains(&bytes), "grammar", || {
        format!("one kind, 1 to {MAX_GRAMMAR_BYTES} bytes; json_object must be true")
    });
}

/// Features that this model's engine lacks.
fn supported(
    request: &v1::GenerateRequest,
    logprobs: Option<u32>,
    model: &ServedModel,
) -> Result<(), RequestError> {
    let can = &model.capabilities;
    let lacks = |field: &str| Err(RequestError::unsupported(field));
    if logprobs.is_some_and(|n| can.max_logprobs == 0 || n > can.max_logprobs) {
        return lacks("output.logprobs");
    }
    match &request.grammar {
        Some(_) if !can.grammars => lacks("grammar"),
        Some(grammar) if grammar.require_continuation && !can.grammars_over_continuation => {
            lacks("grammar.require_continuation")
        }
        Some(_) if request.continue_from.is_some() && !can.grammars_over_continuation => {
            lacks("continue_from")
        }
        _ => Ok(()),
    }
}

/// Token ids that a client sent.
pub(super) fn token_ids(ids: &[u32], model: &ServedModel) -> Result<(), RequestError> {
    let mut check = Check::default();
    check.that(!ids.is_empty(), "token_ids.ids", || {
        "at least 1 id".to_owned()
    });
    let context = model.record.context_length;
    if ids.len() >= context as usize {
        let allowed = format!(
            "{} ids; the context of {context} must leave room for 1 more",
            ids.len()
        );
        return Err(RequestError::over_context("token_ids.ids", allowed));
    }
    check_ids(ids, "token_ids.ids", model, &mut check);
    check.done()
}

fn check_ids(ids: &[u32], field: &str, model: &ServedModel, check: &mut Check) {
    let vocabulary = model.record.vocabulary_size;
    if let Some(at) = ids.iter().position(|id| *id >= vocabulary) {
        check.that(false, &format!("{field}[{at}]"), || {
            format!("0 to {}", vocabulary.saturating_sub(1))
        });
    }
}

/// A conversation as the template takes it.
pub(super) fn chat(chat: v1::Chat) -> Result<Chat, RequestError> {
    let mut check = Check::default();
    check.that(!chat.messages.is_empty(), "chat.messages", || {
        "at least 1 message".to_owned()
    });
    check.that(
        chat.tools_json.len() <= MAX_TOOLS,
        "chat.tools_json",
        || format!("at most {MAX_TOOLS} tools"),
    );
    for (at, message) in chat.messages.iter().enumerate() {
        let field = format!("chat.messages[{at}].role");
        check.that(!message.role.is_empty(), &field, || "a role".to_owned());
    }
    check.done()?;
    let json = |field: String| {
        move |error: kvmesh_text::JsonError| RequestError::invalid(field, error.to_string())
    };
    let given = |text: String| Some(text).filter(|text| !text.is_empty());
    let mut messages = Vec::with_capacity(chat.messages.len());
    for (at, from) in chat.messages.into_iter().enumerate() {
        let mut message = Message::new(from.role, from.content);
        message.name = given(from.name);
        message.tool_call_id = given(from.tool_call_id);
        message.reasoning_content = given(from.reasoning_content);
        for (call, text) in from.tool_calls_json.iter().enumerate() {
            let field = format!("chat.messages[{at}].tool_calls_json[{call}]");
            message.add_tool_call(text).map_err(json(field))?;
        }
        messages.push(message);
    }
    let mut rendered = Chat::new(messages);
    rendered.add_generation_prompt = chat.add_generation_prompt.unwrap_or(true);
    for (at, text) in chat.tools_json.iter().enumerate() {
        rendered
            .add_tool(text)
            .map_err(json(format!("chat.tools_json[{at}]")))?;
    }
    rendered
        .set_arguments(&chat.template_arguments_json)
        .map_err(json("chat.template_arguments_json".to_owned()))?;
    Ok(rendered)
}

/// Puts the admitted request together; its values were checked already.
pub(super) fn admit(
    request: v1::GenerateRequest,
    model: &ServedModel,
    classes: &DefaultClass,
    (call, caller): (&CallMetadata, &Caller),
    (ids, chat): (Vec<u32>, bool),
    tokenize_ms: f64,
) -> Result<AdmittedRequest, RequestError> {
    let stopping = request.stopping.unwrap_or_default();
    let output = request.output.unwrap_or_default();
    let hints = request.hints.unwrap_or_default();
    let field = if chat { "chat" } else { "prompt" };
    let max_tokens = room(&stopping, (ids.len(), field), model)?;
    let mut sampling = resolve(request.sampling.unwrap_or_default());
    if let Some(from) = &request.continue_from {
        sampling.seed = from.seed;
    }
    let had = request.continue_from.unwrap_or_default();
    if had.token_ids.len() > max_tokens as usize {
        let allowed = format!("at most {max_tokens} ids: as many as may be output in all");
        return Err(RequestError::invalid("continue_from.token_ids", allowed));
    }
    if hints.expected_output_tokens > max_tokens {
        let allowed = format!("0 to {max_tokens}: as many as may be output in all");
        let field = "hints.expected_output_tokens";
        return Err(RequestError::invalid(field, allowed));
    }
    let class = classes.class(hints.request_class());
    let shipped = *ClassTargets::default().of(class_of(class));
    let mut stop_token_ids = stopping.stop_token_ids;
    if !stopping.ignore_end_of_text {
        stop_token_ids.extend_from_slice(&model.record.end_of_text_ids);
    }
    stop_token_ids.sort_unstable();
    stop_token_ids.dedup();
    let text = output.text.unwrap_or(true).then_some(TextSettings {
        special_tokens: output.special_tokens,
        kept_special_tokens: output.kept_special_tokens,
        stops: stopping.stop,
        include_stop: stopping.include_stop,
        min_tokens: stopping.min_tokens,
    });
    Ok(AdmittedRequest {
        request_id: call.request_id.clone(),
        traceparent: call.traceparent.clone(),
        resumes: String::new(),
        tracestate: call.tracestate.clone(),
        baggage: call.baggage.clone(),
        model: model.record.name.clone(),
        prompt_ids: Arc::from(ids),
        output_ids: had.token_ids,
        sampling,
        max_tokens,
        min_tokens: stopping.min_tokens,
        stop_token_ids,
        text,
        logprobs: output.logprobs,
        grammar: request.grammar,
        placements: output.placements,
        trace: output.trace,
        traced: call.traced,
        chat,
        admin: caller.operates,
        tenant: caller.tenant,
        resumable: hints.resumable,
        class,
        ttft_target_ms: match hints.ttft_target_ms {
            0 => shipped.ttft_ms,
            given => f64::from(given),
        },
        itl_target_ms: match hints.itl_target_ms {
            0 => shipped.itl_ms.unwrap_or(0.0),
            given => f64::from(given),
        },
        cache_salt: caller.salted(hints.cache_salt),
        adapter: request.adapter,
        expected_output_tokens: hints.expected_output_tokens,
        arrived: call.arrived,
        deadline: call.deadline,
        tokenize_ms,
    })
}

/// Most output tokens, within what the context leaves.
fn room(
    stopping: &v1::Stopping,
    (prompt, field): (usize, &str),
    model: &ServedModel,
) -> Result<u32, RequestError> {
    let context = model.record.context_length;
    let prompt = u32::try_from(prompt).unwrap_or(u32::MAX);
    let left = context.saturating_sub(prompt);
    if prompt == 0 {
        return Err(RequestError::invalid(field, "at least 1 token"));
    }
    if left == 0 {
        let allowed =
            format!("{prompt} tokens; the context of {context} must leave room for 1 more");
        return Err(RequestError::over_context(field, allowed));
    }
    let mut check = Check::default();
    check.that(stopping.max_tokens <= left, "stopping.max_tokens", || {
        format!("at most {left}: the context of {context} less a prompt of {prompt} tokens")
    });
    check.that(stopping.min_tokens <= left, "stopping.min_tokens", || {
        format!("at most {left}")
    });
    check.done().map_err(|error| match error {
        RequestError::Invalid(all) => RequestError::OverContext(all),
        error => error,
    })?;
    Ok(if stopping.max_tokens == 0 {
        left
    } else {
        stopping.max_tokens
    })
}

fn resolve(sampling: v1::Sampling) -> v1::ResolvedSampling {
    v1::ResolvedSampling {
        temperature: sampling.temperature.unwrap_or(1.0),
        top_k: sampling.top_k,
        top_p: sampling.top_p.unwrap_or(1.0),
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty.unwrap_or(1.0),
        frequency_penalty: sampling.frequency_penalty,
        presence_penalty: sampling.presence_penalty,
        logit_bias: sampling.logit_bias,
        seed: sampling.seed.unwrap_or_else(rand::random),
        seed_given: sampling.seed.is_some(),
    }
}
