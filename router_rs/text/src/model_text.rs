//! All that a model needs to turn text into ids and back.

use crate::chat::Chat;
use crate::detokenize::Detokenizer;
use crate::error::{EncodeError, LoadError, StopError, TemplateError, cut};
use crate::files::{TextFile, digest_of};
use crate::pieces::Pieces;
use crate::stream::{TextSettings, TextStream};
use crate::template::ChatTemplate;
use crate::time::UnixSeconds;
use minijinja::Value;
use serde_json::Map;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokenizers::tokenizer::{
    Model, OffsetReferential, OffsetType, PostProcessorWrapper, PreTokenizer, Tokenizer,
};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";

/// Bounds of what a worker's files may be and do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Size of tokenizer.json in bytes.
    pub tokenizer_bytes: usize,
    /// Size of tokenizer_config.json in bytes.
    pub config_bytes: usize,
    /// Size of chat_template.jinja in bytes.
    pub template_bytes: usize,
    /// Work a template may do: about one unit an instruction, and one for 64
    /// bytes of text made.
    pub template_fuel: u64,
    /// Length of a rendered chat in bytes.
    pub rendered_bytes: usize,
}

impl Default for Limits {
    /// The largest published tokenisers are some 35 MiB; four million units of
    /// fuel are well under a second.
    fn default() -> Self {
        Self {
            tokenizer_bytes: 64 << 20,
            config_bytes: 8 << 20,
            template_bytes: 1 << 20,
            template_fuel: 4_000_000,
            rendered_bytes: 64 << 20,
        }
    }
}

/// A model's tokeniser and chat template. Shared, immutable.
#[derive(Debug)]
pub struct ModelText {
    digest: String,
    tokenizer: Tokenizer,
    pieces: Arc<Pieces>,
    template: Option<ChatTemplate>,
    vocabulary_size: usize,
    longest_token: usize,
    /// Most bytes of input that a byte of tokens may stand for; none where
    /// the tokeniser may drop text.
    shrink: Option<usize>,
}

impl ModelText {
    /// Reads a model's files, in the order in which they are digested.
    ///
    /// # Errors
    /// [`LoadError`] for missing, unknown, too large or malformed files, and
    /// for decoders that cannot work token by token.
    pub fn from_files(files: &[TextFile], limits: &Limits) -> Result<Self, LoadError> {
        let mut seen = HashSet::new();
        for file in files {
            let limit = match file.name.as_str() {
                TOKENIZER => limits.tokenizer_bytes,
                CONFIG => limits.config_bytes,
                TEMPLATE => limits.template_bytes,
                _ => return Err(LoadError::Unexpected(cut(file.name.clone()))),
            };
            if !seen.insert(file.name.as_str()) {
                return Err(LoadError::Unexpected(file.name.clone()));
            }
            if file.bytes.len() > limit {
                let (name, size) = (file.name.clone(), file.bytes.len());
                return Err(LoadError::TooLarge { name, size, limit });
            }
        }
        let bytes = |name: &str| {
            files
                .iter()
                .find(|file| file.name == name)
                .map(|file| file.bytes.as_slice())
        };
        let source = bytes(TOKENIZER).ok_or(LoadError::Missing(TOKENIZER))?;
        let json: serde_json::Value = parse(TOKENIZER, source)?;
        let mut tokenizer = Tokenizer::from_bytes(source)
            .map_err(|error| malformed(TOKENIZER, error.to_string()))?;
        // A prompt is never cut or filled up behind its client's back.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| malformed(TOKENIZER, error.to_string()))?;
        let config = match bytes(CONFIG) {
            Some(source) => parse(CONFIG, source)?,
            None => Map::new(),
        };
        let template = match template_sources(bytes(TEMPLATE), &config)? {
            sources if sources.is_empty() => None,
            sources => Some(ChatTemplate::new(
                &sources,
                special_tokens(&config),
                limits.template_fuel,
                limits.rendered_bytes,
            )?),
        };
        let pieces = Arc::new(Pieces::new(&tokenizer, &json["decoder"])?);
        Ok(Self {
            digest: digest_of(files),
            vocabulary_size: tokenizer.get_vocab_size(true),
            longest_token: pieces.longest(),
            shrink: shrink_of(&json),
            tokenizer,
            pieces,
            template,
        })
    }

    /// Digest of the files, as `TokenizerHeader.digest`.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Number of token ids, added ones included.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }

    /// Bytes of the longest token.
    pub fn longest_token_bytes(&self) -> usize {
        self.longest_token
    }

    /// A lower bound on the number of tokens of a text of this many bytes,
    /// without looking at it. 0 where the tokeniser may drop parts of a text,
    /// so that nothing can be said.
    pub fn fewest_tokens(&self, bytes: usize) -> usize {
        self.shrink
            .map_or(0, |factor| bytes / (self.longest_token.max(1) * factor))
    }

    /// Whether messages can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// The sources of the chat templates; none where messages cannot be rendered.
    pub fn chat_templates(&self) -> impl Iterator<Item = &str> {
        self.template.iter().flat_map(ChatTemplate::sources)
    }

    /// Token ids of plain text, with the special tokens that the tokeniser
    /// adds (a beginning-of-text token, say).
    ///
    /// # Errors
    /// [`EncodeError::Interrupted`] soon after `interrupted` is set: it is
    /// looked at before each piece of text.
    pub fn encode(&self, text: &str, interrupted: &AtomicBool) -> Result<Vec<u32>, EncodeError> {
        self.encode_as(text, true, interrupted)
    }

    /// Token ids of a rendered chat: the template has written the special
    /// tokens already, none are added.
    ///
    /// # Errors
    /// As [`ModelText::encode`].
    pub fn encode_rendered(
        &self,
        text: &str,
        interrupted: &AtomicBool,
    ) -> Result<Vec<u32>, EncodeError> {
        self.encode_as(text, false, interrupted)
    }

    /// The prompt that a conversation makes.
    ///
    /// # Errors
    /// [`TemplateError`] for a missing template and for what it does wrong.
    pub fn render_chat(&self, chat: &Chat, now: UnixSeconds) -> Result<String, TemplateError> {
        self.template
            .as_ref()
            .ok_or(TemplateError::None)?
            .render(chat, now)
    }

    /// What a token is in bytes in the middle of a text, special ones included;
    /// `None` for ids outside the vocabulary. Not always whole characters.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.pieces.get(id).map(|piece| piece.bytes)
    }

    /// A detokeniser at the beginning of an output.
    pub fn detokenizer(&self, special_tokens: bool) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.pieces), special_tokens, [].into())
    }

    /// The text side of one generation, at the beginning of its output.
    ///
    /// # Errors
    /// [`StopError`] for stop strings out of their bounds.
    pub fn stream(&self, settings: &TextSettings) -> Result<TextStream, StopError> {
        let id = |text: &String| self.tokenizer.token_to_id(text);
        let kept = settings.kept_special_tokens.iter().filter_map(id).collect();
        let pieces = Arc::clone(&self.pieces);
        let detokenizer = Detokenizer::new(pieces, settings.special_tokens, kept);
        TextStream::new(detokenizer, settings)
    }

    /// As the tokeniser's own `encode`, taken apart so that it can be ended
    /// between pieces.
    fn encode_as(
        &self,
        text: &str,
        add_special: bool,
        interrupted: &AtomicBool,
    ) -> Result<Vec<u32>, EncodeError> {
        let failed = |error: tokenizers::Error| {
            if interrupted.load(Ordering::Relaxed) {
                EncodeError::Interrupted
            } else {
                EncodeError::Tokenizer(cut(error.to_string()))
            }
        };
        let check = || {
            if interrupted.load(Ordering::Relaxed) {
                Err("interrupted".into())
            } else {
                Ok(())
            }
        };
        check().map_err(failed)?;
        let tokenizer = &self.tokenizer;
        let added = tokenizer.get_added_vocabulary();
        let mut pieces = added.extract_and_normalize(tokenizer.get_normalizer(), text);
        check().map_err(failed)?;
        if let Some(splitter) = tokenizer.get_pre_tokenizer() {
            splitter.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        let model = tokenizer.get_model();
        pieces
            .tokenize(|piece| {
                check()?;
                model.tokenize(piece.get())
            })
            .map_err(failed)?;
        // One that looks at offsets alone leaves ids as they are: then no encoding is made, which
        // has a text, offsets and masks for each token.
        if let None | Some(PostProcessorWrapper::ByteLevel(_)) = tokenizer.get_post_processor() {
            let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
            let tokens = splits.iter().filter_map(|(_, _, tokens)| tokens.as_ref());
            return Ok(tokens.flatten().map(|token| token.id).collect());
        }
        let encoding = pieces
            .into_encoding(None, 0, OffsetType::None)
            .map_err(failed)?;
        let encoding = tokenizer
            .post_process(encoding, None, add_special)
            .map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }
}

fn malformed(name: &str, message: String) -> LoadError {
    LoadError::Malformed {
        name: name.to_owned(),
        message: cut(message),
    }
}

fn parse<T: serde::de::DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, LoadError> {
    serde_json::from_slice(bytes).map_err(|error| malformed(name, error.to_string()))
}

/// Templates by name: the file of its own, else the config's string, else its
/// list of named ones.
fn template_sources(
    file: Option<&[u8]>,
    config: &Map<String, serde_json::Value>,
) -> Result<Vec<(String, String)>, LoadError> {
    let default = "default".to_owned();
    if let Some(bytes) = file {
        let text =
            std::str::from_utf8(bytes).map_err(|error| malformed(TEMPLATE, error.to_string()))?;
        return Ok(vec![(default, text.to_owned())]);
    }
    match config.get("chat_template") {
        Some(serde_json::Value::String(text)) => Ok(vec![(default, text.clone())]),
        Some(serde_json::Value::Array(named)) => Ok(named
            .iter()
            .filter_map(|entry| {
                let name = entry.get("name")?.as_str()?;
                Some((name.to_owned(), entry.get("template")?.as_str()?.to_owned()))
            })
            .collect()),
        _ => Ok(Vec::new()),
    }
}

/// `bos_token` and its like, given as text or as an object with `content`.
fn special_tokens(config: &Map<String, serde_json::Value>) -> Vec<(String, Value)> {
    let mut tokens = Vec::new();
    for (key, value) in config {
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        if let Some(text) = text.filter(|_| key.ends_with("_token")) {
            tokens.push((key.clone(), Value::from(text)));
        }
    }
    tokens
}

/// By how much a tokeniser can shrink a text before it is cut into tokens.
fn shrink_of(json: &serde_json::Value) -> Option<usize> {
    fn of(part: &serde_json::Value) -> Option<usize> {
        if part.is_null() {
            return Some(1);
        }
        let nested = ["normalizers", "pretokenizers"]
            .iter()
            .find_map(|key| part.get(*key)?.as_array());
        if let Some(parts) = nested {
            return parts
                .iter()
                .try_fold(1usize, |all, part| Some(all.saturating_mul(of(part)?)));
        }
        match part["type"].as_str()? {
            // Grow, move or keep.
            "Prepend" | "ByteLevel" | "Metaspace" | "Digits" | "Punctuation" | "NFD" => Some(1),
            // Composition takes at most three code points for one; with
            // compatibility forms a four-byte letter may become one byte.
            "NFC" => Some(4),
            "NFKC" | "NFKD" => Some(12),
            "Split" if part["behavior"] != "Removed" => Some(1),
            "Replace" => {
                let from = part["pattern"]["String"].as_str()?;
                (part["content"].as_str()?.len() >= from.len()).then_some(1)
            }
            _ => None,
        }
    }
    of(&json["normalizer"])?.checked_mul(of(&json["pre_tokenizer"])?)
}
