//! What the port's thread, its streams and its worker's calls share.

use std::{
    collections::HashMap,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use kvmesh_wire::v1::Residue;
use tokio::sync::{Notify, oneshot};

use crate::{event::Event, settings::Settings, state::State, tokenizer::TokenizerFiles};

/// Calls that may wait for the process at once.
const MAX_ASKED: usize = 256;
/// Calls that wait for the process, and the number of the last one.
type Asked = (u64, HashMap<u64, oneshot::Sender<Residue>>);

/// What the thread, the streams and the worker's calls share.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Something was told to the process, or running work ended.
    pub(crate) changed: Condvar,
    /// A snapshot may have room.
    pub(crate) snapshots: Condvar,
    /// Commands may have room.
    pub(crate) room: Notify,
    asked: Mutex<Asked>,
    tokenizer: Mutex<TokenizerFiles>,
}

impl Shared {
    pub(crate) fn new(settings: Settings) -> Self {
        Self {
            state: Mutex::new(State::new(settings)),
            changed: Condvar::new(),
            snapshots: Condvar::new(),
            room: Notify::new(),
            asked: Mutex::default(),
            tokenizer: Mutex::default(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something under the lock, then wakes whom it concerns.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = work(&mut state);
        let wakers = state.take_wakers();
        let told = state.has_events();
        drop(state);
        for waker in wakers {
            waker.wake();
        }
        if told {
            self.changed.notify_all();
        }
        result
    }

    /// A session's stream is gone.
    pub(crate) fn forget(&self, key: &str, stream: u64) {
        self.with(|state| state.forget(key, stream));
        self.changed.notify_all();
        self.snapshots.notify_all();
    }

    /// The tokeniser's files; contents are shared.
    pub(crate) fn tokenizer(&self) -> TokenizerFiles {
        let files = self.tokenizer.lock();
        files.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes the files over that routers are given.
    pub(crate) fn set_tokenizer(&self, files: TokenizerFiles) {
        let known = self.tokenizer.lock();
        *known.unwrap_or_else(PoisonError::into_inner) = files;
    }

    /// Asks the process what the engine holds. `None`: too many ask, or it is gone.
    pub(crate) async fn ask(&self, event: impl FnOnce(u64) -> Event) -> Option<Residue> {
        let (answer, asked) = oneshot::channel();
        let call = {
            let mut calls = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            calls.1.retain(|_, answer| !answer.is_closed());
            if calls.1.len() >= MAX_ASKED {
                return None;
            }
            calls.0 += 1;
            let call = calls.0;
            calls.1.insert(call, answer);
            call
        };
        self.with(|state| state.tell(event(call)));
        asked.await.ok()
    }

    /// The process's answer to `ask`.
    pub(crate) fn answer(&self, call: u64, residue: Residue) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = asked.1.remove(&call) {
            // Gone: nobody waits any more.
            let _ = answer.send(residue);
        }
    }
}
