//! The OpenAI face: HTTP and JSON in front of the door that gRPC comes
//! through.
//!
//! ```text
//! request:  fields (what a body says) ─▶ ask (the requests that gRPC would send) ─▶ door
//! answer:   chunk ◀─ events (server-sent events)  ◀─┐
//!                    whole (one JSON object)      ◀─┴─ parsed ◀─ serve::Generation
//! ```
//!
//! Nothing behind the door knows of it. What each field does is in
//! docs/openai.md; formats are those of OpenAI's API reference, and of vLLM's
//! server where that has more.

mod answer;
mod ask;
mod chunk;
mod error;
mod events;
mod fields;
mod generate;
mod logprobs;
mod message;
mod models;
mod parsed;
mod prompt;
mod refused;
mod schema;
mod terms;
mod tokens;
mod tools;
mod whole;

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use serde::Serialize;

pub(crate) use error::Failure;
pub(crate) use events::Events;

use crate::{
    door::Refused,
    error::RequestError,
    serve::{Call, Shared, body::ResponseBody},
    telemetry::Step,
};

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The two ways to ask for text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Face {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
}

/// What a path of this face answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Generate(Face),
    Embeddings,
    Models,
    /// One model, by its name as the path has it.
    Model(String),
    Tokenize,
    Detokenize,
}

impl Endpoint {
    /// Who answers a path.
    pub(crate) fn at(path: &str) -> Option<Self> {
        Some(match path {
            "/v1/chat/completions" => Self::Generate(Face::Chat),
            "/v1/completions" => Self::Generate(Face::Completion),
            "/v1/embeddings" => Self::Embeddings,
            "/v1/models" => Self::Models,
            "/tokenize" => Self::Tokenize,
            "/detokenize" => Self::Detokenize,
            path => match path.strip_prefix("/v1/models/")? {
                "" => return None,
                name => Self::Model(name.to_owned()),
            },
        })
    }

    /// How it is asked.
    pub(crate) fn method(&self) -> Method {
        match self {
            Self::Models | Self::Model(_) => Method::GET,
            _ => Method::POST,
        }
    }

    /// Its name in figures.
    fn name(&self) -> &'static str {
        match self {
            Self::Generate(Face::Chat) => "chat.completions",
            Self::Generate(Face::Completion) => "completions",
            Self::Embeddings => "embeddings",
            Self::Models | Self::Model(_) => "models",
            Self::Tokenize => "tokenize",
            Self::Detokenize => "detokenize",
        }
    }
}

/// Answers a call of this face.
pub(crate) async fn answer(
    shared: &Arc<Shared>,
    endpoint: Endpoint,
    call: Call,
) -> Response<ResponseBody> {
    let name = endpoint.name();
    match endpoint {
        // Apart, as the services of gRPC are: it takes far more room than all else here.
        Endpoint::Generate(face) => Box::pin(generate::answer(shared, call, (face, name))).await,
        Endpoint::Embeddings => {
            let back = call.metadata.headers();
            let refused = shared.caller(&call).err();
            let error = refused.map_or(Failure::NoEmbeddings, |(step, error)| {
                shared.telemetry.rejected(step, &error);
                Failure::Request(error)
            });
            error.response(&back)
        }
        Endpoint::Models => told(shared, name, &call.metadata.headers(), {
            shared.caller(&call).map(|_| models::list(shared))
        }),
        Endpoint::Model(model) => told(shared, name, &call.metadata.headers(), {
            let found = |_| models::one(shared, &model).map_err(|error| (Step::Validate, error));
            shared.caller(&call).and_then(found)
        }),
        Endpoint::Tokenize => {
            let back = call.metadata.headers();
            told(shared, name, &back, tokens::tokenize(shared, call).await)
        }
        Endpoint::Detokenize => {
            let back = call.metadata.headers();
            told(shared, name, &back, tokens::detokenize(shared, call).await)
        }
    }
}

/// An answer that is one JSON object.
fn told(
    shared: &Shared,
    name: &'static str,
    back: &HeaderMap,
    made: Result<impl Serialize, Refused>,
) -> Response<ResponseBody> {
    match made {
        Ok(object) => {
            shared.telemetry.ended(name, None);
            json(&object, back)
        }
        Err(refused) => {
            shared.refused(name, &refused);
            Failure::Request(refused.1).response(back)
        }
    }
}

fn json(object: &impl Serialize, back: &HeaderMap) -> Response<ResponseBody> {
    match serde_json::to_vec(object) {
        Ok(bytes) => response(StatusCode::OK, JSON, bytes.into(), back),
        Err(error) => {
            // Text, numbers and lists: there is nothing in it that JSON lacks.
            tracing::error!(event = "bug", %error, "an answer is no JSON");
            let error = RequestError::Internal {
                id: String::new(),
                next_index: 0,
            };
            Failure::Request(error).response(back)
        }
    }
}

fn response(
    status: StatusCode,
    kind: HeaderValue,
    body: Bytes,
    back: &HeaderMap,
) -> Response<ResponseBody> {
    with_headers(status, kind, ResponseBody::bytes(body, None), back)
}

fn with_headers(
    status: StatusCode,
    kind: HeaderValue,
    body: ResponseBody,
    back: &HeaderMap,
) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = back.clone();
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
