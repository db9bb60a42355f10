//! Bodies of plain HTTP: the same limits as a gRPC message has, whose length is
//! told before it where one is known.

use std::pin::pin;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use tokio::sync::OwnedSemaphorePermit;

use super::{Admitted, Door, Permit, Refused, budget::PERMIT_BYTES};
use crate::{error::RequestError, serve::grpc, telemetry::Step};

/// JSON is read in the time that a byte of text takes to be tokenised: some 1 ns
/// a byte against 25. So long bodies are parsed where long texts are tokenised.
const PARSED_PER_TEXT_BYTE: usize = 16;
/// Memory taken for a body before any of it is there.
const AT_ONCE: u64 = 64 << 10;

impl Door {
    /// Reads the JSON body of a call.
    pub(crate) async fn read_json<T: Send + 'static>(
        &self,
        headers: &HeaderMap,
        body: Incoming,
        parse: fn(&[u8]) -> Result<T, RequestError>,
    ) -> Result<Admitted<T>, Refused> {
        let limit = self.max_request_bytes;
        let receive = async {
            let gzip = is_gzip(headers)?;
            let (bytes, permit) = self.gather(body, limit).await?;
            Ok((gzip, bytes, permit))
        };
        let (gzip, mut bytes, mut permit) = self.in_time(pin!(receive)).await?;
        if gzip {
            let packed = bytes.len();
            let inflate = move |_: &_| grpc::inflate(&bytes, limit);
            let inflated = self.text.run(packed, inflate).await;
            bytes = inflated.map_err(|error| (Step::Size, error))?;
            let more = (bytes.len() as u64).saturating_sub(packed as u64);
            permit.merge(self.permit(more).map_err(|error| (Step::Permit, error))?);
        }
        let like_text = bytes.len() / PARSED_PER_TEXT_BYTE;
        let parsed = self.text.run(like_text, move |_| parse(&bytes)).await;
        Ok(Admitted {
            message: parsed.map_err(|error| (Step::Body, error))?,
            permit: Permit(permit),
        })
    }

    /// All of a body. Where its length is told, its permit is taken before any of
    /// it is read, else a part's before the next part is.
    async fn gather(
        &self,
        mut body: Incoming,
        limit: u64,
    ) -> Result<(Bytes, OwnedSemaphorePermit), RequestError> {
        let told = body.size_hint().exact();
        if told.is_some_and(|length| length > limit) {
            return Err(RequestError::MessageTooLarge { limit });
        }
        let mut permit = self.permit(told.unwrap_or(0))?;
        let first = usize::try_from(told.unwrap_or(0).min(AT_ONCE)).unwrap_or(0);
        let mut bytes = BytesMut::with_capacity(first);
        // Of an untold length: what the permit is for by now.
        let mut charged = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| RequestError::Malformed(error.to_string()))?;
            let data = frame.into_data().unwrap_or_default();
            if (bytes.len() + data.len()) as u64 > limit {
                return Err(RequestError::MessageTooLarge { limit });
            }
            let total = (bytes.len() + data.len()) as u64;
            if told.is_none() && total - charged >= PERMIT_BYTES {
                permit.merge(self.permit(total - charged)?);
                charged = total;
            }
            bytes.extend_from_slice(&data);
        }
        Ok((bytes.freeze(), permit))
    }
}

/// Whether a body is packed. It has to say that it is JSON: what a page of
/// another site makes a browser send without asking first is not.
fn is_gzip(headers: &HeaderMap) -> Result<bool, RequestError> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let kind = text(header::CONTENT_TYPE).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        let what = format!("its content-type is {kind:?}; application/json is needed");
        return Err(RequestError::Malformed(what));
    }
    match text(header::CONTENT_ENCODING) {
        None | Some("identity") => Ok(false),
        Some("gzip") => Ok(true),
        Some(_) => Err(RequestError::unsupported("content-encoding")),
    }
}
