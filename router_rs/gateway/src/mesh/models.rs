//! The models that are served, and their tokenisers.
//!
//! A tokeniser is fetched from a worker over a connection of its own, once a
//! digest, checked by that digest and kept on disk. Nothing on the health path
//! waits for it, and no session does: a model is listed when its text is here.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kvmesh_rpc::v1::worker_client::WorkerClient;
use kvmesh_text::{Limits, ModelText, TextFile};
use kvmesh_wire::v1::{self, get_tokenizer_response::Part};
use tokio::task;

use super::session::connect;

/// Most files and bytes that a worker may send as its tokeniser.
const MAX_FILES: usize = 8;
const MAX_BYTES: u64 = 96 << 20;
/// Bound on one download.
const FETCH_TIMEOUT: Duration = Duration::from_secs(120);
/// File in a cached tokeniser's folder that lists its files in order.
const ORDER: &str = "order";

/// A model that can be asked for.
pub struct ServedModel {
    /// Name, digests, limits, end-of-text ids, adapters.
    pub record: v1::ModelRecord,
    /// What the engine of its workers can do. Workers of one model agree in
    /// what a request can ask for; where they do not, the first one counts.
    pub capabilities: v1::Capabilities,
    /// Template, tokeniser, detokeniser.
    pub text: Arc<ModelText>,
}

/// Why a tokeniser could not be fetched.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("worker cannot be reached: {0}")]
    Connect(#[from] tonic::transport::Error),
    #[error("worker answered: {0}")]
    Status(#[from] tonic::Status),
    #[error("worker sent {0}")]
    Malformed(&'static str),
    #[error(transparent)]
    Load(#[from] kvmesh_text::LoadError),
    #[error("digest is {found}, told was {told}")]
    Digest { found: String, told: String },
    #[error("took too long")]
    Timeout,
    #[error("loading was interrupted")]
    Interrupted,
}

/// All models.
#[derive(Default)]
pub(super) struct Models {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// What workers said, by model name.
    told: BTreeMap<String, (v1::ModelRecord, v1::Capabilities)>,
    served: BTreeMap<String, Arc<ServedModel>>,
    texts: BTreeMap<String, Arc<ModelText>>,
    fetching: BTreeSet<String>,
}

impl Models {
    // Maps are whole after each operation.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A model by name.
    pub(super) fn get(&self, name: &str) -> Option<Arc<ServedModel>> {
        self.lock().served.get(name).cloned()
    }

    /// All models that can be asked for, by name.
    pub(super) fn all(&self) -> Vec<Arc<ServedModel>> {
        self.lock().served.values().cloned().collect()
    }

    /// Names that workers told of, with those whose tokeniser is on its way.
    pub(super) fn told(&self, name: &str) -> bool {
        self.lock().told.contains_key(name)
    }

    /// A worker told its model. `None` where its digests are others than those
    /// of the model of that name; else whether its tokeniser has to be fetched.
    pub(super) fn tell(
        &self,
        record: &v1::ModelRecord,
        capabilities: &v1::Capabilities,
        alone: bool,
    ) -> Option<bool> {
        let mut inner = self.lock();
        if let Some((known, _)) = inner.told.get(&record.name)
            && !alone
            && (known.digest != record.digest || known.tokenizer_digest != record.tokenizer_digest)
        {
            return None;
        }
        inner
            .told
            .insert(record.name.clone(), (record.clone(), capabilities.clone()));
        if let Some(text) = inner.texts.get(&record.tokenizer_digest).cloned() {
            inner.serve(&text);
            return Some(false);
        }
        Some(inner.fetching.insert(record.tokenizer_digest.clone()))
    }

    /// A download came to its end.
    pub(super) fn fetched(&self, digest: &str, text: Option<Arc<ModelText>>) {
        let mut inner = self.lock();
        inner.fetching.remove(digest);
        if let Some(text) = text {
            inner.texts.insert(digest.to_owned(), Arc::clone(&text));
            inner.serve(&text);
        }
    }
}

impl Inner {
    fn serve(&mut self, text: &Arc<ModelText>) {
        for (name, (record, capabilities)) in &self.told {
            if record.tokenizer_digest == text.digest() {
                let same = self
                    .served
                    .get(name)
                    .is_some_and(|model| model.record == *record);
                if !same {
                    let model = ServedModel {
                        record: record.clone(),
                        capabilities: capabilities.clone(),
                        text: Arc::clone(text),
                    };
                    self.served.insert(name.clone(), Arc::new(model));
                }
            }
        }
    }
}

/// A tokeniser from disk, or from a worker and then to disk.
pub(super) async fn fetch(
    address: &str,
    digest: &str,
    cache: Option<&Path>,
) -> Result<Arc<ModelText>, FetchError> {
    let folder = cache
        .filter(|_| digest.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .map(|cache| cache.join("tokenizers").join(digest));
    if let Some(folder) = folder.clone()
        && let Ok(files) = task::spawn_blocking(move || read_folder(&folder)).await
        && let Some(files) = files
        && let Ok(text) = load(files, digest).await
    {
        return Ok(text);
    }
    let files = tokio::time::timeout(FETCH_TIMEOUT, download(address))
        .await
        .map_err(|_| FetchError::Timeout)??;
    let text = load(files.clone(), digest).await?;
    if let Some(folder) = folder {
        let written = task::spawn_blocking(move || write_folder(&folder, &files)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(%error, "tokeniser could not be kept on disk");
        }
    }
    Ok(text)
}

async fn load(files: Vec<TextFile>, digest: &str) -> Result<Arc<ModelText>, FetchError> {
    let text = task::spawn_blocking(move || ModelText::from_files(&files, &Limits::default()))
        .await
        .map_err(|_| FetchError::Interrupted)??;
    if text.digest() == digest {
        Ok(Arc::new(text))
    } else {
        let found = text.digest().to_owned();
        Err(FetchError::Digest {
            found,
            told: digest.to_owned(),
        })
    }
}

async fn download(address: &str) -> Result<Vec<TextFile>, FetchError> {
    let channel = connect(address, Duration::from_secs(10)).await?;
    let mut parts = WorkerClient::new(channel)
        .get_tokenizer(v1::GetTokenizerRequest::default())
        .await?
        .into_inner();
    let Some(Part::Header(header)) = parts.message().await?.and_then(|first| first.part) else {
        return Err(FetchError::Malformed("no header"));
    };
    let total: u64 = header
        .files
        .iter()
        .map(|file| file.size.min(MAX_BYTES + 1))
        .sum();
    if header.files.len() > MAX_FILES || total > MAX_BYTES {
        return Err(FetchError::Malformed("too much"));
    }
    let mut bytes = Vec::new();
    while let Some(message) = parts.message().await? {
        let Some(Part::Data(data)) = message.part else {
            return Err(FetchError::Malformed("a second header"));
        };
        if (bytes.len() + data.len()) as u64 > total {
            return Err(FetchError::Malformed("more than its header told"));
        }
        bytes.extend_from_slice(&data);
    }
    if bytes.len() as u64 != total {
        return Err(FetchError::Malformed("less than its header told"));
    }
    let mut files = Vec::new();
    for file in header.files {
        let size = usize::try_from(file.size)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let rest = bytes.split_off(size);
        files.push(TextFile {
            name: file.name,
            bytes: std::mem::replace(&mut bytes, rest),
        });
    }
    Ok(files)
}

fn read_folder(folder: &Path) -> Option<Vec<TextFile>> {
    let order = std::fs::read_to_string(folder.join(ORDER)).ok()?;
    let read = |name: &str| {
        let bytes = std::fs::read(folder.join(name)).ok()?;
        Some(TextFile {
            name: name.to_owned(),
            bytes,
        })
    };
    // What is read is checked by its digest; a name could still lead outside.
    if order
        .lines()
        .any(|name| name.contains(['/', '\\']) || name.starts_with('.'))
    {
        return None;
    }
    order.lines().map(read).collect()
}

/// Writes aside and renames: what is there is whole.
fn write_folder(folder: &Path, files: &[TextFile]) -> std::io::Result<()> {
    let aside: PathBuf = folder.with_extension(format!("{}.part", std::process::id()));
    std::fs::create_dir_all(&aside)?;
    for file in files {
        std::fs::write(aside.join(&file.name), &file.bytes)?;
    }
    let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    std::fs::write(aside.join(ORDER), names.join("\n"))?;
    std::fs::rename(&aside, folder).or_else(|error| {
        // Another router was faster, or a broken folder is in the way.
        std::fs::remove_dir_all(folder)?;
        std::fs::rename(&aside, folder).map_err(|_| error)
    })
}
