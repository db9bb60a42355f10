//! Calls by their paths, as any client makes them.

use kvmesh_wire::{
    v1,
    vllm::grpc::engine::{
        GenerateComplete, GenerateRequest, GenerateResponse, GenerateStreamChunk, SamplingParams,
        TokenizedInput, generate_request::Input, generate_response::Response as Part,
    },
};
use prost::Message;
use tonic::{Request, Status, Streaming, client::Grpc, transport::Channel};
use tonic_prost::ProstCodec;

use crate::common::Mesh;

pub(crate) const GENERATE: &str = "/vllm.grpc.engine.VllmEngine/Generate";
pub(crate) const ABORT: &str = "/vllm.grpc.engine.VllmEngine/Abort";
pub(crate) const PROMPT: [u32; 3] = [5, 6, 7];

async fn ready(mesh: &Mesh) -> Grpc<Channel> {
    let mut grpc = Grpc::new(mesh.channel().await);
    grpc.ready().await.unwrap();
    grpc
}

/// A call with one answer.
pub(crate) async fn unary<Q, A>(
    mesh: &Mesh,
    path: &'static str,
    call: impl tonic::IntoRequest<Q>,
) -> Result<A, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let codec = ProstCodec::<Q, A>::default();
    let path = http::uri::PathAndQuery::from_static(path);
    let mut grpc = ready(mesh).await;
    let answer = grpc.unary(call.into_request(), path, codec).await;
    answer.map(tonic::Response::into_inner)
}

/// A call with many.
pub(crate) async fn streamed<Q, A>(
    mesh: &Mesh,
    path: &'static str,
    call: impl tonic::IntoRequest<Q>,
) -> Result<Streaming<A>, Status>
where
    Q: Message + 'static,
    A: Message + Default + 'static,
{
    let codec = ProstCodec::<Q, A>::default();
    let path = http::uri::PathAndQuery::from_static(path);
    let mut grpc = ready(mesh).await;
    let answer = grpc
        .server_streaming(call.into_request(), path, codec)
        .await;
    answer.map(tonic::Response::into_inner)
}

/// A call with metadata.
pub(crate) fn with<T>(message: T, name: &'static str, value: &str) -> Request<T> {
    let mut call = Request::new(message);
    call.metadata_mut().insert(name, value.parse().unwrap());
    call
}

/// A request of token ids.
pub(crate) fn asked(max_tokens: u32, stream: bool) -> GenerateRequest {
    GenerateRequest {
        request_id: "mine".to_owned(),
        input: Some(Input::Tokenized(TokenizedInput {
            original_text: String::new(),
            input_ids: PROMPT.to_vec(),
        })),
        sampling_params: Some(SamplingParams {
            max_tokens: Some(max_tokens),
            ..SamplingParams::default()
        }),
        stream,
        ..GenerateRequest::default()
    }
}

/// A request with other parameters.
pub(crate) fn params(
    mut request: GenerateRequest,
    change: impl FnOnce(&mut SamplingParams),
) -> GenerateRequest {
    change(request.sampling_params.get_or_insert_default());
    request
}

/// The parts of an answer of `VllmEngine`.
pub(crate) type Parts = (Vec<GenerateStreamChunk>, Vec<GenerateComplete>);

/// Reads an answer to its end.
pub(crate) async fn read(mut stream: Streaming<GenerateResponse>) -> Result<Parts, Status> {
    let (mut chunks, mut ends) = (Vec::new(), Vec::new());
    while let Some(message) = stream.message().await? {
        match message.response.unwrap() {
            Part::Chunk(chunk) => chunks.push(chunk),
            Part::Complete(end) => ends.push(end),
        }
    }
    Ok((chunks, ends))
}

/// Asks `VllmEngine`, and reads what it answers.
pub(crate) async fn generate(
    mesh: &Mesh,
    call: impl tonic::IntoRequest<GenerateRequest>,
) -> Result<Parts, Status> {
    read(streamed(mesh, GENERATE, call).await?).await
}

/// The token ids of one answer, in the order in which they came.
pub(crate) fn ids(chunks: &[GenerateStreamChunk], index: u32) -> Vec<u32> {
    let own = chunks.iter().filter(|chunk| chunk.index == index);
    own.flat_map(|chunk| chunk.token_ids.clone()).collect()
}

/// Nothing of any request is left.
pub(crate) async fn all_gone(mesh: &Mesh) {
    for series in [
        "kvmesh_open_streams",
        "kvmesh_open_attempts",
        "kvmesh_undelivered_ids",
        "kvmesh_bookings",
    ] {
        mesh.wait_figure(series, 0).await;
    }
}

/// The token ids that our own API makes of a text.
pub(crate) async fn tokenized(mesh: &Mesh, prompt: &str) -> Vec<u32> {
    let request = v1::TokenizeRequest {
        model: String::new(),
        input: Some(v1::tokenize_request::Input::Prompt(prompt.to_owned())),
    };
    let answer = mesh.client().await.tokenize(request).await.unwrap();
    answer.into_inner().ids
}
