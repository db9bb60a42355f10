//! A small but real tokeniser, made in code: a byte-level BPE vocabulary with
//! a ChatML template. Or one read from a model's folder.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    io,
    path::Path,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Words that the built-in vocabulary has whole tokens for.
const WORDS: &str = "the of and to in is you that it he was for on are as with his they at be \
    this have from or one had by word but not what all were we when your can said there use an \
    each which she do how their if will up other about out many then them these so some her would \
    make like him into time has look two more write go see number no way could people my than \
    first water been call who oil its now find long down day did get come made may part capital \
    France Paris user assistant system answer question hello world";

/// ChatML, as the demo model speaks it.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + \
    '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt \
    %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Ends a document.
const END_OF_TEXT: u32 = 0;
/// Opens a turn of a conversation.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Ends a turn: the end-of-text token of chat models.
const END_OF_TURN: u32 = 2;

/// One file of a tokeniser.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VocabularyFile {
    /// Name without a path.
    pub name: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// A vocabulary: its files for `GetTokenizer`, and what a test wants to know
/// of its ids.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    files: Vec<VocabularyFile>,
    digest: String,
    texts: Vec<String>,
    text_ids: Vec<u32>,
    end_of_text_ids: Vec<u32>,
    /// Special tokens of a vocabulary that this crate makes.
    special: Vec<(String, u32)>,
}

impl Vocabulary {
    /// The vocabulary that this crate makes: three special tokens, 256 bytes,
    /// some hundred merges.
    #[must_use]
    pub fn built_in() -> Self {
        Self::built_in_for(CHAT_TEMPLATE, &[])
    }

    /// The same with another chat template and more special tokens.
    #[must_use]
    pub fn built_in_for(template: &str, marks: &[&str]) -> Self {
        let mut entries: Vec<String> = SPECIAL.iter().map(ToString::to_string).collect();
        entries.extend((0..=u8::MAX).map(|byte| byte_char(byte).to_string()));
        let mut known: HashSet<String> = entries.iter().cloned().collect();
        let mut merges = Vec::new();
        for word in WORDS.split_whitespace() {
            let spaced: Vec<char> = std::iter::once(' ')
                .chain(word.chars())
                .map(|letter| byte_char(letter as u8))
                .collect();
            // Left to right: each longer prefix of the word is one merge more.
            let mut prefix = String::from(spaced[0]);
            for letter in &spaced[1..] {
                let longer = format!("{prefix}{letter}");
                if known.insert(longer.clone()) {
                    merges.push(json!([prefix, letter.to_string()]));
                    entries.push(longer.clone());
                }
                prefix = longer;
            }
        }
        let first_mark = entries.len();
        entries.extend(marks.iter().map(ToString::to_string));
        let special: Vec<(String, u32)> = (0..SPECIAL.len())
            .chain(first_mark..entries.len())
            .map(|id| (entries[id].clone(), id as u32))
            .collect();
        let vocab: serde_json::Map<String, Value> = entries
            .iter()
            .enumerate()
            .map(|(id, entry)| (entry.clone(), json!(id)))
            .collect();
        let added: Vec<Value> = special
            .iter()
            .map(|(content, id)| {
                json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": true, "use_regex": true});
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges},
        });
        let config = json!({"tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0],
            "model_max_length": 131_072, "chat_template": template});
        let files = vec![
            file("tokenizer.json", tokenizer.to_string().into_bytes()),
            file("tokenizer_config.json", config.to_string().into_bytes()),
            file("chat_template.jinja", template.as_bytes().to_vec()),
        ];
        Self {
            special,
            ..Self::from_files(files, vec![END_OF_TURN, END_OF_TEXT], &tokenizer)
        }
    }

    /// Ids of a text: special tokens for themselves, an id a byte else.
    ///
    /// # Panics
    /// Where this is not a vocabulary that this crate makes.
    #[must_use]
    pub fn spell(&self, mut text: &str) -> Vec<u32> {
        assert!(!self.special.is_empty(), "it is read from files");
        let mut ids = Vec::new();
        while let Some(first) = text.chars().next() {
            let special = self
                .special
                .iter()
                .find(|(mark, _)| text.starts_with(mark.as_str()));
            let (part, rest) = match special {
                Some((mark, id)) => {
                    ids.push(*id);
                    text.split_at(mark.len())
                }
                None => text.split_at(first.len_utf8()),
            };
            if special.is_none() {
                ids.extend(Self::byte_ids(part));
            }
            text = rest;
        }
        ids
    }

    /// What the vocabulary that this crate makes has for a text without spaces:
    /// an id a byte, since all its merges begin with a space.
    #[must_use]
    pub fn byte_ids(text: &str) -> Vec<u32> {
        let first = SPECIAL.len() as u32;
        text.bytes().map(|byte| first + u32::from(byte)).collect()
    }

    /// The tokeniser in a model's folder: `tokenizer.json` and, where they are
    /// there, `tokenizer_config.json` and `chat_template.jinja`.
    ///
    /// # Errors
    /// Where `tokenizer.json` cannot be read, is not JSON or has no vocabulary
    /// of a byte-level BPE with plain text in it.
    pub fn from_folder(folder: &Path) -> io::Result<Self> {
        let mut files = vec![file(
            "tokenizer.json",
            std::fs::read(folder.join("tokenizer.json"))?,
        )];
        for name in ["tokenizer_config.json", "chat_template.jinja"] {
            match std::fs::read(folder.join(name)) {
                Ok(bytes) => files.push(file(name, bytes)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let tokenizer: Value = serde_json::from_slice(&files[0].bytes)?;
        let end = tokenizer["added_tokens"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|token| {
                matches!(
                    token["content"].as_str(),
                    Some("<|im_end|>" | "<|endoftext|>" | "</s>" | "<|eot_id|>")
                )
            })
            .filter_map(|token| u32::try_from(token["id"].as_u64()?).ok())
            .collect();
        let vocabulary = Self::from_files(files, end, &tokenizer);
        if vocabulary.text_ids.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "tokenizer.json has no byte-level vocabulary",
            ));
        }
        Ok(vocabulary)
    }

    fn from_files(
        files: Vec<VocabularyFile>,
        end_of_text_ids: Vec<u32>,
        tokenizer: &Value,
    ) -> Self {
        let bytes: HashMap<char, u8> = (0..=u8::MAX).map(|b| (byte_char(b), b)).collect();
        let special: HashSet<u64> = tokenizer["added_tokens"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|token| token["id"].as_u64())
            .collect();
        let vocab = tokenizer["model"]["vocab"].as_object();
        let highest = vocab
            .into_iter()
            .flat_map(|vocab| vocab.values())
            .filter_map(Value::as_u64)
            .chain(special.iter().copied())
            .max();
        let mut texts = vec![String::new(); highest.map_or(0, |id| id as usize + 1)];
        let mut text_ids = Vec::new();
        for (entry, id) in vocab.into_iter().flatten() {
            let Some(id) = id.as_u64().filter(|id| !special.contains(id)) else {
                continue;
            };
            let raw: Option<Vec<u8>> = entry.chars().map(|c| bytes.get(&c).copied()).collect();
            // Plain ASCII only: any sequence of such tokens is valid UTF-8, and
            // its text is the texts one after the other.
            let plain = raw.filter(|raw| raw.iter().all(|b| matches!(b, b' '..=b'~')));
            if let Some(text) = plain.and_then(|raw| String::from_utf8(raw).ok()) {
                texts[id as usize] = text;
                text_ids.push(id as u32);
            }
        }
        text_ids.sort_unstable();
        Self {
            special: Vec::new(),
            digest: digest(&files),
            files,
            texts,
            text_ids,
            end_of_text_ids,
        }
    }

    /// The files, `tokenizer.json` first.
    #[must_use]
    pub fn files(&self) -> &[VocabularyFile] {
        &self.files
    }

    /// SHA-256 over the files as `TokenizerHeader.digest` defines it.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Number of token ids.
    #[must_use]
    pub fn size(&self) -> u32 {
        self.texts.len() as u32
    }

    /// Ids whose text is printable ASCII, ascending.
    #[must_use]
    pub fn text_ids(&self) -> &[u32] {
        &self.text_ids
    }

    /// Text of an id of `text_ids`; empty for any other.
    #[must_use]
    pub fn text(&self, id: u32) -> &str {
        self.texts.get(id as usize).map_or("", String::as_str)
    }

    /// Ids that end a text.
    #[must_use]
    pub fn end_of_text_ids(&self) -> &[u32] {
        &self.end_of_text_ids
    }
}

fn file(name: &str, bytes: Vec<u8>) -> VocabularyFile {
    VocabularyFile {
        name: name.to_owned(),
        bytes,
    }
}

/// The character that stands for a byte in byte-level BPE (GPT-2): printable
/// bytes for themselves, the others from U+0100 on.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count();
    char::from_u32(0x100 + before as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn digest(files: &[VocabularyFile]) -> String {
    let mut hash = Sha256::new();
    for file in files {
        hash.update(file.name.as_bytes());
        hash.update([0]);
        hash.update((file.bytes.len() as u64).to_le_bytes());
        hash.update(&file.bytes);
    }
    hash.finalize().iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_characters_are_those_of_gpt2() {
        assert_eq!(byte_char(b' '), 'Ġ');
        assert_eq!(byte_char(b'\n'), 'Ċ');
        assert_eq!(byte_char(b'a'), 'a');
        let all: HashSet<char> = (0..=u8::MAX).map(byte_char).collect();
        assert_eq!(all.len(), 256);
    }

    #[test]
    fn the_built_in_vocabulary_has_some_hundred_entries_and_plain_texts() {
        let vocabulary = Vocabulary::built_in();
        assert!((400..1_000).contains(&vocabulary.size()));
        assert!(
            vocabulary
                .text_ids()
                .iter()
                .any(|id| vocabulary.text(*id) == " the")
        );
        assert!(
            vocabulary
                .end_of_text_ids()
                .iter()
                .all(|id| !vocabulary.text_ids().contains(id))
        );
        assert_eq!(vocabulary.digest(), Vocabulary::built_in().digest());
        assert_eq!(vocabulary.digest().len(), 64);
    }
}
