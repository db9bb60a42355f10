//! Errors in OpenAI's shape: the only place where one becomes an HTTP status.

use std::{borrow::Cow, time::Duration};

use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use serde::Serialize;
use tonic::Code;

use super::JSON;
use crate::{
    error::{MAX_VIOLATIONS, RequestError, Violations, cut},
    serve::body::ResponseBody,
};

/// Says of a grammar what the worker's capabilities say.
pub(super) const CANNOT_CONSTRAIN: &str = "the engine of this model cannot constrain its output";

/// Why an HTTP call fails.
#[derive(Debug)]
pub(crate) enum Failure {
    /// As over gRPC.
    Request(RequestError),
    /// Nothing is at this path.
    NoSuchPath(String),
    /// What is at this path is asked with another method.
    Method(Method),
    /// No engine of ours makes embeddings.
    NoEmbeddings,
}

#[derive(Serialize)]
struct Body {
    error: Told,
}

#[derive(Serialize)]
struct Told {
    message: String,
    r#type: &'static str,
    param: Option<String>,
    code: Cow<'static, str>,
}

impl Failure {
    fn status(&self) -> StatusCode {
        match self {
            Self::Request(error) => status_of(error),
            Self::NoSuchPath(_) => StatusCode::NOT_FOUND,
            Self::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::NoEmbeddings => StatusCode::NOT_IMPLEMENTED,
        }
    }

    fn told(&self) -> Told {
        let (message, param, code) = match self {
            Self::Request(error) => {
                let (message, param) = words(error);
                (message, param, code_of(error))
            }
            Self::NoSuchPath(path) => (format!("nothing is at {path}"), None, "not_found".into()),
            Self::Method(allowed) => (
                format!("only {allowed} is allowed here"),
                None,
                "method_not_allowed".into(),
            ),
            Self::NoEmbeddings => {
                let message = "no engine of this mesh makes embeddings".to_owned();
                (message, None, "embeddings_not_supported".into())
            }
        };
        let r#type = match self.status() {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::NOT_IMPLEMENTED => "invalid_request_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        Told {
            message: cut(message),
            r#type,
            param,
            code,
        }
    }

    /// Its JSON object.
    pub(super) fn json(&self) -> Vec<u8> {
        let error = self.told();
        // Four texts: nothing in it can fail to be JSON.
        serde_json::to_vec(&Body { error }).unwrap_or_default()
    }

    /// As the answer of a call.
    pub(crate) fn response(&self, back: &HeaderMap) -> Response<ResponseBody> {
        let mut response = super::response(self.status(), JSON, self.json().into(), back);
        let headers = response.headers_mut();
        if self.status() == StatusCode::NOT_IMPLEMENTED {
            // OpenAI's clients try again after any 5xx, unless this says no.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        match self {
            Self::Method(allowed) => {
                if let Ok(allowed) = HeaderValue::from_str(allowed.as_str()) {
                    headers.insert(header::ALLOW, allowed);
                }
            }
            Self::Request(RequestError::Unauthenticated) => {
                let scheme = HeaderValue::from_static("Bearer");
                headers.insert(header::WWW_AUTHENTICATE, scheme);
            }
            Self::Request(error) => {
                if let Some(wait) = error.retry_after() {
                    retry_after(headers, wait);
                }
            }
            Self::NoSuchPath(_) | Self::NoEmbeddings => {}
        }
        response
    }
}

/// `Retry-After` knows whole seconds only (RFC 9110, 10.2.3); OpenAI's clients
/// look for `retry-after-ms` first.
fn retry_after(headers: &mut HeaderMap, wait: Duration) {
    let seconds = wait.as_millis().div_ceil(1_000).max(1);
    for (name, value) in [
        ("retry-after", seconds),
        ("retry-after-ms", wait.as_millis()),
    ] {
        if let Ok(value) = HeaderValue::from_str(&value.to_string()) {
            headers.insert(name, value);
        }
    }
}

/// By the code that gRPC has, as google/rpc/code.proto maps codes to HTTP; what
/// differs is named first.
fn status_of(error: &RequestError) -> StatusCode {
    match error {
        RequestError::MessageTooLarge { .. } => return StatusCode::PAYLOAD_TOO_LARGE,
        // The rest of the request may be sent again without the field.
        RequestError::Unsupported { .. } => return StatusCode::BAD_REQUEST,
        _ => {}
    }
    match error.code_and_reason().0 {
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::Aborted | Code::AlreadyExists => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        // Nginx's number for a client that went; nobody reads it.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

/// OpenAI's own code where it has one that clients look for, else our reason.
fn code_of(error: &RequestError) -> Cow<'static, str> {
    Cow::Borrowed(match error {
        RequestError::Unauthenticated => "invalid_api_key",
        RequestError::UnknownModel { .. } => "model_not_found",
        RequestError::PromptTooLong { .. } | RequestError::OverContext(_) => {
            "context_length_exceeded"
        }
        RequestError::TenantLimit { .. } => "rate_limit_exceeded",
        RequestError::Unsupported { .. } => "unsupported_parameter",
        error => return error.code_and_reason().1.to_ascii_lowercase().into(),
    })
}

/// The message, and the field that it is about, by the names of this face.
fn words(error: &RequestError) -> (String, Option<String>) {
    match error {
        RequestError::Invalid(Violations(all)) | RequestError::OverContext(Violations(all)) => {
            let said: Vec<String> = all
                .iter()
                .take(MAX_VIOLATIONS)
                .map(|one| format!("{}: {}", param(&one.field), one.description))
                .collect();
            let first = all.first().map(|one| param(&one.field));
            (said.join("; "), first)
        }
        RequestError::Unsupported { field, words } => {
            let words = match words.as_str() {
                "" if field.starts_with("grammar") => CANNOT_CONSTRAIN,
                words => words,
            };
            let param = param(field);
            let why = if words.is_empty() { "" } else { ": " };
            (format!("not supported: {param}{why}{words}"), Some(param))
        }
        RequestError::UnknownModel { .. } => (error.to_string(), Some("model".to_owned())),
        RequestError::PromptTooLong { .. } => (error.to_string(), Some("prompt".to_owned())),
        error => (error.to_string(), None),
    }
}

/// A field of the proto by its name here.
fn param(field: &str) -> String {
    const PREFIXES: [&str; 5] = ["sampling.", "stopping.", "output.", "hints.", "chat."];
    const NAMES: [(&str, &str); 9] = [
        ("token_ids.ids", "prompt"),
        ("input", "prompt"),
        ("chat", "messages"),
        ("request_class", "priority"),
        ("ignore_end_of_text", "ignore_eos"),
        ("include_stop", "include_stop_str_in_output"),
        ("template_arguments", "chat_template_kwargs"),
        ("adapter", "model"),
        ("conversation_id", "session_id"),
    ];
    let name = PREFIXES
        .iter()
        .find_map(|prefix| field.strip_prefix(prefix))
        .unwrap_or(field);
    if name.starts_with("grammar") {
        return "response_format".to_owned();
    }
    let name = name.replace("_json", "");
    let (bare, rest) = name.split_at(name.find('[').unwrap_or(name.len()));
    let own = NAMES.iter().find(|(theirs, _)| *theirs == bare);
    format!("{}{rest}", own.map_or(bare, |(_, own)| own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_have_the_names_that_clients_sent() {
        for (proto, own) in [
            ("sampling.temperature", "temperature"),
            ("sampling.logit_bias[3].bias", "logit_bias[3].bias"),
            ("stopping.max_tokens", "max_tokens"),
            ("output.logprobs", "logprobs"),
            ("hints.request_class", "priority"),
            ("hints.conversation_id", "session_id"),
            ("token_ids.ids[7]", "prompt[7]"),
            ("token_ids.ids", "prompt"),
            ("prompt", "prompt"),
            ("chat", "messages"),
            ("chat.messages[0].role", "messages[0].role"),
            (
                "chat.messages[1].tool_calls_json[0]",
                "messages[1].tool_calls[0]",
            ),
            ("grammar.require_continuation", "response_format"),
            ("n", "n"),
        ] {
            assert_eq!(param(proto), own);
        }
        let arguments = param("chat.template_arguments_json");
        assert_eq!(arguments, "chat_template_kwargs");
    }
}
