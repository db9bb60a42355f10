//! The message that is sent once a token, encoded by hand: one pass, where the
//! general encoder takes the length of each part before it writes it. The bytes
//! are the same.

use bytes::BytesMut;
use kvmesh_wire::v1::Tokens;

/// Ids that are encoded here; a step of one stream has one, or a few.
const MOST_IDS: usize = 8;
/// gRPC's prefix, three field headers with their lengths, and as many ids.
const HEAD: usize = 5 + 6 + 6 + 6 + 6 + 5 * MOST_IDS;
/// Keys (number and wire type) of `GenerateResponse.tokens` and of the fields
/// of `Tokens`.
const TOKENS: u8 = 3 << 3 | 2;
const FIRST_INDEX: u8 = 1 << 3;
const IDS: u8 = 2 << 3 | 2;
const TEXT: u8 = 3 << 3 | 2;

/// Appends a `GenerateResponse` with these tokens as a gRPC message. False, and
/// nothing is written: the general encoder has to.
pub(super) fn encode_into(tokens: &Tokens, out: &mut BytesMut) -> bool {
    if tokens.ids.len() > MOST_IDS || !tokens.logprobs.is_empty() {
        return false;
    }
    let Ok(text) = u32::try_from(tokens.text.len()) else {
        return false;
    };
    let ids: u32 = tokens.ids.iter().map(|id| length(*id)).sum();
    let mut inner = 0;
    if tokens.first_index != 0 {
        inner += 1 + length(tokens.first_index);
    }
    if ids != 0 {
        inner += 2 + ids;
    }
    if text != 0 {
        inner += 1 + length(text) + text;
    }
    let whole = 1 + length(inner) + inner;
    let mut head = Head {
        bytes: [0; HEAD],
        length: 1,
    };
    for byte in whole.to_be_bytes() {
        head.byte(byte);
    }
    head.byte(TOKENS);
    head.varint(inner);
    if tokens.first_index != 0 {
        head.byte(FIRST_INDEX);
        head.varint(tokens.first_index);
    }
    if ids != 0 {
        head.byte(IDS);
        head.varint(ids);
        for id in &tokens.ids {
            head.varint(*id);
        }
    }
    if text != 0 {
        head.byte(TEXT);
        head.varint(text);
    }
    out.reserve(head.length + tokens.text.len());
    out.extend_from_slice(&head.bytes[..head.length]);
    out.extend_from_slice(tokens.text.as_bytes());
    true
}

struct Head {
    bytes: [u8; HEAD],
    length: usize,
}

impl Head {
    fn byte(&mut self, byte: u8) {
        self.bytes[self.length] = byte;
        self.length += 1;
    }

    fn varint(&mut self, mut number: u32) {
        while number >= 0x80 {
            self.byte(number as u8 | 0x80);
            number >>= 7;
        }
        self.byte(number as u8);
    }
}

/// Bytes of a number as a varint: 7 bits each.
fn length(number: u32) -> u32 {
    (38 - (number | 1).leading_zeros()) / 7
}

#[cfg(test)]
mod tests {
    use kvmesh_wire::v1::{GenerateResponse, TokenLogprobs, generate_response::Event};
    use proptest::prelude::*;

    use super::*;
    use crate::serve::grpc;

    proptest! {
        #[test]
        fn the_bytes_are_those_of_the_general_encoder(
            first_index: u32,
            ids in proptest::collection::vec(any::<u32>().prop_map(|id| id >> (id % 32)), 0..12),
            text in ".{0,40}|x{120,140}|y{16370,16400}",
            logprobs in 0_usize..2,
        ) {
            let logprobs = vec![TokenLogprobs::default(); logprobs];
            let tokens = Tokens { first_index, ids, text, logprobs };
            let mut expected = BytesMut::new();
            let event = Some(Event::Tokens(tokens.clone()));
            grpc::encode_into(&GenerateResponse { event }, &mut expected);
            let mut bytes = BytesMut::new();
            if encode_into(&tokens, &mut bytes) {
                prop_assert_eq!(bytes, expected);
            } else {
                prop_assert!(bytes.is_empty());
                prop_assert!(tokens.ids.len() > MOST_IDS || !tokens.logprobs.is_empty());
            }
        }
    }
}
