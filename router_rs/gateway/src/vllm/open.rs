//! A call for generations, from its message to their answer.

use std::sync::Arc;

use http::Response;
use kvmesh_wire::v1::{self, generate_request::Input};
use prost::Message;

use super::{
    answers::{Answers, Face},
    field::{Names, renamed},
    named_by,
    running::Entered,
};
use crate::{
    access::{Caller, Visit},
    door::{self, CallMetadata, Refused},
    error::RequestError,
    mesh::GenerationStream,
    serve::{
        Call, Shared,
        body::ResponseBody,
        generation::{Asked as Told, Generation},
        grpc,
    },
    telemetry::Step,
};

/// Most answers that one call may ask for.
const MAX_ANSWERS: u32 = 128;
/// Longest name of a request that becomes that of its log lines, in bytes.
const MAX_REQUEST_ID: usize = 128;

/// What a message asks for.
pub(super) struct Asked {
    /// Its caller's name for it; may be empty.
    pub(super) request_id: String,
    /// A model, or an adapter of one; may be empty.
    pub(super) model: String,
    /// Without model; with an adapter where it is not the model's name that says so.
    pub(super) request: v1::GenerateRequest,
    /// Answers to it; 0 is 1.
    pub(super) n: u32,
    /// Whether the answer has the prompt's token ids.
    pub(super) prompt_ids: bool,
    /// What the answer looks like.
    pub(super) face: Box<dyn Face>,
    /// Names of fields for its errors.
    pub(super) names: Names,
}

/// Generations that were admitted.
struct Opened {
    streams: Vec<(GenerationStream, Visit)>,
    entered: Entered,
    face: Box<dyn Face>,
    /// End-of-text tokens of the model that the request does not name itself.
    end_of_text: Vec<u32>,
}

/// Answers a call with generations.
pub(super) async fn generate<M: Message + Default>(
    shared: &Arc<Shared>,
    call: Call,
    name: &'static str,
    ask: impl FnOnce(M, String) -> Result<Asked, RequestError>,
) -> Response<ResponseBody> {
    let entered = shared.enter(&call);
    let (call, span) = shared.begin(call);
    let Call {
        headers,
        body,
        mut metadata,
        end,
        ..
    } = call;
    let opened = async {
        let (caller, visit) = entered?;
        let read = shared.door.read::<M>(&headers, body).await?;
        let (message, permit) = read.split();
        let asked = ask(message, named_by(&headers)).map_err(|error| (Step::Validate, error))?;
        if !headers.contains_key("x-request-id") && is_name(&asked.request_id) {
            metadata.request_id.clone_from(&asked.request_id);
        }
        let names = asked.names;
        let opened = open(shared, asked, &metadata, (caller, visit)).await;
        drop(permit);
        opened.map_err(|(step, error)| (step, renamed(error, names)))
    };
    let opened = opened.await;
    let back = metadata.headers();
    let opened = match opened {
        Ok(opened) => opened,
        Err(refused) => {
            shared.turned_away(name, &metadata.request_id, span, &refused);
            return grpc::refusal(&refused.1.to_status(), &back);
        }
    };
    // The first generation carries the span of the call.
    let mut span = span;
    let generation = |(stream, visit)| {
        let told = Told {
            method: name,
            request_id: metadata.request_id.clone(),
            arrived: metadata.arrived,
        };
        let telemetry = Arc::clone(&shared.telemetry);
        Generation::new(stream, telemetry, told, (visit, span.take()))
    };
    let generations: Vec<Generation> = opened.streams.into_iter().map(generation).collect();
    let ids = generations.iter().map(|one| one.id().to_owned());
    opened.entered.opened(&shared.mesh, ids.collect());
    end.follow(generations.iter().map(Generation::given_up));
    let answers = Answers::new(
        generations,
        opened.face,
        opened.entered,
        opened.end_of_text,
        back.clone(),
    );
    grpc::response(ResponseBody::Answers(Box::new(answers)), &back)
}

/// Whether it can be a header, and a field of a log line.
fn is_name(id: &str) -> bool {
    let graphic = |byte: u8| byte.is_ascii_graphic();
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(graphic)
}

/// All that follows the message, up to open generations.
async fn open(
    shared: &Arc<Shared>,
    asked: Asked,
    metadata: &CallMetadata,
    (caller, visit): (Caller, Visit),
) -> Result<Opened, Refused> {
    let invalid = |error| (Step::Validate, error);
    let Asked {
        request_id,
        model,
        mut request,
        n,
        prompt_ids,
        mut face,
        ..
    } = asked;
    let n = n.max(1);
    if n > MAX_ANSWERS {
        let allowed = format!("1 to {MAX_ANSWERS} answers, not {n}");
        return Err(invalid(RequestError::invalid("n", allowed)));
    }
    // From here on it can be aborted, also while its text becomes tokens.
    let name = match request_id.is_empty() {
        true => metadata.request_id.clone(),
        false => request_id,
    };
    let entered = shared.vllm.running.enter(caller.tenant, name);
    let named = door::named(&shared.mesh, &model).map_err(invalid)?;
    request.model = named.model;
    if !named.adapter.is_empty() {
        if !request.adapter.is_empty() {
            let allowed = "empty where the model's name is an adapter";
            return Err(invalid(RequestError::invalid("adapter", allowed)));
        }
        request.adapter = named.adapter;
    }
    let model = shared.mesh.model(&request.model).map_err(invalid)?;
    if prompt_ids {
        face.prompt(ids_of(shared, &mut request).await?);
    }
    // Each answer is one of its tenant's; the call's own is the first.
    let visits = shared
        .access
        .enter_all(&caller, visit, n, "n", metadata.arrived)
        .map_err(|error| (Step::Tenant, error))?;
    let stops = request.stopping.as_ref();
    let stops = stops.map_or_else(Vec::new, |stopping| stopping.stop_token_ids.clone());
    let mut end_of_text = model.record.end_of_text_ids.clone();
    end_of_text.retain(|id| !stops.contains(id));
    let opened = shared
        .door
        .generate_several(request, (n, None), metadata, &caller)
        .await?;
    Ok(Opened {
        streams: opened.into_iter().zip(visits).collect(),
        entered,
        face,
        end_of_text,
    })
}

/// The prompt's token ids, which then are the request's input.
async fn ids_of(
    shared: &Arc<Shared>,
    request: &mut v1::GenerateRequest,
) -> Result<Vec<u32>, Refused> {
    let ids = match request.input.take() {
        Some(Input::Prompt(prompt)) => shared.door.prompt(&request.model, prompt).await?,
        Some(Input::TokenIds(ids)) => ids.ids,
        // None is refused at the door, and neither service has chats.
        other => {
            request.input = other;
            return Ok(Vec::new());
        }
    };
    request.input = Some(Input::TokenIds(v1::TokenIds { ids: ids.clone() }));
    Ok(ids)
}
