//! Text work off the serving threads: bounded, and ended with its client.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use kvmesh_text::{Chat, EncodeError, ModelText, TemplateError, UnixSeconds};
use tokio::{sync::Semaphore, task};

use super::Refused;
use crate::{error::RequestError, mesh::ServedModel, telemetry::Step};

/// Where long texts are worked on.
pub(crate) struct TextPool {
    inline_bytes: usize,
    threads: Arc<Semaphore>,
}

/// Raises the flag when its owner is dropped: work for a client that has gone
/// ends soon after.
struct Interrupt(Arc<AtomicBool>);

impl Drop for Interrupt {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl TextPool {
    pub(crate) fn new(inline_bytes: usize, threads: usize) -> Self {
        Self {
            inline_bytes,
            threads: Arc::new(Semaphore::new(threads)),
        }
    }

    /// Runs work over this many bytes, here if they are few. The wait for a
    /// thread and the work itself end when the returned future is dropped.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&AtomicBool) -> Result<T, RequestError> + Send + 'static,
    ) -> Result<T, RequestError> {
        let flag = Arc::new(AtomicBool::new(false));
        if bytes < self.inline_bytes {
            return work(&flag);
        }
        let permit = Arc::clone(&self.threads)
            .acquire_owned()
            .await
            .map_err(|_| RequestError::Cancelled)?;
        let interrupt = Interrupt(Arc::clone(&flag));
        let done = task::spawn_blocking(move || {
            let result = work(&flag);
            drop(permit);
            result
        })
        .await
        // A panic there is one of its request: it goes on to the request's
        // border, which gives it an id and a line in the log.
        .unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(RequestError::ShuttingDown { next_index: 0 }),
        });
        drop(interrupt);
        done
    }

    /// Token ids of a prompt.
    pub(crate) async fn tokenize(
        &self,
        model: &Arc<ServedModel>,
        prompt: String,
        field: &'static str,
    ) -> Result<Vec<u32>, Refused> {
        fits(model, prompt.len(), field).map_err(|error| (Step::Bound, error))?;
        let text = Arc::clone(&model.text);
        self.run(prompt.len(), move |flag| {
            text.encode(&prompt, flag).map_err(encode_error)
        })
        .await
        .map_err(|error| (Step::Tokenize, error))
    }

    /// Token ids of a conversation. Always on a thread: a template is a
    /// program, and what it takes is not known before.
    pub(crate) async fn chat(
        &self,
        model: &Arc<ServedModel>,
        chat: Chat,
    ) -> Result<Vec<u32>, Refused> {
        if !model.text.has_chat_template() {
            return Err((Step::Validate, RequestError::unsupported("chat")));
        }
        let bytes = chat
            .messages
            .iter()
            .map(|message| message.content.len())
            .sum();
        fits(model, bytes, "chat").map_err(|error| (Step::Bound, error))?;
        let model = Arc::clone(model);
        let work = move |flag: &AtomicBool| render_and_encode(&model, &chat, flag);
        let threaded = self.inline_bytes.max(bytes);
        self.run(threaded, work)
            .await
            .map_err(|error| (Step::Tokenize, error))
    }
}

fn render_and_encode(
    model: &ServedModel,
    chat: &Chat,
    flag: &AtomicBool,
) -> Result<Vec<u32>, RequestError> {
    let text: &ModelText = &model.text;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let now = UnixSeconds(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
    let rendered = text.render_chat(chat, now).map_err(|error| match error {
        TemplateError::None => RequestError::unsupported("chat"),
        error => RequestError::Text(error.to_string()),
    })?;
    fits(model, rendered.len(), "chat")?;
    text.encode_rendered(&rendered, flag).map_err(encode_error)
}

/// Refuses by length alone what cannot fit the context, whatever it says.
fn fits(model: &ServedModel, bytes: usize, field: &str) -> Result<(), RequestError> {
    let context = model.record.context_length as usize;
    let fewest = model.text.fewest_tokens(bytes);
    if fewest < context {
        return Ok(());
    }
    let allowed = format!("{bytes} bytes are {fewest} tokens or more; the context is {context}");
    Err(RequestError::over_context(field, allowed))
}

fn encode_error(error: EncodeError) -> RequestError {
    match error {
        EncodeError::Interrupted => RequestError::Cancelled,
        EncodeError::Tokenizer(message) => RequestError::Text(message),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::panic::AssertUnwindSafe;

    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_panic_on_a_text_thread_reaches_the_border_of_its_request_and_frees_the_thread() {
        let pool = TextPool::new(10, 1);
        for _ in 0..2 {
            let work = pool.run::<()>(100, |_| panic!("planted"));
            let panic = AssertUnwindSafe(work).catch_unwind().await.unwrap_err();
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"planted"));
        }
        assert_eq!(pool.run(100, |_| Ok(1)).await, Ok(1));
    }
}
