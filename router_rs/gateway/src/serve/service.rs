//! From a path to who answers it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use kvmesh_registry::Status as EtcdStatus;
use tokio::sync::watch;

use super::{
    admin, body::ResponseBody, calls::CallEnd, grpc, health::Health, inference,
    reflection::Reflection,
};
use crate::{
    access::Access,
    door::{CallMetadata, Door},
    error::RequestError,
    mesh::{Mesh, text_of},
    telemetry::{Exposition, Spans, Step, Telemetry},
};

/// What is told of this router.
pub(crate) struct RouterFacts {
    pub(crate) router_id: String,
    pub(crate) incarnation: u64,
    pub(crate) cluster: String,
    pub(crate) started: Instant,
    pub(crate) etcd: Option<watch::Receiver<EtcdStatus>>,
}

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) mesh: Arc<Mesh>,
    pub(crate) access: Arc<Access>,
    pub(crate) door: Door,
    pub(crate) health: Health,
    pub(crate) reflection: Reflection,
    pub(crate) telemetry: Arc<Telemetry>,
    /// `None`: no collector is told.
    pub(crate) spans: Option<Spans>,
    pub(crate) exposition: Exposition,
    pub(crate) facts: RouterFacts,
}

/// One call and what it came over.
pub(crate) struct Call {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Incoming,
    pub(crate) metadata: CallMetadata,
    pub(crate) from: IpAddr,
    pub(crate) end: CallEnd,
}

impl Shared {
    /// Answers anything.
    pub(crate) async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: SocketAddr,
        end: CallEnd,
    ) -> Response<ResponseBody> {
        let arrived = Instant::now();
        let is_grpc = request
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
        if !is_grpc {
            return self.plain(request.method(), request.uri().path());
        }
        if request.uri().path().starts_with("/grpc.reflection.") {
            return self.reflection.answer(request).await;
        }
        let metadata = CallMetadata::read(request.headers(), arrived);
        let (parts, body) = request.into_parts();
        let mut call = Call {
            headers: parts.headers,
            body,
            metadata,
            from: peer.ip(),
            end,
        };
        if let Err(error) = call.metadata.read_deadline(&call.headers) {
            self.telemetry.rejected(Step::Validate, &error);
            return grpc::refusal(&error.to_status(), &call.metadata.headers());
        }
        self.grpc(parts.uri.path(), call).await
    }

    async fn grpc(self: Arc<Self>, path: &str, call: Call) -> Response<ResponseBody> {
        let metadata = call.metadata.headers();
        let request_id = call.metadata.request_id.clone();
        let deadline = call.metadata.deadline;
        let telemetry = Arc::clone(&self.telemetry);
        let Some((service, method)) = path.trim_start_matches('/').split_once('/') else {
            return unknown(path, &metadata);
        };
        let answer = async {
            #[cfg(test)]
            super::border_tests::panic_where_asked(&call.metadata.request_id, None);
            match service {
                "kvmesh.v1.Inference" => inference::call(&self, method, call).await,
                "kvmesh.v1.Admin" => admin::call(&self, method, call).await,
                "grpc.health.v1.Health" => inference::health(&self, method, call).await,
                _ => None,
            }
        };
        // The request's border: a bug of ours ends one call, with an id.
        let answer = std::panic::AssertUnwindSafe(answer).catch_unwind();
        let answer = match deadline {
            None => Ok(answer.await),
            Some(deadline) => tokio::time::timeout_at(deadline.into(), answer).await,
        };
        match answer {
            Ok(Ok(Some(response))) => response,
            Ok(Ok(None)) => unknown(path, &metadata),
            Ok(Err(panic)) => {
                let what = text_of(&*panic);
                tracing::error!(event = "panic", request_id, what, "a call panicked");
                let error = RequestError::Internal {
                    id: request_id,
                    next_index: 0,
                };
                telemetry.rejected(Step::Admission, &error);
                grpc::refusal(&error.to_status(), &metadata)
            }
            Err(_) => {
                let error = RequestError::DeadlineExceeded { next_index: 0 };
                telemetry.rejected(Step::Admission, &error);
                grpc::refusal(&error.to_status(), &metadata)
            }
        }
    }

    fn plain(&self, method: &Method, path: &str) -> Response<ResponseBody> {
        if method != Method::GET {
            return text(
                StatusCode::NOT_FOUND,
                "text/plain",
                "not found\n".to_owned(),
            );
        }
        let ok = |kind, body| text(StatusCode::OK, kind, body);
        match path {
            "/metrics" => ok(
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                self.exposition.text(),
            ),
            "/health" => ok("text/plain", "ok\n".to_owned()),
            "/version" => {
                let version = env!("CARGO_PKG_VERSION");
                ok(
                    "application/json",
                    format!("{{\"version\":\"{version}\"}}\n"),
                )
            }
            "/ready" if !self.health.serves() => text(
                StatusCode::SERVICE_UNAVAILABLE,
                "text/plain",
                "draining\n".to_owned(),
            ),
            "/ready" => match self.mesh.models().iter().any(|model| model.ready) {
                true => ok("text/plain", "ready\n".to_owned()),
                false => {
                    let why = "no model can be asked for now\n".to_owned();
                    text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", why)
                }
            },
            _ => text(
                StatusCode::NOT_FOUND,
                "text/plain",
                "not found\n".to_owned(),
            ),
        }
    }
}

fn unknown(path: &str, metadata: &HeaderMap) -> Response<ResponseBody> {
    grpc::refusal(&RequestError::unsupported(path).to_status(), metadata)
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::bytes(Bytes::from(body), None));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
