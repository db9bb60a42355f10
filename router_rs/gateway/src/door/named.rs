//! Models by the names that clients ask for: adapters are models of their own.

use crate::{error::RequestError, mesh::Mesh};

/// What a name of a client means to the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) model: String,
    pub(crate) adapter: String,
}

/// What the mesh calls it: a model, else an adapter of the one model that has it.
/// A name that nobody has is left to the mesh to refuse.
pub(crate) fn named(mesh: &Mesh, name: &str) -> Result<Named, RequestError> {
    let plain = || Named {
        model: name.to_owned(),
        adapter: String::new(),
    };
    if !matches!(mesh.model(name), Err(RequestError::UnknownModel { .. })) {
        return Ok(plain());
    }
    let models = mesh.models();
    let mut bases = models
        .iter()
        .filter(|model| model.adapters.iter().any(|adapter| adapter == name));
    match (bases.next(), bases.next()) {
        (None, _) => Ok(plain()),
        (Some(base), None) => Ok(Named {
            model: base.name.clone(),
            adapter: name.to_owned(),
        }),
        (Some(one), Some(other)) => {
            let allowed = format!("{} and {} have an adapter {name:?}", one.name, other.name);
            Err(RequestError::invalid("model", allowed))
        }
    }
}
