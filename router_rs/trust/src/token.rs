//! The cluster's token: what routers and workers of one cluster have in common,
//! and nobody else.

use std::{fmt, path::Path};

use subtle::{Choice, ConstantTimeEq};
use tonic::metadata::{Ascii, MetadataValue};

use crate::followed::{Followed, Wrong};

/// Header of a call to a worker that shows the token.
pub const TOKEN_HEADER: &str = "kvmesh-cluster-token";

/// Shortest and longest token, in bytes. The shortest has 96 bits where it was
/// drawn from 64 characters.
const LENGTH: std::ops::RangeInclusive<usize> = 16..=512;
/// Most tokens in a file.
const MOST: usize = 8;

/// The token that is shown, and those that are accepted.
#[derive(Clone)]
pub struct ClusterToken {
    /// The first one is shown, all are accepted: so a token can be changed while
    /// everybody runs.
    tokens: Vec<MetadataValue<Ascii>>,
}

impl fmt::Debug for ClusterToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterToken(…)")
    }
}

impl ClusterToken {
    /// Follows the file of the setting `cluster_token_file`: a token a line.
    ///
    /// # Errors
    /// [`FileError`](crate::FileError) for one that cannot be read or used.
    pub fn open(file: &Path) -> Result<Followed<Self>, crate::FileError> {
        let files = vec![("cluster_token_file", file.to_owned())];
        Followed::open(files, |said, _| {
            let text = said.first().map(Vec::as_slice).unwrap_or_default();
            Self::parse(text).map_err(|reason| Wrong::new(0, reason))
        })
    }

    /// # Errors
    /// What is allowed.
    fn parse(text: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(text).map_err(|_| "it is no text".to_owned())?;
        let mut tokens = Vec::new();
        let lines = text.lines().map(str::trim).enumerate();
        for (n, line) in lines.filter(|(_, line)| !line.is_empty()) {
            let fits = LENGTH.contains(&line.len()) && line.bytes().all(|c| c.is_ascii_graphic());
            let token = fits.then(|| line.parse::<MetadataValue<Ascii>>().ok());
            let Some(mut token) = token.flatten() else {
                return Err(format!(
                    "line {} is no token; allowed are {} to {} visible ASCII characters \
                     (`openssl rand -hex 32` makes such a line)",
                    n + 1,
                    LENGTH.start(),
                    LENGTH.end(),
                ));
            };
            // Never printed, and never kept in a table of headers.
            token.set_sensitive(true);
            tokens.push(token);
        }
        match tokens.len() {
            1..=MOST => Ok(Self { tokens }),
            n => Err(format!("it has {n} tokens; allowed are 1 to {MOST}")),
        }
    }

    /// What is shown to others.
    #[must_use]
    pub fn shown(&self) -> &MetadataValue<Ascii> {
        &self.tokens[0]
    }

    /// Whether this is a token of the cluster. Takes as long for one that is nearly
    /// right as for any other of its length.
    #[must_use]
    pub fn accepts(&self, given: &[u8]) -> bool {
        let one = |token: &MetadataValue<Ascii>| token.as_encoded_bytes().ct_eq(given);
        self.tokens
            .iter()
            .fold(Choice::from(0), |known, token| known | one(token))
            .into()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const OLD: &str = "0123456789abcdef";
    const NEW: &str = "fedcba9876543210";

    #[test]
    fn the_first_one_is_shown_and_each_is_accepted() {
        let file = format!("\n  {NEW} \n{OLD}\n");
        let token = ClusterToken::parse(file.as_bytes()).unwrap();
        assert_eq!(token.shown(), NEW);
        assert!(token.accepts(NEW.as_bytes()) && token.accepts(OLD.as_bytes()));
        for wrong in [
            "",
            "0123456789abcdeX",
            "0123456789abcde",
            "0123456789abcdef0",
        ] {
            assert!(!token.accepts(wrong.as_bytes()), "{wrong}");
        }
        assert!(token.shown().is_sensitive());
        let printed = format!("{token:?}{:?}", token.shown());
        assert!(!printed.contains(NEW), "{printed}");
    }

    #[test]
    fn what_is_no_token_is_refused_without_being_told() {
        let long = "x".repeat(513);
        let many = format!("{OLD}\n").repeat(9);
        let wrong = [
            "",
            "\n\n",
            "short",
            "with a space in the middle",
            &long,
            &many,
        ];
        for text in wrong
            .into_iter()
            .map(str::as_bytes)
            .chain([&b"\xff\xff"[..]])
        {
            let reason = ClusterToken::parse(text).unwrap_err();
            assert!(
                !reason.contains("short") && !reason.contains(OLD),
                "{reason}"
            );
        }
    }
}
