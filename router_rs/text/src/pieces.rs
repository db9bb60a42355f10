//! What each token id is in bytes, worked out once for a model.

use crate::error::LoadError;
use serde_json::Value;
use std::collections::HashMap;
use tokenizers::Tokenizer;
use tokenizers::tokenizer::Model;

/// Bytes of every id, and what the decoder does at the beginning of a text.
#[derive(Debug)]
pub(crate) struct Pieces {
    bytes: Vec<u8>,
    /// `ends[id]` is where the piece ends; it begins where the one before
    /// ends.
    ends: Vec<u32>,
    special: Vec<bool>,
    /// Spaces taken off the beginning of the whole text.
    pub(crate) strip_start: usize,
    /// Pieces that read otherwise as the first of a text, by id.
    firsts: HashMap<u32, Box<[u8]>>,
}

/// One id's piece.
pub(crate) struct Piece<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) special: bool,
}

/// Largest id for which a table is made; vocabularies have some 300,000.
const MAX_ID: u32 = 1 << 22;
/// Longest text that a decoder's step may put in or look for, in bytes. Files
/// come from workers: a table must not outgrow them.
const MAX_STEP_TEXT: usize = 64;

/// One thing that a decoder does to each token by itself.
enum Step {
    /// Characters stand for bytes (GPT-2's byte-to-unicode table).
    ByteLevel,
    /// `<0x41>` is the byte 0x41.
    ByteFallback,
    /// One string for another.
    Replace(String, String),
    /// The replacement character is a space; as the first token of a text it
    /// is nothing.
    Metaspace {
        replacement: char,
        drop_at_start: bool,
    },
    /// Takes characters off the beginning of each token.
    Strip(char, usize),
}

/// A decoder, as steps a token and what it takes off the whole text.
struct Steps {
    steps: Vec<Step>,
    strip_start: usize,
}

impl Steps {
    /// Reads the decoder part of tokenizer.json.
    fn read(decoder: &Value) -> Result<Self, LoadError> {
        let mut parsed = Self {
            steps: Vec::new(),
            strip_start: 0,
        };
        let mut fused = false;
        match decoder["decoders"].as_array() {
            Some(parts) => {
                for part in parts {
                    parsed.add(part, &mut fused)?;
                }
            }
            None => parsed.add(decoder, &mut fused)?,
        }
        Ok(parsed)
    }

    fn add(&mut self, part: &Value, fused: &mut bool) -> Result<(), LoadError> {
        let name = part["type"].as_str().unwrap_or("none");
        let refused = || LoadError::Decoder(part.to_string().chars().take(200).collect());
        let text = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(refused);
        let step = match name {
            "Fuse" => {
                *fused = true;
                return Ok(());
            }
            "Strip" => {
                let content = text(&part["content"])?.chars().next().ok_or_else(refused)?;
                let start = part["start"].as_u64().ok_or_else(refused)? as usize;
                if part["stop"].as_u64() != Some(0)
                    || (*fused && (content != ' ' || self.strip_start > 0))
                {
                    return Err(refused());
                }
                if *fused {
                    self.strip_start = start;
                    return Ok(());
                }
                Step::Strip(content, start)
            }
            _ if *fused => return Err(refused()),
            "ByteLevel" => {
                // It joins all tokens, as Fuse does.
                *fused = true;
                Step::ByteLevel
            }
            "ByteFallback" => Step::ByteFallback,
            "Replace" => {
                let (from, to) = (text(&part["pattern"]["String"])?, text(&part["content"])?);
                if from.is_empty() || from.len() > MAX_STEP_TEXT || to.len() > MAX_STEP_TEXT {
                    return Err(refused());
                }
                Step::Replace(from, to)
            }
            "Metaspace" => {
                let replacement = text(&part["replacement"])?
                    .chars()
                    .next()
                    .ok_or_else(refused)?;
                let never = part["prepend_scheme"].as_str() == Some("never")
                    || part["add_prefix_space"].as_bool() == Some(false);
                Step::Metaspace {
                    replacement,
                    drop_at_start: !never,
                }
            }
            _ => return Err(refused()),
        };
        self.steps.push(step);
        Ok(())
    }

    /// Bytes of one token.
    fn apply(&self, token: &str, first: bool, table: &HashMap<char, u8>) -> Vec<u8> {
        let mut text = token.to_owned();
        for step in &self.steps {
            match step {
                Step::ByteLevel => {
                    let bytes: Option<Vec<u8>> =
                        text.chars().map(|c| table.get(&c).copied()).collect();
                    return bytes.unwrap_or_else(|| text.into_bytes());
                }
                Step::ByteFallback => {
                    if let Some(byte) = fallback_byte(&text) {
                        return vec![byte];
                    }
                }
                Step::Replace(from, to) => text = text.replace(from.as_str(), to),
                Step::Metaspace {
                    replacement,
                    drop_at_start,
                } => {
                    let to = if first && *drop_at_start { "" } else { " " };
                    text = text.replace(*replacement, to);
                }
                Step::Strip(content, start) => {
                    for _ in 0..*start {
                        match text.strip_prefix(*content) {
                            Some(rest) => text = rest.to_owned(),
                            None => break,
                        }
                    }
                }
            }
        }
        text.into_bytes()
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// GPT-2's table of characters that stand for bytes: printable Latin-1
/// characters for themselves, the rest from U+0100 up in order.
fn byte_table() -> HashMap<char, u8> {
    let mut table = HashMap::with_capacity(256);
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let itself = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if itself {
            u32::from(byte)
        } else {
            next += 1;
            next - 1
        };
        if let Some(c) = char::from_u32(code) {
            table.insert(c, byte);
        }
    }
    table
}

impl Pieces {
    /// Works out every id's piece from the decoder's description.
    pub(crate) fn new(tokenizer: &Tokenizer, decoder: &Value) -> Result<Self, LoadError> {
        let steps = Steps::read(decoder)?;
        let table = byte_table();
        let added = tokenizer.get_added_vocabulary();
        let model = tokenizer.get_model();
        let highest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        if highest > MAX_ID {
            let (name, message) = (
                "tokenizer.json".to_owned(),
                format!("token id {highest} is above {MAX_ID}"),
            );
            return Err(LoadError::Malformed { name, message });
        }
        let mut pieces = Self {
            bytes: Vec::new(),
            ends: Vec::new(),
            special: Vec::new(),
            strip_start: steps.strip_start,
            firsts: HashMap::new(),
        };
        for id in 0..=highest {
            // Ids without a token have no text.
            let token = added
                .simple_id_to_token(id)
                .or_else(|| model.id_to_token(id))
                .unwrap_or_default();
            let bytes = steps.apply(&token, false, &table);
            let first = steps.apply(&token, true, &table);
            if first != bytes {
                pieces.firsts.insert(id, first.into());
            }
            pieces.bytes.extend_from_slice(&bytes);
            let end = u32::try_from(pieces.bytes.len())
                .map_err(|_| LoadError::Decoder("vocabulary above 4 GiB".to_owned()))?;
            pieces.ends.push(end);
            pieces.special.push(added.is_special_token(&token));
        }
        Ok(pieces)
    }

    /// The piece of an id; none outside the vocabulary.
    pub(crate) fn get(&self, id: u32) -> Option<Piece<'_>> {
        let at = usize::try_from(id).ok()?;
        let end = *self.ends.get(at)?;
        let begin = if at == 0 { 0 } else { self.ends[at - 1] };
        Some(Piece {
            bytes: &self.bytes[begin as usize..end as usize],
            special: self.special[at],
        })
    }

    /// The piece as the first of a text.
    pub(crate) fn first<'a>(&'a self, id: u32, otherwise: &'a [u8]) -> &'a [u8] {
        self.firsts.get(&id).map_or(otherwise, |bytes| bytes)
    }

    pub(crate) fn longest(&self) -> usize {
        let mut begin = 0;
        let mut longest = 0;
        for &end in &self.ends {
            longest = longest.max(end - begin);
            begin = end;
        }
        longest as usize
    }
}
