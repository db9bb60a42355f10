//! What can go wrong, typed by whom it concerns.

use thiserror::Error;

/// Longest message taken from a template or a tokeniser, in bytes.
pub(crate) const MAX_MESSAGE: usize = 1024;

/// Cuts a message at a character border, at most [`MAX_MESSAGE`] bytes.
pub(crate) fn cut(mut message: String) -> String {
    if message.len() > MAX_MESSAGE {
        let mut end = MAX_MESSAGE;
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
    }
    message
}

/// A worker's tokeniser files cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LoadError {
    /// A required file is not there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A file name that is not known, or one given twice.
    #[error("unexpected tokeniser file {0:?}")]
    Unexpected(String),
    /// A file above its limit.
    #[error("{name} has {size} bytes, the limit is {limit}")]
    TooLarge {
        /// The file.
        name: String,
        /// Its size in bytes.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// A file that is not what it should be. The message is at most 1 KiB.
    #[error("{name}: {message}")]
    Malformed {
        /// The file.
        name: String,
        /// What is wrong.
        message: String,
    },
    /// A decoder whose text cannot be made token by token.
    #[error("tokenizer.json: decoder {0} is not supported")]
    Decoder(String),
    /// The files' digest is not the one that was told.
    #[error("tokeniser digest is {found}, told was {told}")]
    Digest {
        /// Of the files.
        found: String,
        /// What was announced.
        told: String,
    },
}

/// Text could not be turned into token ids.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EncodeError {
    /// The caller's flag was raised: its client is gone.
    #[error("interrupted")]
    Interrupted,
    /// The tokeniser failed. The message is at most 1 KiB.
    #[error("tokeniser: {0}")]
    Tokenizer(String),
}

/// A chat could not be rendered. Messages are at most 1 KiB.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TemplateError {
    /// The model has no chat template.
    #[error("the model has no chat template")]
    None,
    /// The template called `raise_exception`.
    #[error("{0}")]
    Raised(String),
    /// The template ran too long.
    #[error("chat template ran out of fuel")]
    OutOfFuel,
    /// The rendered text is above the limit.
    #[error("rendered chat is longer than {limit} bytes")]
    TooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// The template is not valid.
    #[error("chat template: {0}")]
    Syntax(String),
    /// The template failed while running.
    #[error("chat template: {0}")]
    Failed(String),
}

/// A JSON argument of a chat is not usable.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum JsonError {
    /// Not JSON. The message is at most 1 KiB.
    #[error("not valid JSON: {0}")]
    Syntax(String),
    /// JSON, but not an object.
    #[error("not a JSON object")]
    NotAnObject,
}

/// Stop strings out of their bounds.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StopError {
    /// Too many.
    #[error("{count} stop strings, at most {limit} are allowed")]
    TooMany {
        /// How many were given.
        count: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// One is empty or too long.
    #[error("stop string {index} has {bytes} bytes, 1 to {limit} are allowed")]
    Length {
        /// Which one, from 0.
        index: usize,
        /// Its length in bytes.
        bytes: usize,
        /// Longest allowed, in bytes.
        limit: usize,
    },
}
