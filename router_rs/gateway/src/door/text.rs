//! Text work off the serving threads: bounded, and ended with its client.
//!
//! All models and classes share the threads. Long texts never have the last of
//! several, so a short one waits for other short ones only; with one thread,
//! for one long text besides.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use kvmesh_text::{Chat, EncodeError, ModelText, TemplateError, UnixSeconds, tree_bytes};
use kvmesh_wire::v1;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task,
};

use super::{Budget, Refused, validate};
use crate::{error::RequestError, mesh::ServedModel, telemetry::Step};

/// Texts from here on are long: some 30,000 tokens, of which each takes a
/// thread for milliseconds, and the longest ones for much more.
const LONG_BYTES: usize = 128 << 10;

/// Where long texts are worked on.
pub(crate) struct TextPool {
    inline_bytes: usize,
    threads: Arc<Semaphore>,
    /// What a long text takes first: one of these less than there are threads,
    /// where there are several. It waits for a thread like all others then, so
    /// short ones do not keep it out.
    long: Arc<Semaphore>,
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
            long: Arc::new(Semaphore::new(threads.saturating_sub(1).max(1))),
        }
    }

    /// Runs work over this many bytes, here if they are few. The wait for a
    /// thread and the work itself end when the returned future is dropped.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&AtomicBool) -> Result<T, RequestError> + Send + 'static,
    ) -> Result<T, RequestError> {
        if bytes < self.inline_bytes {
            return work(&AtomicBool::new(false));
        }
        // Apart: what is done here needs no room for what is done there.
        Box::pin(self.on_thread(bytes, work)).await
    }

    async fn on_thread<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&AtomicBool) -> Result<T, RequestError> + Send + 'static,
    ) -> Result<T, RequestError> {
        let long = match bytes < LONG_BYTES {
            true => None,
            false => Some(permit(&self.long).await?),
        };
        let permits = (permit(&self.threads).await?, long);
        let flag = Arc::new(AtomicBool::new(false));
        let interrupt = Interrupt(Arc::clone(&flag));
        let done = task::spawn_blocking(move || {
            let result = work(&flag);
            drop(permits);
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

    /// Token ids of a conversation that came in a message of so many bytes.
    /// Always on a thread: a template is a program, and what it takes is not
    /// known before. What it makes a long text of is rendered again among the
    /// long ones: kept meanwhile, such texts would be memory without a bound.
    ///
    /// JSON of it is text until a thread is there. As trees it takes many times its bytes, of
    /// `budget`.
    pub(crate) async fn chat(
        &self,
        model: &Arc<ServedModel>,
        chat: v1::Chat,
        mut bytes: usize,
        budget: &Budget,
    ) -> Result<Vec<u32>, Refused> {
        if !model.text.has_chat_template() {
            return Err((Step::Validate, RequestError::unsupported("chat")));
        }
        let content = chat.messages.iter().map(|message| message.content.len());
        fits(model, content.sum(), "chat").map_err(|error| (Step::Bound, error))?;
        let mut given = Conversation::Sent(chat);
        loop {
            let (model, budget) = (Arc::clone(model), budget.clone());
            let work = move |flag: &AtomicBool| {
                let read = match given {
                    Conversation::Sent(chat) => Read::of(chat, &budget)?,
                    Conversation::Read(read) => read,
                };
                render_and_encode(&model, read, bytes, flag)
            };
            let done = self.on_thread(bytes, work).await;
            match done.map_err(|error| (step_of(&error), error))? {
                Rendered::Ids(ids) => return Ok(ids),
                Rendered::Long(length, read) => {
                    (bytes, given) = (length, Conversation::Read(read));
                }
            }
        }
    }
}

/// A conversation on its way to its text.
enum Conversation {
    Sent(v1::Chat),
    Read(Read),
}

/// A conversation with its JSON as trees.
struct Read {
    chat: Chat,
    /// For the trees: they take more than their text did.
    _permit: Option<OwnedSemaphorePermit>,
}

impl Read {
    fn of(chat: v1::Chat, budget: &Budget) -> Result<Self, RequestError> {
        let plain = |text: &String| tree_bytes(text, false);
        let calls = chat.messages.iter().flat_map(|one| &one.tool_calls_json);
        let kinds = [
            (chat.tools_json.iter().map(plain).sum(), "chat.tools_json"),
            (
                calls.map(|text| tree_bytes(text, true)).sum(),
                "chat.messages",
            ),
            (
                plain(&chat.template_arguments_json),
                "chat.template_arguments_json",
            ),
        ];
        let trees = kinds.iter().map(|(bytes, _)| bytes).sum();
        let largest = kinds
            .into_iter()
            .max_by_key(|(bytes, _): &(usize, _)| *bytes);
        let field = largest.map_or("chat", |(_, field)| field);
        Ok(Self {
            _permit: budget.take_for(trees, field)?,
            chat: validate::chat(chat)?,
        })
    }
}

/// Where a conversation was refused.
pub(super) fn step_of(error: &RequestError) -> Step {
    match error {
        RequestError::Invalid(_) => Step::Validate,
        RequestError::Overloaded { .. } => Step::Permit,
        _ => Step::Tokenize,
    }
}

/// What became of a conversation on a text thread.
enum Rendered {
    Ids(Vec<u32>),
    /// Nothing yet: its text has so many bytes, and it had a short one's turn.
    Long(usize, Read),
}

async fn permit(of: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, RequestError> {
    let permit = Arc::clone(of).acquire_owned().await;
    permit.map_err(|_| RequestError::Cancelled)
}

fn render_and_encode(
    model: &ServedModel,
    read: Read,
    taken_for: usize,
    flag: &AtomicBool,
) -> Result<Rendered, RequestError> {
    let text: &ModelText = &model.text;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let now = UnixSeconds(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
    let rendered = text
        .render_chat(&read.chat, now)
        .map_err(|error| match error {
            TemplateError::None => RequestError::unsupported("chat"),
            error => RequestError::Text(error.to_string()),
        })?;
    fits(model, rendered.len(), "chat")?;
    if taken_for < LONG_BYTES && rendered.len() >= LONG_BYTES {
        return Ok(Rendered::Long(rendered.len(), read));
    }
    drop(read);
    let ids = text.encode_rendered(&rendered, flag);
    ids.map(Rendered::Ids).map_err(encode_error)
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
    use std::{
        panic::AssertUnwindSafe,
        sync::{
            Barrier, Mutex,
            atomic::AtomicUsize,
            mpsc::{Sender, channel},
        },
    };

    use futures_util::{FutureExt, future::join_all};
    use kvmesh_text::{Limits, TextFile};

    use super::*;

    /// Work that takes until the other end is dropped.
    fn held() -> (
        Sender<()>,
        impl FnOnce(&AtomicBool) -> Result<(), RequestError> + Send + 'static,
    ) {
        let (hold, gate) = channel();
        let work = move |_: &AtomicBool| {
            gate.recv().unwrap_or_default();
            Ok(())
        };
        (hold, work)
    }

    fn model(template: &str) -> Arc<ServedModel> {
        let file = |name: &str, bytes: &[u8]| TextFile {
            name: name.to_owned(),
            bytes: bytes.to_vec(),
        };
        let tokenizer = include_bytes!("../../../text/tests/data/byte_level.json");
        let files = [
            file("tokenizer.json", tokenizer),
            file("chat_template.jinja", template.as_bytes()),
        ];
        Arc::new(ServedModel {
            record: v1::ModelRecord {
                context_length: 1 << 20,
                ..v1::ModelRecord::default()
            },
            capabilities: v1::Capabilities::default(),
            text: Arc::new(ModelText::from_files(&files, &Limits::default()).unwrap()),
            tool_format: None,
            reasoning_format: None,
        })
    }

    #[tokio::test]
    async fn short_texts_go_on_beside_long_ones_that_do_not_end() {
        for threads in [2, 3] {
            let pool = TextPool::new(10, threads);
            let (hold, work): (Vec<_>, Vec<_>) = (0..5).map(|_| held()).unzip();
            let long = work.into_iter().map(|work| pool.run(LONG_BYTES, work));
            let mut long: Vec<_> = long.map(Box::pin).collect();
            for one in &mut long {
                assert_eq!(one.as_mut().now_or_never(), None);
            }
            assert_eq!(pool.threads.available_permits(), 1);
            for bytes in [10, LONG_BYTES - 1] {
                assert_eq!(pool.run(bytes, |_| Ok(())).await, Ok(()));
            }
            // The next one's client goes; those behind it get their turn all the same.
            drop(long.remove(threads - 1));
            drop(hold);
            for one in long {
                assert_eq!(one.await, Ok(()));
            }
            assert_eq!(pool.threads.available_permits(), threads);
        }
    }

    #[tokio::test]
    async fn with_one_thread_a_short_text_waits_for_one_long_one_at_most() {
        let pool = TextPool::new(10, 1);
        let ended = Arc::new(Mutex::new(Vec::new()));
        let ends = |name: &'static str| {
            let ended = Arc::clone(&ended);
            move |_: &AtomicBool| {
                ended.lock().unwrap().push(name);
                Ok(())
            }
        };
        let (hold, work) = held();
        let mut first = Box::pin(pool.run(LONG_BYTES, work));
        assert_eq!(first.as_mut().now_or_never(), None);
        let mut others = [(LONG_BYTES, "long"), (100, "short")]
            .map(|(bytes, name)| Box::pin(pool.run(bytes, ends(name))));
        for one in &mut others {
            assert_eq!(one.as_mut().now_or_never(), None);
        }
        drop(hold);
        first.await.unwrap();
        for done in join_all(others).await {
            done.unwrap();
        }
        assert_eq!(*ended.lock().unwrap(), ["short", "long"]);
    }

    #[tokio::test]
    async fn no_more_texts_are_worked_on_at_once_than_there_are_threads() {
        let pool = TextPool::new(0, 2);
        // Each waits for another one, and all count who is there.
        let (pair, there, most) = (Barrier::new(2), AtomicUsize::new(0), AtomicUsize::new(0));
        let all = Arc::new((pair, there, most));
        let work = |_| {
            let all = Arc::clone(&all);
            pool.run(1, move |_| {
                let (pair, there, most) = &*all;
                most.fetch_max(there.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                pair.wait();
                there.fetch_sub(1, Ordering::SeqCst);
                Ok(())
            })
        };
        assert!(
            join_all((0..40).map(work))
                .await
                .into_iter()
                .all(|done| done.is_ok())
        );
        assert_eq!(all.2.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_chat_that_its_template_makes_long_takes_its_turn_among_the_long_ones() {
        let template = "{% for m in messages %}{% for n in range(m.content | int) %}\
            a line of many {% endfor %}{% endfor %}";
        let model = model(template);
        let pool = TextPool::new(10, 2);
        let budget = Budget::new(1 << 20);
        let long = pool
            .chat(&model, said("20000"), 100, &budget)
            .await
            .unwrap();
        assert!(long.len() > 20_000, "{}", long.len());
        // Now long ones have no turn at all.
        pool.long.close();
        assert!(pool.chat(&model, said("10"), 100, &budget).await.is_ok());
        for (lines, bytes) in [("20000", 100), ("10", LONG_BYTES)] {
            let refused = pool.chat(&model, said(lines), bytes, &budget).await;
            assert_eq!(refused, Err((Step::Tokenize, RequestError::Cancelled)));
        }
        assert_eq!(free(&budget), 1 << 10);
    }

    /// A body of many small values: some kilobytes of it are megabytes as a tree.
    #[tokio::test]
    async fn json_takes_of_the_budget_what_it_takes_of_memory() {
        let model = model("{{ messages[0].content }}{{ a | length }}");
        let pool = TextPool::new(10, 2);
        let budget = Budget::new(4 << 20);
        let values = |count: usize| format!("{{\"a\": [{}]}}", vec!["[0]"; count].join(","));
        let with_arguments = |count| v1::Chat {
            template_arguments_json: values(count),
            ..said("x")
        };
        let with_tool = |count| v1::Chat {
            tools_json: vec![values(count)],
            ..said("x")
        };
        let with_call = |count: usize| {
            let arguments = serde_json::Value::from(values(count));
            let mut chat = said("x");
            chat.messages[0].tool_calls_json =
                vec![format!("{{\"function\": {{\"arguments\": {arguments}}}}}")];
            chat
        };
        let kinds: [(&dyn Fn(usize) -> v1::Chat, _); 3] = [
            (&with_arguments, "chat.template_arguments_json"),
            (&with_tool, "chat.tools_json"),
            (&with_call, "chat.messages"),
        ];
        for (kind, field) in kinds {
            assert!(pool.chat(&model, kind(100), 100, &budget).await.is_ok());
            assert_eq!(free(&budget), 4 << 10);
            // In text it is 40 kB.
            let refused = pool.chat(&model, kind(10_000), 100, &budget).await;
            let (step, error) = refused.unwrap_err();
            assert_eq!(step, Step::Validate);
            assert!(error.to_string().contains(field), "{error}");
            assert!(error.to_string().contains("of memory"), "{error}");
            // What others hold is theirs.
            let others = budget.take_for((4 << 20) - (64 << 10), "x").unwrap();
            let (step, error) = pool
                .chat(&model, kind(1_000), 100, &budget)
                .await
                .unwrap_err();
            assert_eq!(step, Step::Permit);
            assert!(error.retry_after().is_some(), "{error}");
            assert!(pool.chat(&model, kind(1), 100, &budget).await.is_ok());
            drop(others);
            assert!(pool.chat(&model, kind(1_000), 100, &budget).await.is_ok());
        }
    }

    fn said(content: &str) -> v1::Chat {
        v1::Chat {
            messages: vec![v1::ChatMessage {
                role: "user".to_owned(),
                content: content.to_owned(),
                ..v1::ChatMessage::default()
            }],
            ..v1::Chat::default()
        }
    }

    fn free(budget: &Budget) -> usize {
        budget.permits().0.available_permits()
    }

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
