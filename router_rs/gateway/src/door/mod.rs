//! From bytes to an admitted request: limits first, then text, then values.
//!
//! The order is that of PROTOCOLS 5: permit for bytes, body, bound on tokens,
//! tokenise, validate, admission. Whose a call is has been asked before.

mod metadata;
mod text;
mod validate;

pub(crate) use metadata::CallMetadata;
pub(crate) use text::TextPool;
pub(crate) use validate::DefaultClass;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::HeaderMap;
use hyper::body::Incoming;
use kvmesh_wire::v1::{self, generate_request::Input};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    access::Caller,
    error::RequestError,
    mesh::{GenerationStream, Mesh, ServedModel},
    request::AdmittedRequest,
    serve::grpc,
    settings::Settings,
    telemetry::{ClassEnd, Step, Telemetry},
};

/// Bytes that one permit stands for.
const PERMIT_BYTES: u64 = 1_024;
/// Token ids that are hashed in the time that a byte of text takes to be
/// tokenised: some 0.4 ns against 25. So long prompts are hashed where long
/// texts are tokenised.
const HASHED_PER_TEXT_BYTE: usize = 64;
/// Longest message of a call that takes no permit and no pool, in bytes: such
/// messages hold a name or two.
const SMALL_BYTES: u64 = 4_096;
/// When to try again where bytes or connections were the limit: bodies are
/// read and admitted in well under this.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// All that a request passes before the mesh has it.
pub(crate) struct Door {
    mesh: Arc<Mesh>,
    telemetry: Arc<Telemetry>,
    max_request_bytes: u64,
    read_timeout: Duration,
    budget: Arc<Semaphore>,
    text: TextPool,
    classes: DefaultClass,
}

/// A message with the permit for its bytes.
pub(crate) struct Admitted<M> {
    pub(crate) message: M,
    _permit: OwnedSemaphorePermit,
}

/// A refusal, with the step that it came from.
pub(crate) type Refused = (Step, RequestError);

impl Door {
    pub(crate) fn new(settings: &Settings, mesh: Arc<Mesh>, telemetry: Arc<Telemetry>) -> Self {
        let permits = settings.request_bytes_budget / PERMIT_BYTES;
        let permits = usize::try_from(permits)
            .unwrap_or(usize::MAX)
            .min(Semaphore::MAX_PERMITS);
        let budget = Arc::new(Semaphore::new(permits));
        telemetry.watch_permits(&budget, permits);
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
        let (received, mut permit) = self.in_time(receive).await?;
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
            _permit: permit,
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
        let (received, ()) = self.in_time(receive).await?;
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
        receive: impl Future<Output = Result<T, RequestError>>,
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
        let permits = u32::try_from(bytes / PERMIT_BYTES + 1).unwrap_or(u32::MAX);
        Arc::clone(&self.budget)
            .try_acquire_many_owned(permits)
            .map_err(|_| RequestError::Overloaded {
                reason: "the budget for bytes of requests is spent",
                retry_after: RETRY_AFTER,
            })
    }

    /// All that follows the body, up to an open generation.
    pub(crate) async fn generate(
        &self,
        request: Admitted<v1::GenerateRequest>,
        call: &CallMetadata,
        caller: &Caller,
    ) -> Result<GenerationStream, Refused> {
        let mut message = request.message;
        let input = message.input.take();
        let chat = matches!(input, Some(Input::Chat(_)));
        let invalid = |error| (Step::Validate, error);
        if message.n > 1 {
            return Err(invalid(RequestError::unsupported("n")));
        }
        let model = self.model(&message.model)?;
        validate::values(&message, &model).map_err(invalid)?;
        let began = Instant::now();
        let ids = self.prompt_ids(&model, input).await?;
        let tokenize_ms = began.elapsed().as_secs_f64() * 1e3;
        let admitted = validate::admit(
            message,
            &model,
            &self.classes,
            (call, caller),
            ids,
            tokenize_ms,
        )
        .map_err(invalid)?;
        let admitted = AdmittedRequest { chat, ..admitted };
        let class = admitted.class;
        let turned = |error| {
            self.telemetry.class_ended(class, ClassEnd::Refused);
            (Step::Admission, error)
        };
        let mesh = Arc::clone(&self.mesh);
        let like_text = admitted.prompt_ids.len() / HASHED_PER_TEXT_BYTE;
        let hashed = self.text.run(like_text, move |_| {
            let chain = mesh.chain(&admitted)?;
            Ok((admitted, chain))
        });
        let (admitted, chain) = hashed.await.map_err(turned)?;
        self.mesh.generate_named(admitted, chain).map_err(turned)
    }

    /// Token ids of a text or chat, as [`Door::generate`] would use them.
    pub(crate) async fn tokenize(
        &self,
        request: Admitted<v1::TokenizeRequest>,
    ) -> Result<v1::TokenizeResponse, Refused> {
        use v1::tokenize_request::Input as Text;
        let model = self.model(&request.message.model)?;
        let input = request.message.input.map(|input| match input {
            Text::Prompt(prompt) => Input::Prompt(prompt),
            Text::Chat(chat) => Input::Chat(chat),
        });
        let ids = self.prompt_ids(&model, input).await?;
        Ok(v1::TokenizeResponse {
            ids,
            context_length: model.record.context_length,
        })
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
                let chat = validate::chat(chat).map_err(|error| (Step::Validate, error))?;
                self.text.chat(model, chat).await
            }
        };
        self.telemetry.tokenized(began.elapsed());
        ids
    }
}

/// Bytes that permits stand for.
pub(crate) fn permit_bytes(permits: usize) -> u64 {
    permits as u64 * PERMIT_BYTES
}
