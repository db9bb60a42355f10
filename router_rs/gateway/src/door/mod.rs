//! From bytes to an admitted request: limits first, then text, then values.
//!
//! The order is that of PROTOCOLS 5: permit for bytes, body, bound on tokens,
//! tokenise, validate, admission. Whose a call is has been asked before.

mod budget;
mod json;
mod metadata;
mod named;
mod text;
mod validate;

pub(crate) use budget::Budget;
pub(crate) use metadata::CallMetadata;
pub(crate) use named::named;
pub(crate) use text::TextPool;
pub(crate) use validate::{DefaultClass, MAX_TOOLS};

use std::{
    pin::{Pin, pin},
    sync::Arc,
    time::{Duration, Instant},
};

use http::HeaderMap;
use hyper::body::Incoming;
use kvmesh_wire::v1::{self, generate_request::Input};
use prost::Message;
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    access::Caller,
    error::RequestError,
    mesh::{GenerationStream, Mesh, ServedModel},
    request::AdmittedRequest,
    serve::grpc,
    settings::Settings,
    telemetry::{ClassEnd, Step, Telemetry},
};

/// Token ids that are hashed in the time that a byte of text takes to be
/// tokenised: some 0.4 ns against 25. So long prompts are hashed where long
/// texts are tokenised.
const HASHED_PER_TEXT_BYTE: usize = 64;
/// Longest message of a call that takes no permit and no pool, in bytes: such
/// messages hold a name or two.
const SMALL_BYTES: u64 = 4_096;

/// All that a request passes before the mesh has it.
pub(crate) struct Door {
    mesh: Arc<Mesh>,
    telemetry: Arc<Telemetry>,
    max_request_bytes: u64,
    read_timeout: Duration,
    budget: Budget,
    text: TextPool,
    classes: DefaultClass,
}

/// A message with the permit for its bytes.
pub(crate) struct Admitted<M> {
    pub(crate) message: M,
    permit: Permit,
}

/// Gives the bytes of a message back to the budget when it is dropped.
pub(crate) struct Permit(#[expect(dead_code, reason = "held")] OwnedSemaphorePermit);

impl<M> Admitted<M> {
    /// The message, and the permit, which has to be kept as long as it is.
    pub(crate) fn split(self) -> (M, Permit) {
        (self.message, self.permit)
    }
}

impl Permit {
    /// The permit of what a message became.
    pub(crate) fn around<M>(self, message: M) -> Admitted<M> {
        Admitted {
            message,
            permit: self,
        }
    }
}

/// A refusal, with the step that it came from.
pub(crate) type Refused = (Step, RequestError);

impl Door {
    pub(crate) fn new(settings: &Settings, mesh: Arc<Mesh>, telemetry: Arc<Telemetry>) -> Self {
        let budget = Budget::new(settings.request_bytes_budget);
        let (free, all) = budget.permits();
        telemetry.watch_permits(free, all);
        Self {
            mesh,
            telemetry,
            max_request_bytes: settings.max_request_bytes,
            read_timeout: settings.request_read_timeout,
            budget,
            text: TextPool::new(settings.inline_text_bytes, settings.text_threads),
            classes: DefaultClass::new(&settings.default_class),
        }
    }

    /// Reads a call's message.
    pub(crate) async fn read<M: Message + Default>(
        &self,
        headers: &HeaderMap,
        body: Incoming,
    ) -> Result<Admitted<M>, Refused> {
        let limit = self.max_request_bytes;
        let receive = grpc::receive(headers, body, limit, |length| self.permit(length));
        let (received, mut permit) = self.in_time(pin!(receive)).await?;
        let mut bytes = received.bytes;
        if received.gzip {
            let packed = bytes.len();
            bytes = self
                .text
                .run(packed, move |_| grpc::inflate(&bytes, limit))
                .await
                .map_err(|error| (Step::Size, error))?;
            let more = (bytes.len() as u64).saturating_sub(packed as u64);
            permit.merge(self.permit(more).map_err(|error| (Step::Permit, error))?);
        }
        let message = grpc::decode(bytes).map_err(|error| (Step::Body, error))?;
        Ok(Admitted {
            message,
            permit: Permit(permit),
        })
    }

    /// Reads the message of a call of health or admin, or of ListModels. It
    /// takes no permit and no pool: who runs the cluster is answered while
    /// requests have spent both. A fixed bound stands in for them.
    pub(crate) async fn read_small<M: Message + Default>(
        &self,
        headers: &HeaderMap,
        body: Incoming,
    ) -> Result<M, Refused> {
        let receive = grpc::receive(headers, body, SMALL_BYTES, |_| Ok(()));
        let (received, ()) = self.in_time(pin!(receive)).await?;
        let bytes = match received.gzip {
            true => grpc::inflate(&received.bytes, SMALL_BYTES),
            false => Ok(received.bytes),
        };
        let bytes = bytes.map_err(|error| (Step::Size, error))?;
        grpc::decode(bytes).map_err(|error| (Step::Body, error))
    }

    /// Ends a reading that takes too long.
    async fn in_time<T>(
        &self,
        receive: Pin<&mut impl Future<Output = Result<T, RequestError>>>,
    ) -> Result<T, Refused> {
        tokio::time::timeout(self.read_timeout, receive)
            .await
            .unwrap_or_else(|_| {
                let text = format!("it was not there after {:?}", self.read_timeout);
                Err(RequestError::Malformed(text))
            })
            .map_err(|error| (Step::of_reading(&error), error))
    }

    fn permit(&self, bytes: u64) -> Result<OwnedSemaphorePermit, RequestError> {
        self.budget.take(bytes)
    }

    /// The permit for what is made of a message before it is admitted.
    pub(crate) fn permit_for(
        &self,
        bytes: usize,
        field: &str,
    ) -> Result<Option<OwnedSemaphorePermit>, Refused> {
        let permit = self.budget.take_for(bytes, field);
        permit.map_err(|error| (text::step_of(&error), error))
    }

    /// All that follows the body, up to an open generation.
    pub(crate) async fn generate(
        &self,
        request: Admitted<v1::GenerateRequest>,
        call: &CallMetadata,
        caller: &Caller,
    ) -> Result<GenerationStream, Refused> {
        let (message, _permit) = request.split();
        if message.n > 1 {
            return Err((Step::Validate, RequestError::unsupported("n")));
        }
        let (admitted, chain) = self.prepare(message, None, call, caller).await?;
        self.open(admitted, chain)
    }

    /// As [`Door::generate`], for `n` answers to one prompt, which becomes tokens
    /// once. From a seed that the client gave each next answer draws with the
    /// next number. Each has at most `most` tokens, and fewer where fewer fit: for a message
    /// that leaves the length open.
    pub(crate) async fn generate_several(
        &self,
        message: v1::GenerateRequest,
        (n, most): (u32, Option<u32>),
        call: &CallMetadata,
        caller: &Caller,
    ) -> Result<Vec<GenerationStream>, Refused> {
        let seed = message.sampling.as_ref().and_then(|given| given.seed);
        let (first, chain) = self.prepare(message, most, call, caller).await?;
        let other = |number: u32| {
            let mut next = first.clone();
            next.sampling.seed = match seed {
                Some(seed) => seed.wrapping_add(number.into()),
                None => rand::random(),
            };
            next
        };
        let others: Vec<AdmittedRequest> = (1..n).map(other).collect();
        let all = std::iter::once(first).chain(others);
        all.map(|request| self.open(request, chain.clone()))
            .collect()
    }

    /// A request that passed every check, with the names of its blocks.
    async fn prepare(
        &self,
        mut message: v1::GenerateRequest,
        most: Option<u32>,
        call: &CallMetadata,
        caller: &Caller,
    ) -> Result<(AdmittedRequest, Vec<u64>), Refused> {
        let input = message.input.take();
        let chat = matches!(input, Some(Input::Chat(_)));
        let invalid = |error| (Step::Validate, error);
        let model = self.model(&message.model)?;
        validate::values(&message, &model).map_err(invalid)?;
        let began = Instant::now();
        let ids = self.prompt_ids(&model, input).await?;
        let tokenize_ms = began.elapsed().as_secs_f64() * 1e3;
        let mut admitted = validate::admit(
            message,
            &model,
            &self.classes,
            (call, caller),
            (ids, chat),
            tokenize_ms,
        )
        .map_err(invalid)?;
        if let Some(most) = most {
            admitted.max_tokens = admitted.max_tokens.min(most);
        }
        let class = admitted.class;
        let mesh = Arc::clone(&self.mesh);
        let like_text = admitted.prompt_ids.len() / HASHED_PER_TEXT_BYTE;
        let hash = move |_: &_| {
            let chain = mesh.chain(&admitted)?;
            Ok((admitted, chain))
        };
        let hashed = self.text.run(like_text, hash).await;
        hashed.map_err(|error| self.turned(class, error))
    }

    fn open(
        &self,
        admitted: AdmittedRequest,
        chain: Vec<u64>,
    ) -> Result<GenerationStream, Refused> {
        let class = admitted.class;
        let opened = self.mesh.generate_named(admitted, chain);
        opened.map_err(|error| self.turned(class, error))
    }

    /// A request that was turned away by the mesh.
    fn turned(&self, class: v1::RequestClass, error: RequestError) -> Refused {
        self.telemetry.class_ended(class, ClassEnd::Refused);
        (Step::Admission, error)
    }

    /// Token ids of a text or chat, as [`Door::generate`] would use them.
    pub(crate) async fn tokenize(
        &self,
        request: Admitted<v1::TokenizeRequest>,
    ) -> Result<v1::TokenizeResponse, Refused> {
        use v1::tokenize_request::Input as Text;
        let (message, _permit) = request.split();
        let model = self.model(&message.model)?;
        let input = message.input.map(|input| match input {
            Text::Prompt(prompt) => Input::Prompt(prompt),
            Text::Chat(chat) => Input::Chat(chat),
        });
        let ids = self.prompt_ids(&model, input).await?;
        Ok(v1::TokenizeResponse {
            ids,
            context_length: model.record.context_length,
        })
    }

    /// Token ids of a text of a message whose permit the caller holds.
    pub(crate) async fn prompt(&self, model: &str, prompt: String) -> Result<Vec<u32>, Refused> {
        let model = self.model(model)?;
        self.prompt_ids(&model, Some(Input::Prompt(prompt))).await
    }

    /// Text of token ids, special ones included. Ids that are none have none.
    pub(crate) async fn detokenize(
        &self,
        model: &str,
        ids: Admitted<Vec<u32>>,
    ) -> Result<String, Refused> {
        let (ids, _permit) = ids.split();
        let count = ids.len();
        let mut detokenizer = self.model(model)?.text.detokenizer(true);
        let work = move |_: &_| {
            let mut text = String::new();
            for id in ids.iter().copied() {
                detokenizer.push(id, &mut text);
            }
            detokenizer.finish(&mut text);
            Ok(text)
        };
        let text = self.text.run(count, work).await;
        text.map_err(|error| (Step::Tokenize, error))
    }

    fn model(&self, name: &str) -> Result<Arc<ServedModel>, Refused> {
        self.mesh
            .model(name)
            .map_err(|error| (Step::Validate, error))
    }

    async fn prompt_ids(
        &self,
        model: &Arc<ServedModel>,
        input: Option<Input>,
    ) -> Result<Vec<u32>, Refused> {
        let began = Instant::now();
        let ids = match input {
            None => {
                let allowed = "one of prompt, chat and token_ids is required";
                Err((Step::Validate, RequestError::invalid("input", allowed)))
            }
            Some(Input::TokenIds(ids)) => {
                validate::token_ids(&ids.ids, model).map_err(|error| (Step::Validate, error))?;
                Ok(ids.ids)
            }
            Some(Input::Prompt(prompt)) => {
                if prompt.is_empty() {
                    let error = RequestError::invalid("prompt", "at least 1 byte");
                    return Err((Step::Validate, error));
                }
                self.text.tokenize(model, prompt, "prompt").await
            }
            Some(Input::Chat(chat)) => {
                // A message of two bytes becomes one of hundreds.
                let each = size_of::<v1::ChatMessage>() + size_of::<kvmesh_text::Message>();
                let messages = chat.messages.len() * each;
                let bytes = chat.encoded_len();
                let more = messages.saturating_sub(bytes);
                let _held = self.permit_for(more, "chat.messages")?;
                // Apart: a prompt that is given needs no room for this.
                Box::pin(self.text.chat(model, chat, bytes, &self.budget)).await
            }
        };
        self.telemetry.tokenized(began.elapsed());
        ids
    }
}

/// Bytes that permits stand for.
pub(crate) fn permit_bytes(permits: usize) -> u64 {
    permits as u64 * budget::PERMIT_BYTES
}
