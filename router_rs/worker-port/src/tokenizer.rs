//! The tokeniser's files, as `GetTokenizer` sends them.

use bytes::Bytes;
use kvmesh_wire::v1::{
    GetTokenizerResponse, TokenizerFile, TokenizerHeader, get_tokenizer_response::Part,
};

/// Bytes in one message.
const PART_BYTES: usize = 1 << 20;

/// Files of a tokeniser and their digest (worker.proto, `TokenizerHeader`).
#[derive(Clone, Debug, Default)]
pub struct TokenizerFiles {
    /// Names and contents, in the order of the digest.
    pub files: Vec<(String, Bytes)>,
    /// 64 hexadecimal digits.
    pub digest: String,
}

impl TokenizerFiles {
    /// The header, then the bytes unless they are known.
    pub(crate) fn messages(
        &self,
        known_digest: &str,
    ) -> impl Iterator<Item = GetTokenizerResponse> + Send + use<> {
        let files = self.files.iter().map(|(name, content)| TokenizerFile {
            name: name.clone(),
            size: content.len() as u64,
        });
        let header = Part::Header(TokenizerHeader {
            digest: self.digest.clone(),
            files: files.collect(),
        });
        let contents = if known_digest == self.digest {
            Vec::new()
        } else {
            self.files.clone()
        };
        let parts = contents.into_iter().flat_map(|(_, content)| {
            (0..content.len()).step_by(PART_BYTES).map(move |begin| {
                Part::Data(content.slice(begin..content.len().min(begin + PART_BYTES)))
            })
        });
        std::iter::once(header)
            .chain(parts)
            .map(|part| GetTokenizerResponse { part: Some(part) })
    }
}
