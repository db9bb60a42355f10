//! Models by the names that clients ask for: adapters are models of their own.

use kvmesh_wire::v1;
use serde::Serialize;

use crate::{error::RequestError, serve::Shared};

/// All models.
#[derive(Debug, Serialize)]
pub(super) struct List {
    object: &'static str,
    data: Vec<Model>,
}

/// One model.
#[derive(Debug, Serialize)]
pub(super) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// The model that an adapter belongs to.
    parent: Option<String>,
    max_model_len: u32,
}

/// All models that can be asked for.
pub(super) fn list(shared: &Shared) -> List {
    List {
        object: "list",
        data: all(shared.mesh.models(), started(shared)),
    }
}

/// One of them, by the part of a path.
///
/// # Errors
/// [`RequestError::UnknownModel`].
pub(super) fn one(shared: &Shared, escaped: &str) -> Result<Model, RequestError> {
    let name = unescaped(escaped);
    let models = all(shared.mesh.models(), started(shared));
    let known = models.iter().map(|model| model.id.clone()).collect();
    let found = models.into_iter().find(|model| model.id == name);
    found.ok_or(RequestError::UnknownModel { name, known })
}

/// When this router started, seconds since 1970: nothing says when a model was
/// made.
fn started(shared: &Shared) -> u64 {
    let began = std::time::SystemTime::now().checked_sub(shared.facts.started.elapsed());
    let since = began.and_then(|began| began.duration_since(std::time::UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_secs())
}

fn all(models: Vec<v1::Model>, created: u64) -> Vec<Model> {
    let told = |id: String, parent: Option<String>, max_model_len| Model {
        id,
        object: "model",
        created,
        owned_by: "kvmesh",
        parent,
        max_model_len,
    };
    let mut all = Vec::with_capacity(models.len());
    for model in models.into_iter().filter(|model| model.ready) {
        let length = model.context_length;
        let parent = model.name.clone();
        all.push(told(model.name, None, length));
        let adapters = model.adapters.into_iter();
        all.extend(adapters.map(|name| told(name, Some(parent.clone()), length)));
    }
    all
}

/// A part of a path without its escapes (RFC 3986, 2.1); bytes that are no UTF-8
/// are in no model's name.
fn unescaped(path: &str) -> String {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        let digits = behind.first_chunk().map(|two: &[u8; 2]| two.as_slice());
        let escaped = digits
            .filter(|two| *first == b'%' && two.iter().all(u8::is_ascii_hexdigit))
            .and_then(|two| std::str::from_utf8(two).ok())
            .and_then(|two| u8::from_str_radix(two, 16).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() {
            &behind[2..]
        } else {
            behind
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_paths_are_read_without_their_escapes() {
        for (path, name) in [
            ("m", "m"),
            ("org/model", "org/model"),
            ("org%2Fmodel%20x", "org/model x"),
            ("100%", "100%"),
            ("a%2", "a%2"),
            ("a%zz", "a%zz"),
        ] {
            assert_eq!(unescaped(path), name);
        }
    }

    #[test]
    fn only_what_can_be_asked_for_is_listed_and_adapters_name_their_model() {
        let model = |name: &str, ready, adapters: &[&str]| v1::Model {
            name: name.to_owned(),
            ready,
            adapters: adapters.iter().map(ToString::to_string).collect(),
            ..v1::Model::default()
        };
        let models = vec![model("a", true, &["x", "y"]), model("b", false, &["z"])];
        let told = all(models, 7);
        let pairs: Vec<_> = told
            .iter()
            .map(|model| (model.id.as_str(), model.parent.as_deref()))
            .collect();
        assert_eq!(pairs, [("a", None), ("x", Some("a")), ("y", Some("a"))]);
    }
}
