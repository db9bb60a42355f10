//! The requests that run, by the names that their callers gave them.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::mesh::Mesh;

/// Whose a request is, and what its caller calls it.
type Name = (u128, String);

/// All of them. As many as there are streams: each leaves with its own.
#[derive(Default)]
pub(super) struct Running(Mutex<HashMap<Name, Vec<Arc<Request>>>>);

/// A request that somebody may abort.
#[derive(Default)]
struct Request {
    aborted: AtomicBool,
    /// The generations that answer it, once they are open.
    generations: Mutex<Vec<String>>,
}

impl Running {
    // Maps are whole after each operation.
    fn lock(&self) -> MutexGuard<'_, HashMap<Name, Vec<Arc<Request>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request begins. Another of its name is no hindrance: both go by it.
    pub(super) fn enter(self: &Arc<Self>, tenant: u128, id: String) -> Entered {
        let request = Arc::new(Request::default());
        let name = (tenant, id);
        let mut all = self.lock();
        all.entry(name.clone())
            .or_default()
            .push(Arc::clone(&request));
        drop(all);
        Entered {
            running: Arc::clone(self),
            name,
            request,
        }
    }

    /// Ends the requests of these names; a tenant knows its own alone.
    pub(super) fn abort(&self, mesh: &Mesh, tenant: u128, ids: &[String]) {
        for id in ids {
            let found = {
                let all = self.lock();
                all.get(&(tenant, id.clone())).cloned()
            };
            for request in found.into_iter().flatten() {
                request.aborted.store(true, Ordering::SeqCst);
                let open = std::mem::take(&mut *request.lock());
                open.iter().for_each(|generation| mesh.cancel(generation));
            }
        }
    }
}

impl Request {
    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        let all = self.generations.lock();
        all.unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that has begun. Dropping it is its end.
pub(super) struct Entered {
    running: Arc<Running>,
    name: Name,
    request: Arc<Request>,
}

impl Entered {
    /// Its generations are open.
    pub(super) fn opened(&self, mesh: &Mesh, generations: Vec<String>) {
        self.request.lock().clone_from(&generations);
        // Tells before it looks: no abort can pass between the two.
        if self.aborted() {
            generations.iter().for_each(|id| mesh.cancel(id));
        }
    }

    /// Whether somebody aborted it.
    pub(super) fn aborted(&self) -> bool {
        self.request.aborted.load(Ordering::SeqCst)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut all = self.running.lock();
        if let Some(requests) = all.get_mut(&self.name) {
            requests.retain(|request| !Arc::ptr_eq(request, &self.request));
            if requests.is_empty() {
                all.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_forgotten_with_its_last_request_and_others_do_not_hear_of_it() {
        let running = Arc::new(Running::default());
        let one = running.enter(1, "a".to_owned());
        let same = running.enter(1, "a".to_owned());
        let other = running.enter(2, "a".to_owned());
        for request in &running.lock()[&(1, "a".to_owned())] {
            request.aborted.store(true, Ordering::SeqCst);
        }
        assert!(one.aborted() && same.aborted() && !other.aborted());
        drop(one);
        assert_eq!(running.lock().len(), 2);
        drop(same);
        drop(other);
        assert!(running.lock().is_empty());
    }
}
