//! The workers that this router knows of, one entry each.
//!
//! Discovery adds entries and addresses, sessions say what works. An entry
//! whose key vanished under a live session stays; one without key and session
//! goes.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use kvmesh_session::{
    WorkerIndex,
    link::{State, Suspicion},
    parse::{Hello, LoadReport, Unread},
};
use kvmesh_wire::v1;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{
    counters::SessionCounts,
    session::{SessionHandle, ms_since},
};

/// One worker.
pub(super) struct WorkerEntry {
    pub(super) index: WorkerIndex,
    /// Worker id that its address was told for; `None` for a static address.
    pub(super) expected_id: Option<String>,
    /// Dial now: the registry told something new.
    pub(super) redial: Notify,
    /// Ends the worker's session task.
    pub(super) stop: CancellationToken,
    view: Mutex<View>,
}

/// What is known of a worker.
struct View {
    address: String,
    registered: bool,
    record: Option<v1::WorkerRecord>,
    state: State,
    detail: String,
    index_detail: String,
    load: Option<v1::Load>,
    role: v1::Role,
    draining: bool,
    heard: Option<Instant>,
    step_model: Option<v1::StepModel>,
    session: Option<Arc<SessionHandle>>,
    /// Where it has no session: when it was last heard of.
    away: Instant,
    /// Nobody listened at its address when it was dialled last.
    refused: bool,
    /// Since when it owes an answer to Find over this session: the first that was sent
    /// after its last answer. It answers them in order.
    owes: Option<Instant>,
}

impl WorkerEntry {
    fn new(index: WorkerIndex, expected_id: Option<String>, address: String) -> Self {
        let view = View {
            address,
            registered: false,
            record: None,
            state: State::Waiting,
            detail: String::new(),
            index_detail: String::new(),
            load: None,
            role: v1::Role::Unspecified,
            draining: false,
            heard: None,
            step_model: None,
            session: None,
            away: Instant::now(),
            refused: false,
            owes: None,
        };
        Self {
            index,
            expected_id,
            redial: Notify::new(),
            stop: CancellationToken::new(),
            view: Mutex::new(view),
        }
    }

    // Fields are set one by one and each is whole: nothing to poison.
    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its gRPC address.
    pub(super) fn address(&self) -> String {
        self.view().address.clone()
    }

    /// Its id, or its address before the first hello.
    pub(super) fn name(&self) -> String {
        let view = self.view();
        match (&view.record, &self.expected_id) {
            (Some(record), _) => record.worker_id.clone(),
            (None, Some(id)) => id.clone(),
            (None, None) => view.address.clone(),
        }
    }

    pub(super) fn greeted(&self, hello: &Hello) {
        let mut view = self.view();
        view.role = v1::Role::try_from(hello.record.role).unwrap_or_default();
        view.step_model = hello.step_model.or(hello.record.step_model);
        view.record = Some(hello.record.clone());
        view.index_detail.clear();
        view.detail.clear();
        view.load = None;
        view.heard = Some(Instant::now());
    }

    pub(super) fn loaded(&self, report: &LoadReport) {
        let mut view = self.view();
        view.role = report.role;
        view.draining = report.load.draining || report.phase == v1::WorkerPhase::Stopping;
        view.load = Some(report.load);
    }

    pub(super) fn heard(&self, now: Instant) {
        self.view().heard = Some(now);
    }

    pub(super) fn attach(&self, session: Arc<SessionHandle>) {
        let mut view = self.view();
        view.session = Some(session);
        (view.refused, view.owes) = (false, None);
    }

    pub(super) fn detach(&self) {
        let mut view = self.view();
        if view.session.take().is_some() {
            view.away = view.heard.unwrap_or_else(Instant::now);
        }
    }

    /// It was dialled in vain, or its session is over. `refused`: nobody listens at its
    /// address, so that its process has died.
    pub(super) fn unreached(&self, refused: bool) {
        self.view().refused = refused;
    }

    /// It is asked for a generation.
    pub(super) fn asked(&self, now: Instant) {
        self.view().owes.get_or_insert(now);
    }

    /// It said whether it has one.
    pub(super) fn answered(&self) {
        self.view().owes = None;
    }

    /// Whether a worker that was asked something at `asked`, and has not answered, may do
    /// so yet: it is not known to have died, and has been away for less than `within`; or
    /// it was not heard of since, or has owed an answer for less than that. What it says
    /// meanwhile may have waited before its answer.
    pub(super) fn may_answer(&self, asked: Instant, now: Instant, within: Duration) -> bool {
        let view = self.view();
        let lately = |since: Instant| now.saturating_duration_since(since) < within;
        match (&view.session, &view.state) {
            (None, _) => !view.refused && lately(view.away),
            (Some(_), State::Lost(_)) => false,
            (Some(_), _) => {
                view.heard.is_none_or(|heard| heard <= asked) || view.owes.is_none_or(lately)
            }
        }
    }

    /// The session, where one is open.
    pub(super) fn session(&self) -> Option<Arc<SessionHandle>> {
        self.view().session.clone()
    }

    /// Whether that is another state than before.
    pub(super) fn set_state(&self, state: State) -> bool {
        let mut view = self.view();
        match &state {
            State::Suspect(why) | State::Lost(why) => {
                view.detail = match why {
                    Suspicion::Silent => "no frame for too long".to_owned(),
                    Suspicion::Stuck => "a step takes far longer than predicted".to_owned(),
                };
            }
            State::Ejected => view.detail = "its answers fail".to_owned(),
            State::Refused(mismatch) => view.detail = mismatch.to_string(),
            State::Live => view.detail.clear(),
            _ => {}
        }
        let changed = view.state != state;
        view.state = state;
        changed
    }

    pub(super) fn set_detail(&self, detail: String) {
        self.view().detail = detail;
    }

    /// Nothing is placed there, and why.
    pub(super) fn set_mismatch(&self, detail: String) {
        let mut view = self.view();
        view.index_detail.clone_from(&detail);
        view.detail = detail;
    }

    pub(super) fn index_off(&self, why: Unread) {
        let why = match why {
            Unread::HashScheme(scheme) => format!(
                "its hash scheme is {scheme}, this router's {}",
                kvmesh_session::HASH_SCHEME
            ),
            Unread::BlockTokens(tokens) => {
                format!("its blocks of {tokens} tokens are no multiple of 16")
            }
        };
        self.view().index_detail = format!("{why}: what is sent there counts as cached");
    }

    /// Whether it is still to be heard of: it was neither greeted nor found
    /// unable to.
    pub(super) fn unheard(&self) -> bool {
        let view = self.view();
        view.record.is_none() && view.detail.is_empty()
    }

    /// The record of its last hello.
    pub(super) fn record(&self) -> Option<v1::WorkerRecord> {
        self.view().record.clone()
    }

    /// Role in force, and whether it takes no new work.
    pub(super) fn role(&self) -> (v1::Role, bool) {
        let view = self.view();
        (view.role, view.draining)
    }

    /// Whether its session works.
    pub(super) fn live(&self) -> bool {
        matches!(self.view().state, State::Live | State::HalfOpen { .. })
    }

    /// The row for `kvmesh workers`.
    pub(super) fn status(&self) -> v1::WorkerStatus {
        let name = self.name();
        let view = self.view();
        let record = view.record.clone().unwrap_or_else(|| v1::WorkerRecord {
            worker_id: name,
            address: view.address.clone(),
            ..v1::WorkerRecord::default()
        });
        v1::WorkerStatus {
            record: Some(record),
            state: wire_state(&view.state).into(),
            state_detail: view.detail.clone(),
            registered: view.registered,
            load: view.load,
            silent_ms: view.heard.map_or(0.0, ms_since),
            indexed_blocks: 0,
            index_detail: view.index_detail.clone(),
            paths_to: Vec::new(),
            running: view
                .load
                .as_ref()
                .and_then(|load| load.own.as_ref())
                .map_or(0, |own| own.queued + own.decoding + own.receiving),
            step_model: view.step_model,
        }
    }
}

fn wire_state(state: &State) -> v1::SessionState {
    match state {
        State::Waiting | State::Dialling | State::Greeting => v1::SessionState::Connecting,
        State::Live => v1::SessionState::Live,
        State::Suspect(_) | State::Ejected => v1::SessionState::Suspect,
        State::Lost(_) => v1::SessionState::Lost,
        State::HalfOpen { .. } => v1::SessionState::HalfOpen,
        State::Refused(_) => v1::SessionState::Refused,
    }
}

/// All entries. An index is never given twice.
#[derive(Default)]
pub(super) struct Table {
    entries: RwLock<Vec<Arc<WorkerEntry>>>,
    next: Mutex<u32>,
    /// Held while it is decided who goes.
    deciding: Mutex<()>,
    /// Since when the registry's first list is waited for.
    unlisted: Mutex<Option<Instant>>,
}

/// What a new list of workers changed.
#[derive(Default)]
pub(super) struct Difference {
    /// Entries that need a session task.
    pub(super) added: Vec<Arc<WorkerEntry>>,
    /// Entries that are off the table.
    pub(super) removed: Vec<Arc<WorkerEntry>>,
}

impl Table {
    /// All entries.
    pub(super) fn all(&self) -> Vec<Arc<WorkerEntry>> {
        self.entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// One entry by its number.
    pub(super) fn get(&self, index: WorkerIndex) -> Option<Arc<WorkerEntry>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.iter().find(|entry| entry.index == index).cloned()
    }

    /// One entry by its id.
    pub(super) fn by_name(&self, id: &str) -> Option<Arc<WorkerEntry>> {
        self.all().into_iter().find(|entry| entry.name() == id)
    }

    /// A worker's id; empty where it is off the table.
    pub(super) fn name(&self, index: WorkerIndex) -> String {
        self.get(index)
            .map(|entry| entry.name())
            .unwrap_or_default()
    }

    /// What a transfer's receiver must know of its sender: id, incarnation and
    /// transfer address.
    pub(super) fn sender(&self, index: WorkerIndex) -> (String, u64, String) {
        match self.get(index).and_then(|entry| entry.record()) {
            Some(record) => (
                record.worker_id,
                record.incarnation,
                record.transfer_address,
            ),
            None => Default::default(),
        }
    }

    /// Adds a worker at a fixed address.
    pub(super) fn add_static(&self, address: &str) -> Arc<WorkerEntry> {
        self.add(None, address)
    }

    fn add(&self, id: Option<String>, address: &str) -> Arc<WorkerEntry> {
        let index = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next += 1;
            WorkerIndex(*next - 1)
        };
        let entry = Arc::new(WorkerEntry::new(index, id, address.to_owned()));
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.push(Arc::clone(&entry));
        entry
    }

    fn unlisted(&self) -> MutexGuard<'_, Option<Instant>> {
        self.unlisted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A registry will tell who there is.
    pub(super) fn expects_list(&self) {
        *self.unlisted() = Some(Instant::now());
    }

    /// Whether the registry has yet to tell who there is, and is waited for, for `within`.
    pub(super) fn is_unlisted(&self, now: Instant, within: Duration) -> bool {
        let since = *self.unlisted();
        since.is_some_and(|since| now.saturating_duration_since(since) < within)
    }

    /// Takes the registry's list of (worker id, gRPC address).
    pub(super) fn sync(&self, registered: &BTreeMap<String, String>) -> Difference {
        *self.unlisted() = None;
        let _deciding = self.deciding.lock().unwrap_or_else(PoisonError::into_inner);
        let mut difference = Difference::default();
        let mut known: Vec<String> = Vec::new();
        for entry in self.all() {
            let mut view = entry.view();
            let Some(id) = &entry.expected_id else {
                // Named by address too: it is one worker and keeps one session.
                let own = view.record.as_ref().map(|record| &record.worker_id);
                let mut listed = registered.iter();
                let same = listed.find(|(id, at)| **at == view.address || own == Some(*id));
                view.registered = same.is_some();
                known.extend(same.map(|(id, _)| id.clone()));
                continue;
            };
            known.push(id.clone());
            if let Some(address) = registered.get(id) {
                let changed = view.address != *address || !view.registered;
                view.registered = true;
                view.address.clone_from(address);
                if changed {
                    (view.away, view.refused) = (Instant::now(), false);
                    entry.redial.notify_one();
                }
            } else {
                view.registered = false;
                if view.session.is_none() {
                    difference.removed.push(Arc::clone(&entry));
                }
            }
        }
        for (id, address) in registered {
            if !known.contains(id) {
                let entry = self.add(Some(id.clone()), address);
                entry.view().registered = true;
                difference.added.push(entry);
            }
        }
        self.remove(&difference.removed);
        difference
    }

    /// Whether an entry has neither key nor session now that its session has
    /// ended. It is then off the table.
    pub(super) fn drop_gone(&self, entry: &Arc<WorkerEntry>) -> bool {
        let _deciding = self.deciding.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = {
            let view = entry.view();
            entry.expected_id.is_some() && !view.registered && view.session.is_none()
        };
        if gone {
            self.remove(std::slice::from_ref(entry));
        }
        gone
    }

    /// Whether an entry at a fixed address turned out to be a worker that the
    /// registry named by another address. It is then off the table.
    pub(super) fn drop_double(&self, entry: &Arc<WorkerEntry>, id: &str) -> bool {
        let named = |other: &Arc<WorkerEntry>| other.expected_id.as_deref() == Some(id);
        let double = entry.expected_id.is_none() && self.all().iter().any(named);
        if double {
            self.remove(std::slice::from_ref(entry));
        }
        double
    }

    fn remove(&self, gone: &[Arc<WorkerEntry>]) {
        if !gone.is_empty() {
            let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
            entries.retain(|entry| !gone.iter().any(|gone| gone.index == entry.index));
        }
    }

    /// Sessions by state.
    pub(super) fn session_counts(&self) -> SessionCounts {
        let mut counts = SessionCounts::default();
        for entry in self.all() {
            let count = match wire_state(&entry.view().state) {
                v1::SessionState::Live => &mut counts.live,
                v1::SessionState::Suspect => &mut counts.suspect,
                v1::SessionState::Lost => &mut counts.lost,
                v1::SessionState::HalfOpen => &mut counts.half_open,
                v1::SessionState::Refused => &mut counts.refused,
                _ => &mut counts.connecting,
            };
            *count += 1;
        }
        counts
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
