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
        view.refused = false;
    }

    pub(super) fn detach(&self) {
        let mut view = self.view();
        if view.session.take().is_some() {
            view.away = view.heard.unwrap_or_else(Instant::now);
        }
    }

    /// Nobody listens at its address: its process has died.
    pub(super) fn refused(&self) {
        self.view().refused = true;
    }

    /// Whether a worker that was asked something at `asked`, and has not answered, may do
    /// so yet: it is not known to have died, has been away for less than `within`, and was
    /// not heard of since.
    pub(super) fn may_answer(&self, asked: Instant, now: Instant, within: Duration) -> bool {
        let view = self.view();
        let away = |since: Instant| now.saturating_duration_since(since) < within;
        match (&view.session, &view.state) {
            (None, _) => !view.refused && away(view.away),
            (Some(_), State::Lost(_)) => false,
            (Some(_), _) => view.heard.is_none_or(|heard| heard <= asked),
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
mod tests {
    use super::*;

    fn list(workers: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = |(id, at): &(&str, &str)| ((*id).to_owned(), (*at).to_owned());
        workers.iter().map(owned).collect()
    }

    #[test]
    fn a_worker_named_twice_has_one_entry() {
        let table = Table::default();
        let fixed = table.add_static("127.0.0.1:1");
        let added = table
            .sync(&list(&[("a", "127.0.0.1:1"), ("b", "127.0.0.1:2")]))
            .added;
        assert_eq!(added.len(), 1);
        assert_eq!(added[0].name(), "b");
        assert!(fixed.status().registered);
        // Its key goes; its address was given, so it stays.
        let gone = table.sync(&list(&[])).removed;
        assert_eq!((gone.len(), gone[0].index), (1, added[0].index));
        assert!(!fixed.status().registered);
        assert_eq!(table.all().len(), 1);
    }

    #[test]
    fn a_key_that_went_under_a_session_takes_the_entry_with_the_session() {
        let table = Table::default();
        let added = table.sync(&list(&[("a", "127.0.0.1:1")])).added;
        let (session, _commands) = SessionHandle::new();
        added[0].attach(session);
        assert!(table.sync(&list(&[])).removed.is_empty());
        assert!(!table.drop_gone(&added[0]), "its session lives");
        added[0].detach();
        assert!(table.drop_gone(&added[0]));
        assert!(table.all().is_empty());
        // One that has its key keeps its place without a session.
        let again = table.sync(&list(&[("a", "127.0.0.1:1")])).added;
        assert!(!table.drop_gone(&again[0]));
    }

    #[test]
    fn a_fixed_address_that_is_a_registered_worker_goes() {
        let table = Table::default();
        let fixed = table.add_static("localhost:1");
        assert!(!table.drop_double(&fixed, "a"));
        let added = table.sync(&list(&[("a", "127.0.0.1:1")])).added;
        assert!(!table.drop_double(&added[0], "a"));
        assert!(table.drop_double(&fixed, "a"));
        assert_eq!(table.all().len(), 1);
    }

    #[test]
    fn who_has_not_answered_is_waited_for_while_it_may_be_alive() {
        let within = Duration::from_secs(3);
        let table = Table::default();
        let entry = table.sync(&list(&[("a", "127.0.0.1:1")])).added.remove(0);
        let asked = Instant::now();
        let may = |after: Duration| entry.may_answer(asked, asked + after, within);
        // It is known of, and was not reached yet.
        assert!(may(Duration::ZERO) && may(within / 2));
        assert!(!may(within));
        entry.refused();
        assert!(!may(Duration::ZERO));
        // Somebody came at another address.
        table.sync(&list(&[("a", "127.0.0.1:2")]));
        assert!(may(Duration::ZERO));
        // One that is there, and silent since it was asked.
        let (session, _commands) = SessionHandle::new();
        entry.refused();
        entry.attach(session);
        entry.heard(asked);
        assert!(may(within * 9));
        entry.set_state(State::Lost(Suspicion::Silent));
        assert!(!may(Duration::ZERO));
        // One that says other things leaves this unanswered for good.
        entry.set_state(State::Live);
        entry.heard(asked + within / 2);
        assert!(!may(within));
        // Its session broke: from then on it is away.
        entry.detach();
        assert!(may(within));
        assert!(!may(within + within / 2));
    }

    #[test]
    fn a_list_is_waited_for_while_it_may_come() {
        let (table, within) = (Table::default(), Duration::from_secs(3));
        assert!(!table.is_unlisted(Instant::now(), within));
        table.expects_list();
        assert!(table.is_unlisted(Instant::now(), within));
        assert!(!table.is_unlisted(Instant::now() + within, within));
        table.sync(&list(&[]));
        assert!(!table.is_unlisted(Instant::now(), within));
    }

    #[test]
    fn a_new_address_is_taken_over() {
        let table = Table::default();
        let added = table.sync(&list(&[("a", "127.0.0.1:1")])).added;
        let again = table.sync(&list(&[("a", "127.0.0.1:2")]));
        assert!(again.added.is_empty() && again.removed.is_empty());
        assert_eq!(added[0].address(), "127.0.0.1:2");
    }
}
