//! The span of one request, from its arrival to its end.

use std::{
    sync::{Arc, OnceLock},
    time::{Instant, SystemTime},
};

use kvmesh_wire::v1;
use tonic::Code;

use super::{
    context::{Context, below_span},
    queue::Queue,
};
use crate::{
    door::CallMetadata,
    error::RequestError,
    mesh::Traced,
    telemetry::{Step, reason_label},
};

/// A request whose spans are exported once it has ended, however it ends.
pub(crate) struct RequestSpan {
    queue: Arc<Queue>,
    arrived: Instant,
    deadline: Option<Instant>,
    /// Else it is told only where it comes to be of another trace.
    exported: bool,
    ended: Option<Ended>,
    /// The call that it is an answer of, where that has several.
    call: Option<Arc<SeveralAnswers>>,
}

/// A call with several answers: its span ends with the last of theirs.
struct SeveralAnswers {
    span: RequestSpan,
    /// How the first answer that failed did.
    failed: OnceLock<(Code, Option<&'static str>)>,
}

impl Drop for SeveralAnswers {
    fn drop(&mut self) {
        let (code, reason) = self.failed.get().copied().unwrap_or((Code::Ok, None));
        self.span.end(code, reason, None);
    }
}

/// What is told of a request that ended.
#[derive(Debug, Default)]
pub(super) struct Ended {
    pub(super) context: Context,
    /// The call.
    pub(super) method: &'static str,
    /// A request of another trace that it went on with.
    pub(super) link: Option<Context>,
    /// The client's, of the trace.
    pub(super) tracestate: String,
    pub(super) request_id: String,
    /// When it arrived.
    pub(super) began: Option<SystemTime>,
    /// From there to its end.
    pub(super) took_ms: f64,
    /// How it ended; 0 is well.
    pub(super) code: i32,
    /// The reason where it did not end well: one of docs/protocols.md.
    pub(super) reason: Option<&'static str>,
    /// The step at the door that refused it.
    pub(super) refused_at: Option<&'static str>,
    pub(super) finish: v1::FinishReason,
    /// Its generation, where it got as far.
    pub(super) traced: Option<Traced>,
    /// Answers below it, where they have spans of their own.
    pub(super) answers: u32,
    /// It is such an answer, and no request.
    pub(super) is_answer: bool,
}

impl Ended {
    /// Spans that it makes.
    pub(super) fn spans(&self) -> usize {
        let below = |traced: &Traced| traced.rows.len() + usize::from(traced.has_gap());
        1 + self.traced.as_ref().map_or(0, below)
    }
}

impl RequestSpan {
    pub(super) fn new(
        queue: Arc<Queue>,
        (context, exported): (Context, bool),
        call: &CallMetadata,
        method: &'static str,
    ) -> Self {
        let began = SystemTime::now().checked_sub(call.arrived.elapsed());
        Self {
            queue,
            arrived: call.arrived,
            deadline: call.deadline,
            exported,
            ended: Some(Ended {
                context,
                method,
                tracestate: call.tracestate.clone(),
                request_id: call.request_id.clone(),
                began,
                ..Ended::default()
            }),
            call: None,
        }
    }

    /// A span for each of its answers. Where there are several, they are below this one.
    pub(crate) fn answers(mut self, count: usize) -> Vec<Self> {
        let Some(ended) = self.ended.as_mut().filter(|_| count > 1) else {
            return vec![self];
        };
        ended.answers = u32::try_from(count).unwrap_or(u32::MAX);
        let (context, began) = (ended.context, ended.began);
        let (tracestate, request_id) = (ended.tracestate.clone(), ended.request_id.clone());
        let (queue, arrived, deadline) = (Arc::clone(&self.queue), self.arrived, self.deadline);
        let (method, exported) = (ended.method, self.exported);
        let call = Arc::new(SeveralAnswers {
            span: self,
            failed: OnceLock::new(),
        });
        let answer = || Self {
            queue: Arc::clone(&queue),
            arrived,
            deadline,
            exported,
            ended: Some(Ended {
                context: context.below(),
                method,
                tracestate: tracestate.clone(),
                request_id: request_id.clone(),
                began,
                is_answer: true,
                ..Ended::default()
            }),
            call: Some(Arc::clone(&call)),
        };
        std::iter::repeat_with(answer).take(count).collect()
    }

    /// It goes on with a request whose span is `of`, in that one's trace.
    pub(crate) fn goes_on_below(&mut self, of: &str, call: &CallMetadata, exported: bool) {
        let context = below_span(of, &call.traceparent);
        if let (Some(ended), Some(context)) = (&mut self.ended, context) {
            ended.context = context;
            self.exported = exported;
        }
    }

    /// It goes on with a request whose span is `of`, in the trace that its client gave.
    pub(crate) fn links(&mut self, of: &str) {
        if let Some(ended) = &mut self.ended {
            ended.link = Context::of(of, true);
        }
    }

    /// Its stream says that it ended well.
    pub(crate) fn finishes(&mut self, reason: v1::FinishReason) {
        if let Some(ended) = &mut self.ended {
            ended.finish = reason;
        }
    }

    /// It was refused at the door.
    pub(crate) fn refused(mut self, step: Step, error: &RequestError) {
        if let Some(ended) = &mut self.ended {
            ended.refused_at = Some(step.name());
        }
        self.end(error.code_and_reason().0, Some(reason_label(error)), None);
    }

    /// Its stream is over.
    pub(crate) fn ended(mut self, error: Option<&RequestError>, traced: Traced) {
        let code = error.map_or(Code::Ok, |error| error.code_and_reason().0);
        self.end(code, error.map(reason_label), Some(traced));
    }

    fn end(&mut self, code: Code, reason: Option<&'static str>, traced: Option<Traced>) {
        let Some(ended) = self.ended.take().filter(|_| self.exported) else {
            return;
        };
        self.queue.offer(Ended {
            took_ms: self.arrived.elapsed().as_secs_f64() * 1e3,
            code: code.into(),
            reason,
            traced,
            ..ended
        });
        if let Some(call) = self.call.take()
            && code != Code::Ok
        {
            // Others are cancelled for its sake.
            let _ = call.failed.set((code, reason));
        }
    }
}

/// Nobody said how it ended: its call was dropped before its stream began.
impl Drop for RequestSpan {
    fn drop(&mut self) {
        let late = self.deadline.is_some_and(|at| at <= Instant::now());
        let (code, reason) = match (std::thread::panicking(), late) {
            (true, _) => (Code::Internal, "INTERNAL"),
            (false, true) => (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
            (false, false) => (Code::Cancelled, "CANCELLED"),
        };
        self.end(code, Some(reason), None);
    }
}
