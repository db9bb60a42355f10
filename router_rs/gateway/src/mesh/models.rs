//! The models that are served: listed when their tokeniser (module
//! `tokenizer`) is here.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kvmesh_output_parser::{ReasoningFormat, ToolFormat};
use kvmesh_text::ModelText;
use kvmesh_wire::v1;

use super::Core;

/// A model that can be asked for.
pub struct ServedModel {
    /// Name, digests, limits, end-of-text ids, adapters.
    pub record: v1::ModelRecord,
    /// What the engine of its workers can do. Workers of one model agree in
    /// what a request can ask for; where they do not, the first one counts.
    pub capabilities: v1::Capabilities,
    /// Template, tokeniser, detokeniser.
    pub text: Arc<ModelText>,
    /// How its templates have tool calls written.
    pub tool_format: Option<ToolFormat>,
    /// How its templates have reasoning marked.
    pub reasoning_format: Option<ReasoningFormat>,
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

    /// Forgets the models of which no worker is left. Their tokenisers stay: a
    /// worker that comes back needs none fetched.
    pub(super) fn keep(&self, left: impl Fn(&str) -> bool) {
        let mut inner = self.lock();
        inner.told.retain(|name, _| left(name));
        inner.served.retain(|name, _| left(name));
    }

    /// A tokeniser is here.
    pub(super) fn fetched(&self, text: Arc<ModelText>) {
        let mut inner = self.lock();
        inner.fetching.remove(text.digest());
        inner.serve(&text);
        inner.texts.insert(text.digest().to_owned(), text);
    }

    /// Nobody fetches a tokeniser any more.
    pub(super) fn given_up(&self, digest: &str) {
        self.lock().fetching.remove(digest);
    }

    /// Whether the caller is to fetch a tokeniser: it is not here, and nobody
    /// else does.
    pub(super) fn claim(&self, digest: &str) -> bool {
        let mut inner = self.lock();
        !inner.texts.contains_key(digest) && inner.fetching.insert(digest.to_owned())
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
                        tool_format: text.chat_templates().find_map(ToolFormat::of_template),
                        reasoning_format: text
                            .chat_templates()
                            .find_map(ReasoningFormat::of_template),
                    };
                    self.served.insert(name.clone(), Arc::new(model));
                }
            }
        }
    }
}

impl Core {
    /// Forgets the models that no worker of the table has: what was told of them
    /// is unknown again. While a worker is on the table its model is known, also
    /// where no session with it is open.
    pub(super) fn forget_models(&self) {
        let workers = self.table.all();
        let records = workers.iter().filter_map(|worker| worker.record());
        let names: BTreeSet<String> = records
            .filter_map(|record| record.model)
            .map(|model| model.name)
            .collect();
        self.models.keep(|name| names.contains(name));
    }
}
