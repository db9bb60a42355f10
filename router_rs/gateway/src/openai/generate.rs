//! `/v1/chat/completions` and `/v1/completions`.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use kvmesh_output_parser::{Calls, Expected};
use kvmesh_wire::v1;

use super::{
    Face, Failure,
    answer::Head,
    ask::{self, Shape},
    chunk::StreamChunks,
    events::Events,
    fields::{Fields, Offered},
    json,
    logprobs::Scribe,
    parsed::{Ids, Parsed, Parsing},
    whole, with_headers,
};
use crate::{
    access::{Caller, Visit},
    door::{self, CallMetadata, Refused},
    error::RequestError,
    mesh::{GenerationStream, ServedModel},
    serve::{
        Call, CallEnd, Shared,
        body::ResponseBody,
        generation::{Asked, Generation},
    },
    telemetry::{RequestSpan, Step},
};

/// Tokens that are looked at for what a template opened: a mark and a line break, where
/// the vocabulary has no token for the mark.
const PROMPT_END_TOKENS: usize = 24;
const EVENTS: HeaderValue = HeaderValue::from_static("text/event-stream; charset=utf-8");

/// Generations that were admitted.
struct Opened {
    streams: Vec<(GenerationStream, Visit)>,
    /// Answers to each prompt.
    n: usize,
    shape: Shape,
    /// Where reasoning and calls are looked for.
    parsing: Option<Parsing>,
    /// The name that was asked for.
    asked_for: String,
    model: Arc<ServedModel>,
}

/// An answer that comes, and what is made of it.
pub(super) struct Answered {
    pub(super) generation: Generation,
    /// Where ids of tokens are wanted: those of its prompt.
    pub(super) prompt_ids: Option<Arc<[u32]>>,
    /// Where log-probabilities are wanted.
    pub(super) scribe: Option<Scribe>,
    /// Where reasoning and calls are looked for.
    pub(super) parsed: Option<Parsed>,
}

/// Answers a call.
pub(super) async fn answer(
    shared: &Arc<Shared>,
    call: Call,
    (face, name): (Face, &'static str),
) -> Response<ResponseBody> {
    let back = call.metadata.headers();
    let entered = shared.enter(&call);
    let (call, span) = shared.begin(call);
    let Call {
        headers,
        body,
        metadata,
        end,
        ..
    } = call;
    let opened = async {
        let entered = entered?;
        let read = shared.door.read_json(&headers, body, Fields::read).await;
        let (fields, permit) = read?.split();
        let opened = open(shared, face, fields, &metadata, entered).await;
        drop(permit);
        opened
    }
    .await;
    match opened {
        Ok(opened) => {
            let answering = Answering {
                shared,
                name,
                metadata: &metadata,
            };
            let (generations, head, shape, n) = answering.begin(opened, span);
            match shape.stream {
                true => {
                    answering
                        .stream(generations, &head, shape, n, &end, &back)
                        .await
                }
                false => answering.whole(generations, head, shape, n, &back).await,
            }
        }
        Err(refused) => {
            shared.turned_away(name, &metadata.request_id, span, &refused);
            Failure::Request(refused.1).response(&back)
        }
    }
}

/// All that follows the body, up to open generations.
async fn open(
    shared: &Arc<Shared>,
    face: Face,
    fields: Fields,
    metadata: &CallMetadata,
    (caller, visit): (Caller, Visit),
) -> Result<Opened, Refused> {
    let invalid = |error| (Step::Validate, error);
    // Schemas of tools are trees while grammars and parsers are made of them.
    let trees = fields.tools.as_ref().map_or(0, Offered::tree_bytes);
    let trees = shared.door.permit_for(trees, "tools")?;
    let mut asked = ask::ask(face, fields).map_err(invalid)?;
    let asked_for = asked.request.model.clone();
    let named = door::named(&shared.mesh, &asked_for).map_err(invalid)?;
    let model = shared.mesh.model(&named.model).map_err(invalid)?;
    let expected = match face {
        Face::Chat => expected(shared, &model, &mut asked).map_err(invalid)?,
        Face::Completion => None,
    };
    drop(trees);
    // Each answer is one of its tenant's; the call's own is the first.
    let answers = u32::try_from(asked.inputs.len()).unwrap_or(u32::MAX);
    let answers = answers.saturating_mul(asked.n);
    let field = if asked.n > 1 { "n" } else { "prompt" };
    let visits = shared
        .access
        .enter_all(&caller, visit, answers, field, metadata.arrived)
        .map_err(|error| (Step::Tenant, error))?;
    let mut visits = visits.into_iter();
    let mut streams: Vec<(GenerationStream, Visit)> = Vec::new();
    for input in asked.inputs {
        let request = v1::GenerateRequest {
            model: named.model.clone(),
            adapter: named.adapter.clone(),
            input: Some(input),
            ..asked.request.clone()
        };
        let opened = shared
            .door
            .generate_several(request, (asked.n, asked.most), metadata, &caller)
            .await?;
        streams.extend(opened.into_iter().zip(visits.by_ref()));
    }
    Ok(Opened {
        parsing: expected.map(|expected| Parsing {
            expected: Arc::new(expected),
            prompt_end: prompt_end(&model, streams.first().map(|(stream, _)| stream)),
            parallel: asked.tools.is_none_or(|tools| tools.parallel),
            ids: Ids::of(shared.parsers.tools(&model.record.name, model.tool_format)),
        }),
        streams,
        n: asked.n as usize,
        shape: asked.shape,
        asked_for: match asked_for.is_empty() {
            true => model.record.name.clone(),
            false => asked_for,
        },
        model,
    })
}

/// What is to be found in the answers, where anything is; its marks are kept in their text.
fn expected(
    shared: &Shared,
    model: &ServedModel,
    asked: &mut ask::Asked,
) -> Result<Option<Expected>, RequestError> {
    let name = &model.record.name;
    let parsers = &shared.parsers;
    let format = parsers.tools(name, model.tool_format);
    let calls = asked.tools.as_ref().map(|tools| tools.calls(model, format));
    let expected = Expected {
        reasoning: parsers.reasoning(name, model.reasoning_format),
        calls: calls.transpose()?.unwrap_or(Calls::None),
        constrained: asked.request.grammar.is_some(),
    };
    if expected.is_plain() {
        return Ok(None);
    }
    if let Some(output) = &mut asked.request.output {
        let marks = expected.marks().into_iter();
        output.kept_special_tokens = marks.map(str::to_owned).collect();
    }
    Ok(Some(expected))
}

/// The last characters of a prompt: its template may have opened the reasoning.
fn prompt_end(model: &ServedModel, stream: Option<&GenerationStream>) -> String {
    let ids = stream.map_or(&[][..], GenerationStream::prompt_ids);
    let mut detokenizer = model.text.detokenizer(true);
    let mut text = String::new();
    for id in &ids[ids.len().saturating_sub(PROMPT_END_TOKENS)..] {
        detokenizer.push(*id, &mut text);
    }
    text
}

/// A call whose generations run.
struct Answering<'a> {
    shared: &'a Arc<Shared>,
    name: &'static str,
    metadata: &'a CallMetadata,
}

type Generations = Vec<Answered>;

impl Answering<'_> {
    /// Each generation carries a span: the call's, or where there are several one below it.
    fn begin(
        &self,
        opened: Opened,
        span: Option<RequestSpan>,
    ) -> (Generations, Head, Shape, usize) {
        let Opened {
            streams,
            n,
            shape,
            parsing,
            asked_for,
            model,
        } = opened;
        let spans = span.map(|span| span.answers(streams.len()));
        let mut spans = spans.unwrap_or_default().into_iter();
        let generation = |(stream, visit): (GenerationStream, Visit)| {
            let asked = Asked {
                method: self.name,
                request_id: self.metadata.request_id.clone(),
                arrived: self.metadata.arrived,
            };
            let prompt_ids = shape.token_ids.then(|| stream.shared_prompt_ids());
            let telemetry = Arc::clone(&self.shared.telemetry);
            let generation = Generation::new(stream, telemetry, asked, (visit, spans.next()));
            let scribe = |names| Scribe::new(shape.face, names, Arc::clone(&model.text));
            Answered {
                generation,
                prompt_ids,
                scribe: shape.logprobs.map(scribe),
                parsed: parsing.as_ref().map(Parsed::new),
            }
        };
        let generations: Generations = streams.into_iter().map(generation).collect();
        let first = generations
            .first()
            .map_or("", |first| first.generation.id());
        let head = Head::new(shape.face, shape.stream, first, asked_for, &model);
        (generations, head, shape, n)
    }

    /// An error that came before the first event is the status of the call.
    async fn stream(
        &self,
        generations: Generations,
        head: &Head,
        shape: Shape,
        n: usize,
        end: &CallEnd,
        back: &HeaderMap,
    ) -> Response<ResponseBody> {
        let chunks = StreamChunks::new(head, shape.usage);
        let keep_alive = self.shared.sse_keep_alive;
        let mut events = Events::new(shape.face, generations, n, chunks, keep_alive);
        if let Err(error) = events.opened().await {
            return self.failed(error, back);
        }
        end.follow(events.given_up());
        let body = ResponseBody::Events(Box::new(events));
        let mut response = with_headers(StatusCode::OK, EVENTS, body, back);
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // nginx would gather events before it passes them on.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }

    async fn whole(
        &self,
        generations: Generations,
        head: Head,
        shape: Shape,
        n: usize,
        back: &HeaderMap,
    ) -> Response<ResponseBody> {
        match whole::gather(shape.face, generations, n, head).await {
            Ok(whole) => json(&whole, back),
            Err(error) => self.failed(error, back),
        }
    }

    /// Its generations have told of their ends.
    fn failed(&self, error: RequestError, back: &HeaderMap) -> Response<ResponseBody> {
        tracing::debug!(event = "failed", request_id = %self.metadata.request_id, %error);
        Failure::Request(error).response(back)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each function that has room for a future twice doubles what a call allocates and
    /// copies before it does anything.
    #[test]
    fn a_call_takes_little_room() {
        fn room<'a, F>(_: impl Fn(&'a Arc<Shared>, Call, (Face, &'static str)) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = room(answer);
        assert!(bytes <= 8_192, "{bytes}");
    }
}
