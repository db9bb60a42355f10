//! Tokenisers on their way from a worker.
//!
//! A tokeniser is fetched over a connection of its own, once a digest, checked
//! by that digest and kept on disk. Nothing on the health path waits for it,
//! and no session does. A download that fails is tried again, at another worker
//! that has it where there is one, for as long as any worker does.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kvmesh_rpc::v1::worker_client::WorkerClient;
use kvmesh_session::WorkerIndex;
use kvmesh_text::{Limits, ModelText, TextFile, digest_of};
use kvmesh_wire::v1::{self, get_tokenizer_response::Part};
use tokio::task;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{
    Core, Mesh, backoff::Backoff, session::connect, settings::MeshSettings, table::WorkerEntry,
};
use crate::error::RequestError;

/// Most files and bytes that a worker may send as its tokeniser.
const MAX_FILES: usize = 8;
const MAX_BYTES: u64 = 96 << 20;
/// Bound on one download.
const FETCH_TIMEOUT: Duration = Duration::from_secs(120);
/// File in a cached tokeniser's folder that lists its files in order.
const ORDER: &str = "order";

/// Why a tokeniser could not be fetched.
#[derive(Debug, thiserror::Error)]
enum FetchError {
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

impl Core {
    /// Fetches the tokeniser that `worker` told of, in a task of its own.
    pub(super) fn fetch_tokenizer(self: &Arc<Self>, worker: &Arc<WorkerEntry>, digest: String) {
        let core = Arc::clone(self);
        let worker = Arc::clone(worker);
        self.tasks.spawn(async move {
            tokio::select! {
                () = core.stop.cancelled() => {}
                () = core.keep_fetching(worker, &digest) => {}
            }
        });
    }

    async fn keep_fetching(&self, mut worker: Arc<WorkerEntry>, digest: &str) {
        let seed = xxh3_64_with_seed(digest.as_bytes(), self.settings.incarnation);
        let mut backoff = Backoff::new(self.settings.tokenizer_retry, seed);
        loop {
            self.counters.tokenizer_fetches.add(1);
            let error = match fetch(&self.settings, &worker, digest).await {
                Ok(text) => {
                    tracing::info!(worker = %worker.name(), %digest, "tokeniser ready");
                    return self.models.fetched(text);
                }
                Err(error) => error,
            };
            self.counters.tokenizer_failures.add(1);
            tracing::warn!(worker = %worker.name(), %digest, %error, "no tokeniser");
            worker.set_detail(format!("its tokeniser cannot be used: {error}"));
            tokio::time::sleep(backoff.next()).await;
            let Some(next) = self.holder(digest, Some(worker.index)) else {
                self.models.given_up(digest);
                // A worker may have told of it before that line.
                match self.holder(digest, Some(worker.index)) {
                    Some(next) if self.models.claim(digest) => worker = next,
                    _ => return,
                }
                continue;
            };
            worker = next;
        }
    }

    /// A worker that has this tokeniser: a live one before others, and another
    /// than the one that failed before that one.
    fn holder(&self, digest: &str, failed: Option<WorkerIndex>) -> Option<Arc<WorkerEntry>> {
        let has = |worker: &Arc<WorkerEntry>| {
            let model = worker.record().and_then(|record| record.model);
            model.is_some_and(|model| model.tokenizer_digest == digest)
        };
        let workers = self.table.all().into_iter().filter(has);
        workers.max_by_key(|worker| (worker.live(), Some(worker.index) != failed))
    }
}

impl Mesh {
    /// The files of a model's tokeniser, from disk, or from a worker that has it: they are
    /// large, and nobody needs them once they are read.
    ///
    /// # Errors
    /// [`RequestError::NoWorker`] where neither has it now.
    pub(crate) async fn tokenizer_files(
        &self,
        model: &v1::ModelRecord,
    ) -> Result<Vec<TextFile>, RequestError> {
        let digest = &model.tokenizer_digest;
        let same = |files: &Vec<TextFile>| digest_of(files) == *digest;
        let folder = folder_of(self.core.settings.cache_dir.as_deref(), digest);
        if let Some(folder) = folder
            && let Ok(files) = task::spawn_blocking(move || read_folder(&folder)).await
            && let Some(files) = files.filter(same)
        {
            return Ok(files);
        }
        let none = |why: String| RequestError::NoWorker(format!("{}: {why}", model.name));
        let holder = self.core.holder(digest, None);
        let holder = holder.ok_or_else(|| none("no worker has its tokeniser".to_owned()))?;
        match tokio::time::timeout(FETCH_TIMEOUT, download(&self.core.settings, &holder)).await {
            Ok(Ok(files)) if same(&files) => Ok(files),
            Ok(Ok(_)) => Err(none("its tokeniser has another digest".to_owned())),
            Ok(Err(error)) => Err(none(format!("its tokeniser: {error}"))),
            Err(_) => Err(none(format!("its tokeniser: {}", FetchError::Timeout))),
        }
    }
}

/// Where a tokeniser is kept on disk.
fn folder_of(cache: Option<&Path>, digest: &str) -> Option<PathBuf> {
    cache
        .filter(|_| digest.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .map(|cache| cache.join("tokenizers").join(digest))
}

/// A tokeniser from disk, or from a worker and then to disk.
async fn fetch(
    settings: &MeshSettings,
    worker: &WorkerEntry,
    digest: &str,
) -> Result<Arc<ModelText>, FetchError> {
    let folder = folder_of(settings.cache_dir.as_deref(), digest);
    if let Some(folder) = folder.clone()
        && let Ok(files) = task::spawn_blocking(move || read_folder(&folder)).await
        && let Some(files) = files
        && let Ok(text) = load(files, digest).await
    {
        return Ok(text);
    }
    let files = tokio::time::timeout(FETCH_TIMEOUT, download(settings, worker))
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

async fn download(
    settings: &MeshSettings,
    worker: &WorkerEntry,
) -> Result<Vec<TextFile>, FetchError> {
    let connection = connect(settings, worker).await?;
    let mut parts = WorkerClient::new(connection.calls)
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
