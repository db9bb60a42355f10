//! Reads `GenerateResponse` messages off a gRPC body without building them:
//! the load client shares a core with the worker, and counting must be cheap.

use bytes::{Buf, Bytes, BytesMut};

/// Bytes before each gRPC message: a flag and the length.
const PREFIX: usize = 5;

/// What a message was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// `tokens`, with so many ids.
    Tokens(u64),
    /// `finished`.
    Finished,
    /// Any other.
    Other,
}

/// Cuts a body into messages.
#[derive(Debug, Default)]
pub(super) struct Replies {
    rest: BytesMut,
}

impl Replies {
    /// Calls `each` for every message that `data` completes. `None` where the
    /// bytes are no gRPC messages of the expected kind.
    pub(super) fn feed(&mut self, data: Bytes, mut each: impl FnMut(Reply)) -> Option<()> {
        // Most data frames end with a message: then nothing is copied.
        let mut data = if self.rest.is_empty() {
            data
        } else {
            self.rest.extend_from_slice(&data);
            self.rest.split().freeze()
        };
        while data.len() >= PREFIX {
            let length = u32::from_be_bytes([data[1], data[2], data[3], data[4]]) as usize;
            if data[0] != 0 {
                return None;
            }
            if data.len() < PREFIX + length {
                break;
            }
            each(read(&data[PREFIX..PREFIX + length])?);
            data.advance(PREFIX + length);
        }
        self.rest.extend_from_slice(&data);
        Some(())
    }
}

/// Reads one `GenerateResponse`.
fn read(mut message: &[u8]) -> Option<Reply> {
    let mut reply = Reply::Other;
    while let Some((field, value)) = field(&mut message)? {
        match (field, value) {
            (3, Value::Bytes(tokens)) => reply = Reply::Tokens(ids(tokens)?),
            (4, Value::Bytes(_)) => reply = Reply::Finished,
            _ => {}
        }
    }
    Some(reply)
}

/// Counts the ids of a `Tokens` message: field 2, packed or not.
fn ids(mut tokens: &[u8]) -> Option<u64> {
    let mut count = 0;
    while let Some((field, value)) = field(&mut tokens)? {
        match (field, value) {
            (2, Value::Bytes(packed)) => {
                count += packed.iter().filter(|byte| **byte < 0x80).count() as u64;
            }
            (2, Value::Number) => count += 1,
            _ => {}
        }
    }
    Some(count)
}

enum Value<'a> {
    Bytes(&'a [u8]),
    Number,
}

/// Takes one protobuf field. `Some(None)` at the end, `None` where it is cut.
fn field<'a>(message: &mut &'a [u8]) -> Option<Option<(u64, Value<'a>)>> {
    if message.is_empty() {
        return Some(None);
    }
    let tag = varint(message)?;
    let value = match tag & 7 {
        0 => {
            varint(message)?;
            Value::Number
        }
        1 => {
            *message = message.get(8..)?;
            Value::Number
        }
        2 => {
            let length = varint(message)? as usize;
            let (bytes, rest) = message.split_at_checked(length)?;
            *message = rest;
            Value::Bytes(bytes)
        }
        5 => {
            *message = message.get(4..)?;
            Value::Number
        }
        _ => return None,
    };
    Some(Some((tag >> 3, value)))
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if *byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut;
    use kvmesh_wire::v1::{Accepted, Finished, GenerateResponse, Tokens, generate_response::Event};
    use prost::Message;

    fn framed(events: Vec<Event>) -> Bytes {
        let mut body = BytesMut::new();
        for event in events {
            let message = GenerateResponse { event: Some(event) }.encode_to_vec();
            body.put_u8(0);
            body.put_u32(message.len() as u32);
            body.put_slice(&message);
        }
        body.freeze()
    }

    #[test]
    fn messages_are_counted_wherever_the_body_is_cut() {
        let tokens = |ids: Vec<u32>| {
            Event::Tokens(Tokens {
                ids,
                text: "some".to_owned(),
                first_index: 300,
                ..Default::default()
            })
        };
        let accepted = Accepted {
            max_tokens: 700,
            ..Default::default()
        };
        let body = framed(vec![
            Event::Accepted(accepted),
            tokens(vec![1, 400, 70_000]),
            tokens(vec![9]),
            Event::Finished(Finished::default()),
        ]);
        let expected = [
            Reply::Other,
            Reply::Tokens(3),
            Reply::Tokens(1),
            Reply::Finished,
        ];
        for cut in 0..body.len() {
            let mut replies = Replies::default();
            let mut read = Vec::new();
            for part in [body.slice(..cut), body.slice(cut..)] {
                assert_eq!(replies.feed(part, |reply| read.push(reply)), Some(()));
            }
            assert_eq!(read, expected);
        }
    }

    #[test]
    fn garbage_is_no_reply() {
        let mut replies = Replies::default();
        let garbage = Bytes::from_static(b"HTTP/1.1 400 Bad Request");
        assert_eq!(replies.feed(garbage, |_| {}), None);
    }
}
