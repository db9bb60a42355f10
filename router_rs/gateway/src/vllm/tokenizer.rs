//! A model's tokeniser as one archive.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{Cursor, Write},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Response};
use http_body::Frame;
use kvmesh_text::TextFile;
use kvmesh_wire::smg::grpc::common::{GetTokenizerChunk, GetTokenizerRequest};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use super::model_of;
use crate::{
    access::Visit,
    door::Refused,
    error::RequestError,
    mesh::ServedModel,
    serve::{Call, Shared, body::ResponseBody, grpc},
    telemetry::Step,
};

const NAME: &str = "VllmEngine/GetTokenizer";
/// Bytes of the archive in a message: as vLLM's have.
const CHUNK_BYTES: usize = 64 << 10;

/// An archive, shared by those who read it.
struct Packed {
    bytes: Bytes,
    sha256: String,
}

/// The archives that somebody reads now, by the digests of their files.
pub(super) struct Archives {
    made: Mutex<BTreeMap<String, Weak<Packed>>>,
    /// One is made at a time: the others find it made.
    making: Semaphore,
}

impl Default for Archives {
    fn default() -> Self {
        Self {
            made: Mutex::default(),
            making: Semaphore::new(1),
        }
    }
}

impl Archives {
    fn made(&self, digest: &str) -> Option<Arc<Packed>> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.retain(|_, packed| packed.strong_count() > 0);
        made.get(digest).and_then(Weak::upgrade)
    }

    async fn of(&self, shared: &Shared, model: &ServedModel) -> Result<Arc<Packed>, RequestError> {
        let digest = &model.record.tokenizer_digest;
        if let Some(packed) = self.made(digest) {
            return Ok(packed);
        }
        let ended = |_| RequestError::ShuttingDown { next_index: 0 };
        let _one = self.making.acquire().await.map_err(ended)?;
        if let Some(packed) = self.made(digest) {
            return Ok(packed);
        }
        let files = shared.mesh.tokenizer_files(&model.record).await?;
        let packed = tokio::task::spawn_blocking(move || pack(&files)).await;
        let packed = packed.map_err(|_| RequestError::ShuttingDown { next_index: 0 })?;
        let packed = Arc::new(packed.map_err(|error| RequestError::Text(error.to_string()))?);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.insert(digest.clone(), Arc::downgrade(&packed));
        Ok(packed)
    }
}

/// Files as they are: what is read once need not be small. The same files are the same archive.
fn pack(files: &[TextFile]) -> zip::result::ZipResult<Packed> {
    let plain = SimpleFileOptions::DEFAULT.compression_method(CompressionMethod::Stored);
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    for file in files {
        archive.start_file(file.name.as_str(), plain)?;
        archive.write_all(&file.bytes)?;
    }
    let bytes = archive.finish()?.into_inner();
    let digest = Sha256::digest(&bytes);
    let mut sha256 = String::with_capacity(64);
    for byte in digest {
        // Writing to a String cannot fail.
        let _ = write!(sha256, "{byte:02x}");
    }
    Ok(Packed {
        bytes: bytes.into(),
        sha256,
    })
}

/// Answers a call.
pub(super) async fn answer(shared: &Arc<Shared>, call: Call) -> Response<ResponseBody> {
    let back = call.metadata.headers();
    let opened: Result<Archive, Refused> = async {
        // As large as a request: it takes a request's place.
        let (_, visit) = shared.enter(&call)?;
        let model = model_of(shared, &call)?;
        let read = shared.door.read_small(&call.headers, call.body);
        let _: GetTokenizerRequest = read.await?;
        let packed = shared.vllm.archives.of(shared, &model).await;
        let packed = packed.map_err(|error| (Step::Admission, error))?;
        Ok(Archive {
            packed,
            sent: 0,
            trailers: Some(grpc::ok_trailers()),
            _visit: visit,
        })
    }
    .await;
    match opened {
        Ok(archive) => {
            shared.telemetry.ended(NAME, None);
            grpc::response(ResponseBody::Archive(Box::new(archive)), &back)
        }
        Err(refused) => {
            shared.refused(NAME, &refused);
            grpc::refusal(&refused.1.to_status(), &back)
        }
    }
}

/// An archive on its way: a message at a time, when there is room for it.
pub(crate) struct Archive {
    packed: Arc<Packed>,
    sent: usize,
    trailers: Option<HeaderMap>,
    /// Counted as its tenant's until it is dropped.
    _visit: Visit,
}

impl Archive {
    /// The next frame.
    pub(crate) fn next(&mut self) -> Option<Frame<Bytes>> {
        let Packed { bytes, sha256 } = &*self.packed;
        if self.sent == bytes.len() {
            return self.trailers.take().map(Frame::trailers);
        }
        let end = bytes.len().min(self.sent + CHUNK_BYTES);
        let last = end == bytes.len();
        let chunk = GetTokenizerChunk {
            data: bytes.slice(self.sent..end),
            sha256: if last { sha256.clone() } else { String::new() },
        };
        self.sent = end;
        let mut frame = BytesMut::new();
        grpc::encode_into(&chunk, &mut frame);
        Some(Frame::data(frame.freeze()))
    }

    /// Nothing comes any more.
    pub(crate) fn is_done(&self) -> bool {
        self.trailers.is_none()
    }
}
