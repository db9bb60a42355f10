//! The same tokens without a router: `Inference.Generate` answered by the
//! worker itself, a message a token, text included. What a mesh is compared
//! with.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use kvmesh_rpc::v1::inference_server::Inference;
use kvmesh_wire::v1::{
    Accepted, FinishReason, Finished, GenerateRequest, GenerateResponse, ListModelsRequest,
    ListModelsResponse, Model, ResumeRequest, TokenizeRequest, TokenizeResponse, Tokens, Usage,
    generate_request::Input, generate_response::Event,
};
use tokio::{
    task::yield_now,
    time::{Instant, Sleep, sleep_until},
};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::{service::Answers, state::State};
use crate::tokens::{PromptSeed, TokenFunction};

/// Serves `kvmesh.v1.Inference` with token ids only.
pub(super) struct DirectService(pub(super) Arc<State>);

#[tonic::async_trait]
impl Inference for DirectService {
    type GenerateStream = DirectStream;
    type ResumeStream = Answers<GenerateResponse>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<DirectStream>, Status> {
        let request = request.into_inner();
        if !request.model.is_empty() && request.model != self.0.config.model {
            return Err(Status::not_found("no such model"));
        }
        let Some(Input::TokenIds(prompt)) = request.input else {
            return Err(Status::unimplemented("token_ids only"));
        };
        let max_tokens = match request.stopping.map_or(0, |stopping| stopping.max_tokens) {
            0 => self.0.config.context_length,
            max_tokens => max_tokens,
        };
        let delay = self.0.config.prefill + self.0.faults.plan().delay_first_token;
        Ok(Response::new(DirectStream::new(
            Arc::clone(&self.0),
            &prompt.ids,
            max_tokens,
            Instant::now() + delay,
        )))
    }

    async fn resume(
        &self,
        _: Request<ResumeRequest>,
    ) -> Result<Response<Self::ResumeStream>, Status> {
        Err(Status::unimplemented("resume"))
    }

    async fn tokenize(
        &self,
        _: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        Err(Status::unimplemented("tokenize"))
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let model = Model {
            name: self.0.config.model.clone(),
            context_length: self.0.config.context_length,
            vocabulary_size: self.0.config.vocabulary.size(),
            reproducible: true,
            digest: self.0.config.model_digest.clone(),
            ready: true,
            ..Default::default()
        };
        Ok(Response::new(ListModelsResponse {
            models: vec![model],
        }))
    }
}

/// What comes next on a direct stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Accepted,
    /// The first token; what came before is on its way first.
    First,
    /// The token at this index, when its step ends.
    Token(u32),
    Finished,
    End,
}

/// One stream of the direct case.
pub(super) struct DirectStream {
    state: Arc<State>,
    seed: PromptSeed,
    prompt_tokens: u32,
    max_tokens: u32,
    next: Next,
    due: Instant,
    sleep: Pin<Box<Sleep>>,
    /// Ready when the others have had their turn since the last token.
    turn: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl DirectStream {
    pub(super) fn new(
        state: Arc<State>,
        prompt: &[u32],
        max_tokens: u32,
        first_due: Instant,
    ) -> Self {
        state.counters.direct_streams.add(1);
        state.counters.direct_requests.add(1);
        Self {
            seed: TokenFunction::seed(prompt),
            prompt_tokens: prompt.len() as u32,
            max_tokens,
            next: Next::Accepted,
            due: first_due,
            sleep: Box::pin(sleep_until(first_due)),
            turn: Box::pin(turn_of_others()),
            state,
        }
    }

    /// Waits for the end of the step in progress.
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.due <= Instant::now() {
            return Poll::Ready(());
        }
        if self.sleep.deadline() != self.due {
            let due = self.due;
            self.sleep.as_mut().reset(due);
        }
        self.sleep.as_mut().poll(cx)
    }

    fn token(&mut self, index: u32) -> Event {
        let step = self.state.config.step;
        self.due = if index == 0 {
            Instant::now() + step
        } else {
            self.due + step
        };
        self.state.counters.tokens.add(1);
        self.next = if index + 1 < self.max_tokens {
            Next::Token(index + 1)
        } else {
            Next::Finished
        };
        let id = self.state.tokens.at(self.seed, index);
        Event::Tokens(Tokens {
            first_index: index,
            ids: vec![id],
            text: self.state.tokens.vocabulary().text(id).to_owned(),
            logprobs: Vec::new(),
        })
    }

    fn accepted(&self) -> Event {
        Event::Accepted(Accepted {
            generation_id: format!("{:032x}", rand::random::<u128>()),
            seed: 0,
            prompt_tokens: self.prompt_tokens,
            max_tokens: self.max_tokens,
            model: self.state.config.model.clone(),
        })
    }

    fn finished(&self) -> Event {
        Event::Finished(Finished {
            reason: FinishReason::Length as i32,
            usage: Some(Usage {
                prompt_tokens: self.prompt_tokens,
                output_tokens: self.max_tokens,
                computed_tokens: self.prompt_tokens,
                attempts: 1,
                ..Default::default()
            }),
            ..Default::default()
        })
    }
}

impl Stream for DirectStream {
    type Item = Result<GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let event = match this.next {
            Next::Accepted => {
                this.next = Next::First;
                this.accepted()
            }
            Next::First => {
                std::task::ready!(this.poll_due(cx));
                this.token(0)
            }
            // Without a pause, too, a step is one token of every stream: the
            // others have their turn, and no two tokens are written together.
            Next::Token(index) => {
                if this.state.config.step.is_zero() {
                    std::task::ready!(this.turn.as_mut().poll(cx));
                    this.turn = Box::pin(turn_of_others());
                } else {
                    std::task::ready!(this.poll_due(cx));
                }
                this.token(index)
            }
            Next::Finished => {
                this.next = Next::End;
                this.finished()
            }
            Next::End => return Poll::Ready(None),
        };
        Poll::Ready(Some(Ok(GenerateResponse { event: Some(event) })))
    }
}

/// Ready when the other tasks of this thread, the connection's among them, had
/// their turn. Pending twice: after the first time the body's encoder gives out
/// what it has and is asked again at once.
async fn turn_of_others() {
    yield_now().await;
    yield_now().await;
}

impl Drop for DirectStream {
    fn drop(&mut self) {
        self.state.counters.direct_streams.sub(1);
    }
}
