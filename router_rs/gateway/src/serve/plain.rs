//! Plain HTTP, HTTP/1.1 or HTTP/2: what operators look at, and the OpenAI face.

use std::{net::SocketAddr, pin::pin, sync::Arc, time::Instant};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;

use super::{
    body::ResponseBody,
    calls::CallEnd,
    port::Port,
    service::{Call, Shared},
};
use crate::{
    door::CallMetadata,
    openai::{self, Endpoint, Failure},
    telemetry::Step,
};

/// Who answers a path.
enum Place {
    Metrics,
    Health,
    Ready,
    Version,
    OpenAi(Endpoint),
}

impl Place {
    fn at(path: &str) -> Option<Self> {
        Some(match path {
            "/metrics" => Self::Metrics,
            "/health" => Self::Health,
            "/ready" => Self::Ready,
            "/version" => Self::Version,
            path => Self::OpenAi(Endpoint::at(path)?),
        })
    }

    /// What tells of workers is apart where operators' port is.
    fn is_at(&self, port: Port, admin_is_apart: bool) -> bool {
        match self {
            Self::Metrics => port == Port::Admin || !admin_is_apart,
            Self::OpenAi(_) => port == Port::Clients,
            Self::Health | Self::Ready | Self::Version => true,
        }
    }

    fn method(&self) -> Method {
        match self {
            Self::OpenAi(endpoint) => endpoint.method(),
            _ => Method::GET,
        }
    }
}

/// Answers a call that is no gRPC.
pub(super) async fn answer(
    shared: &Arc<Shared>,
    request: Request<Incoming>,
    (peer, port): (SocketAddr, Port),
    end: CallEnd,
) -> Response<ResponseBody> {
    let metadata = CallMetadata::read(request.headers(), Instant::now());
    let back = metadata.headers();
    let path = request.uri().path();
    let here = |place: &Place| place.is_at(port, shared.access.admin_is_apart());
    let Some(place) = Place::at(path).filter(here) else {
        return Failure::NoSuchPath(path.to_owned()).response(&back);
    };
    if request.method() != place.method() {
        return Failure::Method(place.method()).response(&back);
    }
    match place {
        Place::Metrics => {
            if port == Port::Admin
                && let Err(error) = shared.access.operator(request.headers(), peer.ip(), port)
            {
                shared.telemetry.rejected(Step::Access, &error);
                return Failure::Request(error).response(&back);
            }
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            text(StatusCode::OK, kind, shared.exposition.text())
        }
        Place::Health => text(StatusCode::OK, "text/plain", "ok\n".to_owned()),
        Place::Ready => ready(shared),
        Place::Version => {
            let version = env!("CARGO_PKG_VERSION");
            let body = format!("{{\"version\":\"{version}\"}}\n");
            text(StatusCode::OK, "application/json", body)
        }
        Place::OpenAi(endpoint) => {
            let request_id = metadata.request_id.clone();
            let (parts, body) = request.into_parts();
            let call = Call {
                headers: parts.headers,
                body,
                metadata,
                from: peer.ip(),
                port,
                end,
            };
            let answer = async {
                #[cfg(test)]
                super::border_tests::panic_where_asked(&call.metadata.request_id, None);
                openai::answer(shared, endpoint, call).await
            };
            let answered = shared.bordered(&request_id, None, pin!(answer)).await;
            answered.unwrap_or_else(|error| Failure::Request(error).response(&back))
        }
    }
}

fn ready(shared: &Shared) -> Response<ResponseBody> {
    let plain = |status, said: &str| text(status, "text/plain", format!("{said}\n"));
    if !shared.health.serves() {
        return plain(StatusCode::SERVICE_UNAVAILABLE, "draining");
    }
    match shared.mesh.models().iter().any(|model| model.ready) {
        true => plain(StatusCode::OK, "ready"),
        false => {
            let why = "no model can be asked for now";
            plain(StatusCode::SERVICE_UNAVAILABLE, why)
        }
    }
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::bytes(Bytes::from(body), None));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
