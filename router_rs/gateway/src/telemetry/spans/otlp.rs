//! A request's spans as OTLP has them. Names are those of OpenTelemetry's conventions
//! for RPC and for GenAI; what they have no name for is `kvmesh.*`. No text, no token
//! id, no salt and no key is in any of them.

use std::time::{Duration, SystemTime};

use kvmesh_wire::v1;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, ArrayValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1::{
        ResourceSpans, ScopeSpans, Span, Status,
        span::{Event, Link, SpanKind},
        status::StatusCode,
    },
};
use tonic::Code;

use super::{
    context::{Context, span_id},
    request::Ended,
};
use crate::mesh::Traced;

/// Longest cause that is taken over from a worker, in characters.
const CAUSE_CHARS: usize = 200;

/// Who tells.
pub(super) fn resource(router_id: &str, cluster: &str) -> Resource {
    Resource {
        attributes: vec![
            text("service.name", "kvmesh-router"),
            text("service.namespace", cluster),
            text("service.instance.id", router_id),
            text("service.version", env!("CARGO_PKG_VERSION")),
        ],
        ..Resource::default()
    }
}

/// A batch as one message.
pub(super) fn request(resource: Resource, spans: Vec<Span>) -> ExportTraceServiceRequest {
    let scope = InstrumentationScope {
        name: "kvmesh.gateway".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let scope_spans = ScopeSpans {
        scope: Some(scope),
        spans,
        ..ScopeSpans::default()
    };
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource),
            scope_spans: vec![scope_spans],
            ..ResourceSpans::default()
        }],
    }
}

/// The spans of one request: its own, and one a row of its trace below it.
pub(super) fn spans(ended: &Ended, into: &mut Vec<Span>) {
    let (context, clock) = (ended.context, Clock(ended.began.map_or(0, nanos)));
    into.push(own(ended, context, clock));
    let Some(traced) = &ended.traced else {
        return;
    };
    let children = traced.rows.iter().map(|row| child(row, context, clock));
    into.extend(children);
    let timings = &traced.timings;
    if traced.has_gap() {
        let gap = v1::TraceSpan {
            name: "longest_gap".to_owned(),
            start_ms: timings.longest_gap_start_ms,
            duration_ms: timings.longest_gap_ms,
            cause: timings.longest_gap_cause.clone(),
            ..v1::TraceSpan::default()
        };
        into.push(child(&gap, context, clock));
    }
}

fn own(ended: &Ended, context: Context, clock: Clock) -> Span {
    let mut attributes = vec![
        text("gen_ai.provider.name", "kvmesh"),
        text("kvmesh.request_id", &ended.request_id),
    ];
    let (name, kind) = match ended.is_answer {
        true => ("answer".to_owned(), SpanKind::Internal),
        false => {
            let name = format!("kvmesh.v1.Inference/{}", ended.method);
            (name, SpanKind::Server)
        }
    };
    if !ended.is_answer {
        attributes.extend([
            text("rpc.system", "grpc"),
            text("rpc.service", "kvmesh.v1.Inference"),
            text("rpc.method", ended.method),
            int("rpc.grpc.status_code", ended.code),
        ]);
    }
    attributes.extend((ended.answers > 0).then(|| int("kvmesh.answers", ended.answers)));
    let reason = ended.reason.map(|reason| text("error.type", reason));
    let step = ended.refused_at.map(|at| text("kvmesh.refused_at", at));
    attributes.extend(reason.into_iter().chain(step));
    let finish = match ended.finish {
        v1::FinishReason::Stop => Some("stop"),
        v1::FinishReason::Length => Some("length"),
        v1::FinishReason::Unspecified => None,
    };
    attributes.extend(finish.map(|reason| texts("gen_ai.response.finish_reasons", reason)));
    let mut events = Vec::new();
    if let Some(traced) = &ended.traced {
        of_generation(traced, &mut attributes);
        let first_token_ms = traced.timings.first_token_ms;
        events.extend((first_token_ms > 0.0).then(|| Event {
            name: "first_token".to_owned(),
            time_unix_nano: clock.at(first_token_ms),
            ..Event::default()
        }));
    }
    Span {
        trace_id: context.trace.to_be_bytes().to_vec(),
        span_id: context.own.to_be_bytes().to_vec(),
        parent_span_id: match context.parent {
            0 => Vec::new(),
            parent => parent.to_be_bytes().to_vec(),
        },
        trace_state: ended.tracestate.clone(),
        name,
        kind: kind.into(),
        start_time_unix_nano: clock.0,
        end_time_unix_nano: clock.at(ended.took_ms),
        attributes,
        events,
        links: ended.link.into_iter().map(link).collect(),
        status: status(ended),
        ..Span::default()
    }
}

/// To the span of a request that a call went on with.
fn link(of: Context) -> Link {
    Link {
        trace_id: of.trace.to_be_bytes().to_vec(),
        span_id: of.parent.to_be_bytes().to_vec(),
        ..Link::default()
    }
}

/// What is told of a generation: counts, and names that its operator gave.
fn of_generation(traced: &Traced, attributes: &mut Vec<KeyValue>) {
    let operation = match traced.chat {
        true => "chat",
        false => "text_completion",
    };
    let (usage, timings) = (&traced.usage, &traced.timings);
    attributes.extend([
        text("gen_ai.operation.name", operation),
        text("gen_ai.request.model", &traced.model),
        int("gen_ai.request.max_tokens", traced.max_tokens),
        text("gen_ai.response.id", &traced.generation),
        text("gen_ai.response.model", &traced.model),
        int("gen_ai.usage.input_tokens", usage.prompt_tokens),
        int("gen_ai.usage.output_tokens", usage.output_tokens),
        int("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens),
        text("kvmesh.class", traced.class),
        int("kvmesh.attempts", usage.attempts),
        int("kvmesh.pulled_tokens", usage.pulled_tokens),
        int("kvmesh.computed_tokens", usage.computed_tokens),
        int("kvmesh.recomputed_tokens", usage.recomputed_tokens),
        int(
            "kvmesh.transferred_bytes",
            i64::try_from(timings.transferred_bytes).unwrap_or(i64::MAX),
        ),
    ]);
    if !traced.decode_worker.is_empty() {
        attributes.push(text("kvmesh.decode_worker", &traced.decode_worker));
    }
}

fn child(row: &v1::TraceSpan, context: Context, clock: Clock) -> Span {
    let mut attributes = Vec::new();
    if row.attempt > 0 {
        attributes.push(int("kvmesh.attempt", row.attempt));
    }
    if row.tokens > 0 {
        attributes.push(int("kvmesh.tokens", row.tokens));
    }
    if !row.cause.is_empty() {
        let cause: String = row.cause.chars().take(CAUSE_CHARS).collect();
        attributes.push(text("kvmesh.cause", cause));
    }
    let start = clock.at(row.start_ms);
    Span {
        trace_id: context.trace.to_be_bytes().to_vec(),
        span_id: span_id().to_be_bytes().to_vec(),
        parent_span_id: context.own.to_be_bytes().to_vec(),
        name: row.name.chars().take(CAUSE_CHARS).collect(),
        kind: SpanKind::Internal.into(),
        start_time_unix_nano: start,
        end_time_unix_nano: Clock(start).at(row.duration_ms),
        attributes,
        ..Span::default()
    }
}

/// The conventions for gRPC: at a server an error is what the server is to blame for.
fn status(ended: &Ended) -> Option<Status> {
    let to_blame = match Code::from_i32(ended.code) {
        Code::Unknown
        | Code::DeadlineExceeded
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => true,
        Code::Ok
        | Code::Cancelled
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unauthenticated => false,
    };
    to_blame.then(|| Status {
        code: StatusCode::Error.into(),
        message: ended.reason.unwrap_or_default().to_owned(),
    })
}

/// A moment from which a request's milliseconds count, in ns since 1970.
#[derive(Clone, Copy)]
struct Clock(u64);

impl Clock {
    /// Workers' numbers may be anything: what is no time is the moment itself.
    fn at(self, ms: f64) -> u64 {
        let after = Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default();
        self.0
            .saturating_add(u64::try_from(after.as_nanos()).unwrap_or(0))
    }
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    let nanos = since.unwrap_or_default().as_nanos();
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

fn attribute(key: &'static str, value: Value) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}

fn text(key: &'static str, value: impl Into<String>) -> KeyValue {
    attribute(key, Value::StringValue(value.into()))
}

fn texts(key: &'static str, value: &str) -> KeyValue {
    let one = AnyValue {
        value: Some(Value::StringValue(value.to_owned())),
    };
    attribute(key, Value::ArrayValue(ArrayValue { values: vec![one] }))
}

fn int(key: &'static str, value: impl Into<i64>) -> KeyValue {
    attribute(key, Value::IntValue(value.into()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ended(code: Code) -> Ended {
        let given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        Ended {
            context: Context::of(given, true).unwrap(),
            began: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000)),
            took_ms: 5.0,
            code: code.into(),
            reason: (code != Code::Ok).then_some("A_REASON"),
            ..Ended::default()
        }
    }

    #[test]
    fn a_workers_numbers_never_make_a_span_that_ends_before_it_begins() {
        let row = |start_ms, duration_ms| v1::TraceSpan {
            start_ms,
            duration_ms,
            ..v1::TraceSpan::default()
        };
        let rows = vec![
            row(1.5, 2.0),
            row(f64::NAN, f64::INFINITY),
            row(-3.0, -1.0),
            row(f64::MAX, 1e300),
        ];
        let mut told = Vec::new();
        let traced = Traced {
            rows,
            ..Traced::default()
        };
        spans(
            &Ended {
                traced: Some(traced),
                ..ended(Code::Ok)
            },
            &mut told,
        );
        let begin = 1_000 * 1_000_000_000;
        let times: Vec<_> = told
            .iter()
            .map(|span| (span.start_time_unix_nano, span.end_time_unix_nano))
            .collect();
        assert_eq!(times[0], (begin, begin + 5_000_000));
        assert_eq!(times[1], (begin + 1_500_000, begin + 3_500_000));
        assert!(times[2..].iter().all(|&time| time == (begin, begin)));
    }

    #[test]
    fn only_what_the_server_is_to_blame_for_is_an_error_of_its_span() {
        for (code, error) in [
            (Code::Ok, false),
            (Code::Cancelled, false),
            (Code::InvalidArgument, false),
            (Code::Unavailable, true),
            (Code::Internal, true),
        ] {
            let mut told = Vec::new();
            spans(&ended(code), &mut told);
            assert_eq!(told.len(), 1);
            assert_eq!(told[0].status.is_some(), error, "{code:?}");
            let kinds = told[0].attributes.iter();
            let named = kinds.filter(|attribute| attribute.key == "error.type");
            assert_eq!(named.count(), usize::from(code != Code::Ok));
        }
    }
}
