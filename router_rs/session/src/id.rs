//! Names that commands and answers carry.

use std::fmt;

use kvmesh_wire::v1;

/// A generation's name: 128 random bits that say nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GenerationId(pub [u8; 16]);

impl GenerationId {
    /// Takes 16 bytes off the wire; `None` for another length.
    #[must_use]
    pub fn from_wire(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Reads 32 lower-case hexadecimal digits, as `Accepted` told them.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 32 {
            return None;
        }
        let mut id = [0; 16];
        for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Some(Self(id))
    }
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

impl fmt::Display for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As one number: a format a byte takes microseconds, with every request some times.
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for GenerationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A mesh transfer's name: 16 random bytes, minted by the router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(pub [u8; 16]);

/// Number that a router gave to a worker; it means nothing elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerIndex(pub u32);

/// Tells stale from current: what carries a lower fence than the highest known
/// is discarded. Ordered by owner, then by attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence {
    /// Number of the router that owns the generation, from 1.
    pub owner: u32,
    /// The attempt, from 1.
    pub attempt: u32,
}

/// Which part of a generation a placement asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Prompt and output.
    Whole,
    /// The prompt, then a hand-off.
    Prefill,
    /// The output, from KV that is handed over.
    Decode,
}

impl Stage {
    /// The wire's value; `None` for one that is unknown or unset.
    #[must_use]
    pub fn from_wire(stage: i32) -> Option<Self> {
        match v1::Stage::try_from(stage).ok()? {
            v1::Stage::Unspecified => None,
            v1::Stage::Whole => Some(Self::Whole),
            v1::Stage::Prefill => Some(Self::Prefill),
            v1::Stage::Decode => Some(Self::Decode),
        }
    }

    /// The value for the wire.
    #[must_use]
    pub fn to_wire(self) -> i32 {
        match self {
            Self::Whole => v1::Stage::Whole.into(),
            Self::Prefill => v1::Stage::Prefill.into(),
            Self::Decode => v1::Stage::Decode.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_id_survives_its_text_form() {
        let id = GenerationId(*b"\x00\x01\xfe\xffabcdefghijkl");
        assert_eq!(GenerationId::from_hex(&id.to_string()), Some(id));
        assert_eq!(GenerationId::from_hex(&id.to_string().to_uppercase()), None);
        assert_eq!(GenerationId::from_hex("00"), None);
    }

    #[test]
    fn an_owner_outranks_any_attempt() {
        let old = Fence {
            owner: 1,
            attempt: 9,
        };
        let new = Fence {
            owner: 2,
            attempt: 1,
        };
        assert!(old < new);
    }
}
