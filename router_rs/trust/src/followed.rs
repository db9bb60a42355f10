//! Files that are read again when they change.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

/// How often files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Longest file, in bytes: some hundred thousand keys.
const MAX_BYTES: u64 = 16 << 20;

/// A file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {}: {reason}", file.display())]
pub struct FileError {
    /// The setting that names it.
    pub setting: &'static str,
    /// The file.
    pub file: PathBuf,
    /// What is wrong, and what is allowed. Never what the file says.
    pub reason: String,
}

/// What is wrong with one of the files, by its place among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Which file, from 0.
    pub file: usize,
    /// What is wrong, and what is allowed. Never what the file says.
    pub reason: String,
}

impl Wrong {
    /// Of the file at this place.
    pub fn new(file: usize, reason: impl fmt::Display) -> Self {
        Self {
            file,
            reason: reason.to_string(),
        }
    }
}

/// What the files said, or why they cannot be read.
type Said = Result<Vec<Vec<u8>>, FileError>;
type Parse<T> = Box<dyn Fn(&[Vec<u8>], Option<&T>) -> Result<T, Wrong> + Send + Sync>;

struct Looks {
    /// When they were last taken, or refused.
    judged: Said,
    /// At the last look, where that was another.
    last: Option<Said>,
}

/// What some files say that belong together, such as a certificate and its key.
pub struct Followed<T> {
    files: Vec<(&'static str, PathBuf)>,
    parse: Parse<T>,
    looks: Mutex<Looks>,
    now: RwLock<Arc<T>>,
}

impl<T> fmt::Debug for Followed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Followed").field(&self.files).finish()
    }
}

impl<T> Followed<T> {
    /// Reads the files, each with the setting that names it. `parse` gets their
    /// contents in the same order, and what is in force where that is to change.
    ///
    /// # Errors
    /// [`FileError`] for one that cannot be read or used.
    pub fn open(
        files: Vec<(&'static str, PathBuf)>,
        parse: impl Fn(&[Vec<u8>], Option<&T>) -> Result<T, Wrong> + Send + Sync + 'static,
    ) -> Result<Self, FileError> {
        let said = read(&files)?;
        let now = parse(&said, None).map_err(|wrong| told(&files, wrong))?;
        Ok(Self {
            files,
            parse: Box::new(parse),
            looks: Mutex::new(Looks {
                judged: Ok(said),
                last: None,
            }),
            now: RwLock::new(Arc::new(now)),
        })
    }

    /// What is in force.
    pub fn now(&self) -> Arc<T> {
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at the files once. They are taken when they have said the same new
    /// thing twice: one that is being written says half. What cannot be used is
    /// told once, and what was in force stays. `None`: nothing to tell.
    pub fn look(&self) -> Option<Result<Arc<T>, FileError>> {
        let mut looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let said = read(&self.files);
        if said == looks.judged {
            looks.last = None;
            return None;
        }
        if looks.last.as_ref() != Some(&said) {
            looks.last = Some(said);
            return None;
        }
        let parsed = said.as_ref().map_err(Clone::clone).and_then(|said| {
            (self.parse)(said, Some(&self.now())).map_err(|wrong| told(&self.files, wrong))
        });
        *looks = Looks {
            judged: said,
            last: None,
        };
        Some(parsed.map(|parsed| {
            let parsed = Arc::new(parsed);
            *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&parsed);
            parsed
        }))
    }
}

impl<T: Send + Sync + 'static> Followed<T> {
    /// Looks every second, for as long as it is polled. `tell` hears what came of
    /// each change.
    pub async fn follow(self: Arc<Self>, tell: impl Fn(Result<&T, &FileError>)) {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let own = Arc::clone(&self);
            match tokio::task::spawn_blocking(move || own.look()).await {
                Ok(None) => {}
                Ok(Some(Ok(taken))) => tell(Ok(&taken)),
                Ok(Some(Err(error))) => tell(Err(&error)),
                Err(error) => tracing::error!(event = "panic", task = "files", %error),
            }
        }
    }

    /// As [`Followed::follow`], telling the log; `tell` hears whether the files were
    /// taken.
    pub async fn follow_and_log(self: Arc<Self>, tell: impl Fn(bool)) {
        let setting = self.setting();
        let told = |outcome: Result<&T, &FileError>| {
            log_change(setting, outcome);
            tell(outcome.is_ok());
        };
        self.follow(told).await;
    }

    /// The setting of the first file.
    fn setting(&self) -> &'static str {
        self.files.first().map_or("", |(setting, _)| setting)
    }
}

/// The log's line of a change.
fn log_change<T>(setting: &'static str, outcome: Result<&T, &FileError>) {
    match outcome {
        Ok(_) => tracing::info!(event = "files_changed", setting),
        Err(error) => tracing::error!(event = "files_not_changed", %error),
    }
}

fn told(files: &[(&'static str, PathBuf)], wrong: Wrong) -> FileError {
    let (setting, file) = files.get(wrong.file).cloned().unwrap_or_default();
    FileError {
        setting,
        file,
        reason: wrong.reason,
    }
}

fn read(files: &[(&'static str, PathBuf)]) -> Said {
    let one = |(setting, file): &(&'static str, PathBuf)| {
        read_one(file).map_err(|reason| FileError {
            setting,
            file: file.clone(),
            reason,
        })
    };
    files.iter().map(one).collect()
}

fn read_one(file: &Path) -> Result<Vec<u8>, String> {
    let length = std::fs::metadata(file).map(|file| file.len());
    if length.is_ok_and(|length| length > MAX_BYTES) {
        return Err(format!("it is longer than {MAX_BYTES} bytes"));
    }
    std::fs::read(file).map_err(|error| format!("it cannot be read: {error}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let name = format!("kvmesh-followed-{name}-{}", std::process::id());
            let folder = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            Self(folder)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn number(said: &[Vec<u8>], _: Option<&u32>) -> Result<u32, Wrong> {
        let mut sum = 0;
        for (n, text) in said.iter().enumerate() {
            let text = std::str::from_utf8(text).map_err(|error| Wrong::new(n, error))?;
            sum += text
                .parse::<u32>()
                .map_err(|_| Wrong::new(n, "allowed is a number"))?;
        }
        Ok(sum)
    }

    #[test]
    fn what_was_said_twice_is_taken_and_what_cannot_be_used_is_told_once() {
        let folder = Folder::new("twice");
        let [a, b] = ["a", "b"].map(|name| folder.0.join(name));
        std::fs::write(&a, "1").unwrap();
        std::fs::write(&b, "2").unwrap();
        let followed =
            Followed::open(vec![("one", a.clone()), ("two", b.clone())], number).unwrap();
        assert_eq!(*followed.now(), 3);
        assert_eq!(followed.look(), None);
        std::fs::write(&a, "10").unwrap();
        assert_eq!(followed.look(), None);
        assert_eq!(*followed.now(), 3, "it may be half of what is to come");
        std::fs::write(&a, "100").unwrap();
        assert_eq!(followed.look(), None);
        assert_eq!(followed.look(), Some(Ok(Arc::new(102))));
        assert_eq!(*followed.now(), 102);

        std::fs::write(&b, "secret").unwrap();
        assert_eq!(followed.look(), None);
        let error = followed.look().unwrap().unwrap_err();
        assert_eq!((error.setting, &error.file), ("two", &b));
        assert!(!error.to_string().contains("secret"));
        assert_eq!(followed.look(), None, "told once");
        assert_eq!(*followed.now(), 102);

        std::fs::remove_file(&b).unwrap();
        followed.look();
        assert!(matches!(followed.look(), Some(Err(_))));
        std::fs::write(&b, "5").unwrap();
        followed.look();
        assert_eq!(followed.look(), Some(Ok(Arc::new(105))));
    }

    #[test]
    fn a_file_that_is_not_there_is_named_with_its_setting() {
        let folder = Folder::new("none");
        let missing = folder.0.join("missing");
        let error = Followed::open(vec![("one", missing.clone())], number).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("one: "), "{text}");
        assert!(text.contains(missing.to_str().unwrap()), "{text}");
    }
}
