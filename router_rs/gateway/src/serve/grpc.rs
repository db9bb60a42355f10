//! gRPC as far as a server of few calls needs it: one message in, messages or
//! a status out. Sizes are checked before bytes are read, and every refusal is
//! a status of ours.

use std::{io::Read, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use flate2::read::GzDecoder;
use http::{HeaderMap, HeaderValue, Response, header};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use prost::Message;
use tonic::Status;

use super::body::ResponseBody;
use crate::error::RequestError;

/// Bytes before a message: compressed or not, then its length.
const PREFIX: usize = 5;
const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/grpc");

/// A message as it came.
pub(crate) struct Received {
    pub(crate) bytes: Bytes,
    pub(crate) gzip: bool,
}

/// Reads the one message of a call. `admit` is asked with its length before
/// the rest is read.
pub(crate) async fn receive<P>(
    headers: &HeaderMap,
    mut body: Incoming,
    limit: u64,
    admit: impl FnOnce(u64) -> Result<P, RequestError>,
) -> Result<(Received, P), RequestError> {
    let malformed = |what: &str| RequestError::Malformed(what.to_owned());
    let mut first = BytesMut::new();
    while first.len() < PREFIX {
        first.extend_from_slice(
            &frame(&mut body)
                .await?
                .ok_or_else(|| malformed("no message"))?,
        );
    }
    let flag = first[0];
    let length = u32::from_be_bytes([first[1], first[2], first[3], first[4]]);
    if u64::from(length) > limit {
        return Err(RequestError::MessageTooLarge { limit });
    }
    let gzip = match (
        flag,
        headers.get("grpc-encoding").map(HeaderValue::as_bytes),
    ) {
        (0, _) => false,
        (1, Some(b"gzip")) => true,
        (1, _) => return Err(RequestError::unsupported("grpc-encoding")),
        _ => return Err(malformed("a compression flag that is neither 0 nor 1")),
    };
    let permit = admit(u64::from(length))?;
    let length = length as usize;
    let mut bytes = first.split_off(PREFIX);
    while bytes.len() < length {
        let more = frame(&mut body).await?;
        bytes.extend_from_slice(&more.ok_or_else(|| malformed("it ends before its length"))?);
    }
    if bytes.len() > length || (!body.is_end_stream() && more_bytes(&mut body).await?) {
        return Err(malformed("more than one in a call that takes one"));
    }
    Ok((
        Received {
            bytes: bytes.freeze(),
            gzip,
        },
        permit,
    ))
}

async fn frame(body: &mut Incoming) -> Result<Option<Bytes>, RequestError> {
    match body.frame().await {
        Some(Ok(frame)) => Ok(Some(frame.into_data().unwrap_or_default())),
        Some(Err(error)) => Err(RequestError::Malformed(error.to_string())),
        None => Ok(None),
    }
}

async fn more_bytes(body: &mut Incoming) -> Result<bool, RequestError> {
    while let Some(bytes) = frame(body).await? {
        if !bytes.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Inflates within the limit.
pub(crate) fn inflate(bytes: &[u8], limit: u64) -> Result<Bytes, RequestError> {
    let mut inflated = Vec::new();
    GzDecoder::new(bytes)
        .take(limit + 1)
        .read_to_end(&mut inflated)
        .map_err(|error| RequestError::Malformed(error.to_string()))?;
    if inflated.len() as u64 > limit {
        return Err(RequestError::MessageTooLarge { limit });
    }
    Ok(inflated.into())
}

/// Decodes a message; text that is not UTF-8 ends here.
pub(crate) fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, RequestError> {
    M::decode(bytes).map_err(|error| RequestError::Malformed(error.to_string()))
}

/// Appends a message with its prefix.
pub(crate) fn encode_into(message: &impl Message, out: &mut BytesMut) {
    let length = message.encoded_len();
    out.reserve(PREFIX + length);
    out.put_u8(0);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message.encode_raw(out);
}

/// The client's deadline, from `grpc-timeout`: at most 8 digits and a unit.
pub(crate) fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, RequestError> {
    let Some(value) = headers.get("grpc-timeout") else {
        return Ok(None);
    };
    let parse = || {
        let text = value.to_str().ok()?;
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let number: u64 = digits.parse().ok()?;
        Some(match unit {
            "n" => Duration::from_nanos(number),
            "u" => Duration::from_micros(number),
            "m" => Duration::from_millis(number),
            "S" => Duration::from_secs(number),
            "M" => Duration::from_secs(number * 60),
            "H" => Duration::from_secs(number * 3_600),
            _ => return None,
        })
    };
    parse()
        .map(Some)
        .ok_or_else(|| RequestError::Malformed("grpc-timeout".to_owned()))
}

/// Headers of a call that was not refused.
pub(crate) fn response(body: ResponseBody, metadata: &HeaderMap) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    *response.headers_mut() = metadata.clone();
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, CONTENT_TYPE);
    response.headers_mut().insert(
        "grpc-accept-encoding",
        HeaderValue::from_static("identity,gzip"),
    );
    response
}

/// The answer of a call with one message.
pub(crate) fn one(message: &impl Message, metadata: &HeaderMap) -> Response<ResponseBody> {
    let mut data = BytesMut::new();
    encode_into(message, &mut data);
    response(
        ResponseBody::bytes(data.freeze(), Some(ok_trailers())),
        metadata,
    )
}

/// A refusal: headers that are trailers.
pub(crate) fn refusal(status: &Status, metadata: &HeaderMap) -> Response<ResponseBody> {
    let mut refused = response(ResponseBody::empty(), metadata);
    refused.headers_mut().extend(trailers(status));
    refused
}

/// Trailers of success.
pub(crate) fn ok_trailers() -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    trailers
}

/// Trailers of a status.
pub(crate) fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        // What the message held cannot be a header; the code can.
        trailers.clear();
        trailers.insert("grpc-status", HeaderValue::from(status.code() as i32));
    }
    trailers
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use super::*;

    #[test]
    fn a_gzip_bomb_ends_at_the_limit() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(&vec![0; 1 << 20]).unwrap();
        let bomb = encoder.finish().unwrap();
        assert!(bomb.len() < 4_096);
        assert_eq!(
            inflate(&bomb, 1_000),
            Err(RequestError::MessageTooLarge { limit: 1_000 })
        );
        assert_eq!(inflate(&bomb, 1 << 20).unwrap().len(), 1 << 20);
        assert!(matches!(
            inflate(b"garbage", 10),
            Err(RequestError::Malformed(_))
        ));
    }

    #[test]
    fn timeouts_have_at_most_eight_digits_and_a_unit() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", HeaderValue::from_str(text).unwrap());
            timeout(&headers)
        };
        assert_eq!(read("250m").unwrap(), Some(Duration::from_millis(250)));
        assert_eq!(
            read("99999999H").unwrap(),
            Some(Duration::from_secs(99_999_999 * 3_600))
        );
        for wrong in ["", "m", "1", "-1S", "123456789S", "1s", "1.5S"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
