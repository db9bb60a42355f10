//! How one input of a fuzzer is cut into several messages.
//!
//! Each message has two bytes before it, its length, little-endian. Where fewer
//! bytes are left than that says, the message is what is left: so each mutation
//! of an input is an input.

/// The messages of an input, in order.
pub fn messages(mut input: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = input.split_first_chunk::<2>()?;
        let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
        let (message, rest) = rest.split_at(length);
        input = rest;
        Some(message)
    })
}

/// An input that has these messages.
pub fn input<M: AsRef<[u8]>>(messages: impl IntoIterator<Item = M>) -> Vec<u8> {
    let mut all = Vec::new();
    for message in messages {
        let message = message.as_ref();
        let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
        all.extend_from_slice(&length.to_le_bytes());
        all.extend_from_slice(&message[..usize::from(length)]);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back() {
        let all = input([b"one".as_slice(), b"", b"three"]);
        let back: Vec<_> = messages(&all).collect();
        assert_eq!(back, [b"one".as_slice(), b"", b"three"]);
    }

    #[test]
    fn a_message_that_is_cut_is_what_is_left() {
        assert_eq!(
            messages(&[9, 0, 1]).collect::<Vec<_>>(),
            [[1_u8].as_slice()]
        );
        assert_eq!(messages(&[9]).count(), 0);
    }
}
