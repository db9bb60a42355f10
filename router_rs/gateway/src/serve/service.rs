//! From a path to who answers it.

use std::{
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use http::{HeaderMap, Request, Response, header};
use hyper::body::Incoming;
use kvmesh_registry::Status as EtcdStatus;
use tokio::sync::watch;

use super::{
    admin, body::ResponseBody, calls::CallEnd, grpc, health::Health, inference, plain, port::Port,
    reflection::Reflection,
};
use crate::{
    access::{Access, Caller, Visit},
    door::{CallMetadata, Door, Refused},
    error::RequestError,
    mesh::{Mesh, text_of},
    settings::ParserSettings,
    telemetry::{Exposition, RequestSpan, Share, Spans, Step, Telemetry, goes_on_below},
    vllm::{self, Vllm},
};

/// Calls that open a generation, or go on with one.
pub(super) const GENERATE: &str = "Generate";
pub(super) const RESUME: &str = "Resume";

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
    /// A stream of events says that it lives after so long without one.
    pub(crate) sse_keep_alive: Duration,
    /// What is looked for in outputs.
    pub(crate) parsers: ParserSettings,
    /// What vLLM's services keep between calls.
    pub(crate) vllm: Vllm,
}

/// One call and what it came over.
pub(crate) struct Call {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Incoming,
    pub(crate) metadata: CallMetadata,
    pub(crate) from: IpAddr,
    pub(crate) port: Port,
    pub(crate) end: CallEnd,
}

impl Shared {
    /// Answers anything.
    pub(crate) async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        (peer, port): (SocketAddr, Port),
        end: CallEnd,
    ) -> Response<ResponseBody> {
        let arrived = Instant::now();
        let is_grpc = request
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
        if !is_grpc {
            return plain::answer(&self, request, (peer, port), end).await;
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
            port,
            end,
        };
        if let Err(error) = call.metadata.read_deadline(&call.headers) {
            self.telemetry.rejected(Step::Validate, &error);
            return grpc::refusal(&error.to_status(), &call.metadata.headers());
        }
        self.grpc(parts.uri.path(), call).await
    }

    /// Whose a call is.
    pub(crate) fn caller(&self, call: &Call) -> Result<Caller, Refused> {
        let caller = self.access.caller(&call.headers, call.from);
        caller.map_err(|error| (Step::Access, error))
    }

    /// Whose a call is, and its place among that tenant's requests.
    pub(crate) fn enter(&self, call: &Call) -> Result<(Caller, Visit), Refused> {
        let caller = self.caller(call)?;
        let visit = self.visit(&caller, &call.metadata)?;
        Ok((caller, visit))
    }

    /// A call for a generation that begins, with its span where spans are exported.
    pub(crate) fn begin(&self, mut call: Call) -> (Call, Option<RequestSpan>) {
        let spans = self.spans.as_ref();
        let span = spans.and_then(|spans| spans.begin(&mut call.metadata, GENERATE, false));
        (call, span)
    }

    /// The same of a call of Resume.
    pub(super) fn begin_resume(&self, mut call: Call) -> (Call, Option<RequestSpan>) {
        let spans = self.spans.as_ref();
        let span = spans.and_then(|spans| spans.begin(&mut call.metadata, RESUME, true));
        (call, span)
    }

    /// Which traces are exported; `None`: none.
    pub(super) fn share(&self) -> Option<Share> {
        self.spans.as_ref().map(Spans::share)
    }

    /// A call goes on with a request whose span is `of`: it is part of that one's trace, or
    /// linked to it where its client gave it another one. Whether its trace changed.
    pub(super) fn goes_on(
        &self,
        of: &str,
        call: &mut CallMetadata,
        span: Option<&mut RequestSpan>,
    ) -> bool {
        if call.has_parent {
            if let Some(span) = span {
                span.links(of);
            }
            return false;
        }
        let Some((traceparent, exported)) = goes_on_below(of, &call.traceparent, self.share())
        else {
            return false;
        };
        if let Some(span) = span {
            span.goes_on_below(of, call, exported);
        }
        (call.traceparent, call.traced) = (traceparent, exported);
        true
    }

    /// A call's place among its tenant's requests.
    pub(super) fn visit(&self, caller: &Caller, call: &CallMetadata) -> Result<Visit, Refused> {
        let visit = self.access.enter(caller, call.arrived);
        visit.map_err(|error| (Step::Tenant, error))
    }

    /// Counts a call that was refused.
    pub(crate) fn refused(&self, method: &'static str, (step, error): &Refused) {
        self.telemetry.rejected(*step, error);
        self.telemetry.ended(method, Some(error));
    }

    /// Counts and tells of a request that was refused before it became a generation.
    pub(crate) fn turned_away(
        &self,
        method: &'static str,
        request_id: &str,
        span: Option<RequestSpan>,
        refused: &Refused,
    ) {
        let (step, error) = refused;
        self.refused(method, refused);
        if let Some(span) = span {
            span.refused(*step, error);
        }
        tracing::debug!(event = "refused", request_id, %error);
    }

    /// Runs a call to its answer. The request's border: a bug of ours ends one
    /// call, with an id.
    ///
    /// Such futures are large, and each function that takes one by value has room for it twice
    /// and copies it: so it is told where it lies.
    pub(super) async fn bordered<R>(
        &self,
        request_id: &str,
        deadline: Option<Instant>,
        answer: Pin<&mut impl Future<Output = R>>,
    ) -> Result<R, RequestError> {
        let answer = std::panic::AssertUnwindSafe(answer).catch_unwind();
        let answer = match deadline {
            None => Ok(answer.await),
            Some(deadline) => tokio::time::timeout_at(deadline.into(), answer).await,
        };
        let error = match answer {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(panic)) => {
                let what = text_of(&*panic);
                tracing::error!(event = "panic", request_id, what, "a call panicked");
                RequestError::Internal {
                    id: request_id.to_owned(),
                    next_index: 0,
                }
            }
            Err(_) => RequestError::DeadlineExceeded { next_index: 0 },
        };
        self.telemetry.rejected(Step::Admission, &error);
        Err(error)
    }

    async fn grpc(self: Arc<Self>, path: &str, call: Call) -> Response<ResponseBody> {
        let metadata = call.metadata.headers();
        let request_id = call.metadata.request_id.clone();
        let deadline = call.metadata.deadline;
        let Some((service, method)) = path.trim_start_matches('/').split_once('/') else {
            return unknown(path, &metadata);
        };
        let answer = async {
            #[cfg(test)]
            super::border_tests::panic_where_asked(&call.metadata.request_id, None);
            // Each is apart: a call has the room that its own service takes, and not what the
            // largest of them does.
            match service {
                "kvmesh.v1.Admin" => Box::pin(admin::call(&self, method, call)).await,
                "grpc.health.v1.Health" => Box::pin(inference::health(&self, method, call)).await,
                // The operators' port answers no client.
                _ if call.port != Port::Clients => None,
                "kvmesh.v1.Inference" => Box::pin(inference::call(&self, method, call)).await,
                vllm::ENGINE => Box::pin(vllm::engine(&self, method, call)).await,
                vllm::INFERENCE => Box::pin(vllm::inference(&self, method, call)).await,
                vllm::CONTROL => Box::pin(vllm::control(&self, method, call)).await,
                _ => None,
            }
        };
        match self.bordered(&request_id, deadline, pin!(answer)).await {
            Ok(Some(response)) => response,
            Ok(None) => unknown(path, &metadata),
            Err(error) => grpc::refusal(&error.to_status(), &metadata),
        }
    }
}

fn unknown(path: &str, metadata: &HeaderMap) -> Response<ResponseBody> {
    grpc::refusal(&RequestError::unsupported(path).to_status(), metadata)
}
