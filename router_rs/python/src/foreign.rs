//! Names of blocks in an engine that names them by hashes of its own.

use kvmesh_kv_index::{Foreign, ForeignBlocks, Heard, Tier};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Translates one engine's cache events.
#[pyclass(name = "ForeignNames", module = "kvmesh._router")]
pub(crate) struct PyForeignNames {
    names: Foreign,
}

fn tier(number: u8) -> PyResult<Tier> {
    match number {
        0 => Ok(Tier::Device),
        1 => Ok(Tier::Host),
        2 => Ok(Tier::Disk),
        _ => Err(PyValueError::new_err(format!(
            "tier is {number}; allowed are 0, 1, 2"
        ))),
    }
}

/// Parent, values and what was forgotten (value, tier).
type Named = (u64, Vec<u64>, Vec<(u64, u8)>);

#[pymethods]
impl PyForeignNames {
    #[new]
    #[pyo3(signature = (most, group = 0))]
    fn new(most: usize, group: u32) -> Self {
        Self {
            names: Foreign::new(most, group),
        }
    }

    fn hear(&mut self, sequence: u64) -> (&'static str, u64) {
        match self.names.hear(sequence) {
            Heard::Next => ("next", sequence),
            Heard::Again => ("again", sequence),
            Heard::Missed(from) => ("missed", from),
        }
    }

    // One parameter a field of an engine's event.
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (root, parent, hashes, ids, block_tokens, *, group = 0, tier = 0, extra_keys = false))]
    fn stored(
        &mut self,
        root: u64,
        parent: Option<u64>,
        hashes: Vec<u64>,
        ids: Vec<u32>,
        block_tokens: usize,
        group: u32,
        tier: u8,
        extra_keys: bool,
    ) -> PyResult<Option<Named>> {
        let blocks = ForeignBlocks {
            parent,
            hashes: &hashes,
            ids: &ids,
            block_tokens,
            group,
            tier: self::tier(tier)?,
            extra_keys,
        };
        // Why it was dropped is counted.
        let Ok(own) = self.names.stored(root, &blocks) else {
            return Ok(None);
        };
        let forgotten = own.forgotten.into_iter();
        Ok(Some((
            own.parent,
            own.chain,
            forgotten.map(|(value, tier)| (value, tier as u8)).collect(),
        )))
    }

    #[pyo3(signature = (hashes, *, group = 0, tier = 0))]
    fn removed(&mut self, hashes: Vec<u64>, group: u32, tier: u8) -> PyResult<Vec<u64>> {
        Ok(self.names.removed(group, self::tier(tier)?, &hashes))
    }

    #[pyo3(signature = (next = None))]
    fn cleared(&mut self, next: Option<u64>) {
        self.names.cleared(next);
    }

    fn stats(&self) -> (usize, usize, u64, u64, u64) {
        let stats = self.names.stats();
        (
            stats.names,
            stats.bytes,
            stats.unknown_parent,
            stats.ignored,
            stats.gaps,
        )
    }
}
