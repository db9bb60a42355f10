//! Load that was chosen or sent and is not yet in a report.

use crate::request::Class;
use crate::worker::{ByClass, Prompt};
use kvmesh_kv_index::WorkerSlot;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Work of one stage on one worker, or a sum of such.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Prompts to compute.
    pub prefills: u32,
    /// Prompt tokens to compute.
    pub prefill_tokens: u64,
    /// Sum of their context lengths, in tokens.
    pub prefill_context: u64,
    /// Requests that will decode.
    pub decodes: u32,
    /// Sum of their context lengths, in tokens.
    pub decode_context: u64,
    /// KV blocks that will be reserved.
    pub blocks: u64,
    /// Prompts and streams by class; what it does not show counts as standard.
    pub classes: ByClass,
}

impl Work {
    fn add(&mut self, other: &Self) {
        self.prefills += other.prefills;
        self.prefill_tokens += other.prefill_tokens;
        self.prefill_context += other.prefill_context;
        self.decodes += other.decodes;
        self.decode_context += other.decode_context;
        self.blocks += other.blocks;
        self.classes.add(&other.classes);
    }

    fn take(&mut self, other: &Self) {
        self.prefills -= other.prefills;
        self.prefill_tokens -= other.prefill_tokens;
        self.prefill_context -= other.prefill_context;
        self.decodes -= other.decodes;
        self.decode_context -= other.decode_context;
        self.blocks -= other.blocks;
        self.classes.take(&other.classes);
    }

    /// What one that waits means to those that choose after it: a prompt in
    /// line. Room and streams it takes when it goes.
    pub(crate) fn prompt_alone(&self) -> Self {
        let mut classes = self.classes;
        classes.decoding = [0; 3];
        Self {
            decodes: 0,
            decode_context: 0,
            blocks: 0,
            classes,
            ..*self
        }
    }

    /// The prompt in it alone, as it waits.
    fn waiting(&self) -> Self {
        Self {
            prefills: self.prefills,
            prefill_tokens: self.prefill_tokens,
            prefill_context: self.prefill_context,
            classes: ByClass {
                decoding: [0; 3],
                ..self.classes
            },
            ..Self::default()
        }
    }

    /// The prompt in it, as others see it that wait there.
    fn prompt(&self, virtual_deadline_ms: f64) -> Option<Prompt> {
        let class = Class::ALL
            .into_iter()
            .find(|class| self.classes.waiting[class.index()] > 0)
            .unwrap_or_default();
        (self.prefills > 0).then_some(Prompt {
            virtual_deadline_ms,
            class,
            tokens: self.prefill_tokens,
            context: self.prefill_context,
        })
    }
}

/// What this router has booked on each worker and no load report shows yet, and
/// which prompts of it are not computed yet.
///
/// A load report echoes the number of the last command that it reflects. So
/// booked is exactly: what was chosen and not sent, plus what was sent after
/// that number. Nothing decays and nothing is guessed. A prompt is known one by
/// one from the choice until its first token, whatever reports show; from then on
/// until a report of that step or a later one it is known as computed: reports may
/// be late, first tokens are not.
///
/// Sums are kept up to date with each booking: a choice reads what changed
/// ([`Bookings::take_changes`]) and nothing else.
#[derive(Debug, Clone, Default)]
pub struct Bookings(Arc<Mutex<Ledger>>);

#[derive(Debug, Default)]
struct Ledger {
    next: u64,
    accounts: BTreeMap<WorkerSlot, Account>,
    /// Workers whose sums changed since they were last taken.
    changed: BTreeSet<WorkerSlot>,
}

/// What this router knows of its own work on a worker besides the report in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Booked {
    /// The report does not show it yet.
    pub unseen: Work,
    /// Prompts that it shows as waiting, and that are computed.
    pub computed: Work,
}

/// What is booked on one worker.
#[derive(Debug, Default)]
struct Account {
    booked: Work,
    entries: BTreeMap<u64, Entry>,
    /// Keys of `entries` whose prompt is not computed yet.
    prompts: BTreeMap<u64, Listed>,
    /// Prompts whose first token came, and that reports may still show as waiting.
    computed: Vec<Computed>,
    /// Last command echoed.
    echoed: Option<u64>,
}

/// A prompt whose first token came before a report that knows of it.
#[derive(Debug)]
struct Computed {
    /// From the report on that echoes it the prompt is in the worker's own sums.
    command: u64,
    /// The step that ended it.
    step: u64,
    /// The prompt, as it waited.
    prompt: Work,
}

#[derive(Debug)]
struct Entry {
    work: Work,
    command: Option<u64>,
}

/// A prompt that is not computed yet, with what is booked for it.
#[derive(Debug)]
struct Listed {
    prompt: Prompt,
    booked: Work,
    /// It went there; else it would go there, and waits in the router.
    went: bool,
}

impl Listed {
    /// The prompt in some work, if there is one.
    fn of(work: &Work, virtual_deadline_ms: f64, went: bool) -> Option<Self> {
        Some(Self {
            prompt: work.prompt(virtual_deadline_ms)?,
            booked: work.waiting(),
            went,
        })
    }
}

impl Account {
    /// Prompts that the report in force shows as waiting, and that are computed.
    fn shown_too_late(&self) -> Work {
        let echoed = self.echoed.unwrap_or_default();
        let shown = self.computed.iter().filter(|one| one.command <= echoed);
        let mut sum = Work::default();
        shown.for_each(|one| sum.add(&one.prompt));
        sum
    }

    fn forget(&mut self, key: u64) {
        if let Some(entry) = self.entries.remove(&key) {
            self.booked.take(&entry.work);
        }
    }

    fn forget_where(&mut self, gone: impl Fn(&Entry) -> bool) {
        let booked = &mut self.booked;
        self.entries.retain(|_, entry| {
            let gone = gone(entry);
            if gone {
                booked.take(&entry.work);
            }
            !gone
        });
    }
}

impl Bookings {
    /// An empty ledger.
    pub fn new() -> Self {
        Self::default()
    }

    /// Books work at the moment of choice. It counts until the worker's
    /// report shows it or the guard goes.
    #[must_use = "a booking that is dropped is released"]
    pub fn book(&self, worker: WorkerSlot, work: Work) -> Booking {
        self.enter(worker, work, None)
    }

    /// As [`Bookings::book`]; the prompt in it, if there is one, is listed under
    /// its virtual deadline until [`Booking::started`] or the guard goes.
    #[must_use = "a booking that is dropped is released"]
    pub fn book_prompt(&self, worker: WorkerSlot, work: Work, virtual_deadline_ms: f64) -> Booking {
        let listed = Listed::of(&work, virtual_deadline_ms, true);
        self.enter(worker, work, listed)
    }

    /// As [`Bookings::book_prompt`], for a prompt that waits in the router and
    /// would go there now.
    #[must_use = "a booking that is dropped is released"]
    pub(crate) fn list_prompt(
        &self,
        worker: WorkerSlot,
        work: Work,
        virtual_deadline_ms: f64,
    ) -> Booking {
        let listed = Listed::of(&work, virtual_deadline_ms, false);
        self.enter(worker, work, listed)
    }

    /// Earliest virtual deadline of the prompts that went to a worker and are
    /// not computed yet, ms.
    pub fn first_sent_ms(&self, worker: WorkerSlot) -> Option<f64> {
        let ledger = self.lock();
        let listed = ledger.accounts.get(&worker)?.prompts.values();
        let went = listed.filter(|listed| listed.went);
        let keys = went.map(|listed| listed.prompt.virtual_deadline_ms);
        keys.min_by(f64::total_cmp)
    }

    fn enter(&self, worker: WorkerSlot, work: Work, prompt: Option<Listed>) -> Booking {
        let mut ledger = self.lock();
        let key = ledger.next;
        ledger.next += 1;
        ledger.changed.insert(worker);
        let account = ledger.accounts.entry(worker).or_default();
        account.booked.add(&work);
        account.entries.insert(
            key,
            Entry {
                work,
                command: None,
            },
        );
        if let Some(prompt) = prompt {
            account.prompts.insert(key, prompt);
        }
        Booking {
            ledger: self.clone(),
            worker,
            key,
        }
    }

    /// A load report of this worker reflects all commands up to this one.
    pub fn echoed(&self, worker: WorkerSlot, command: u64) {
        self.change(worker, |account| {
            account.forget_where(|entry| entry.command.is_some_and(|sent| sent <= command));
            account.echoed = Some(command);
        });
    }

    /// A load report of this worker shows what steps up to this one brought.
    pub fn reported(&self, worker: WorkerSlot, step: u64) {
        self.change(worker, |account| {
            account.computed.retain(|one| one.step > step);
        });
    }

    /// A new session with this worker, or none: what was sent on the old one
    /// is no longer on its way, and commands are numbered anew.
    pub fn session_ended(&self, worker: WorkerSlot) {
        self.change(worker, |account| {
            account.forget_where(|entry| entry.command.is_some());
            account.computed.clear();
            let kept = &account.entries;
            account.prompts.retain(|key, _| kept.contains_key(key));
            account.echoed = None;
        });
    }

    /// Has the next [`Bookings::take_changes`] give this worker's sums, changed
    /// or not: its view is new.
    pub fn touch(&self, worker: WorkerSlot) {
        self.lock().changed.insert(worker);
    }

    /// What is booked on a worker.
    pub fn booked(&self, worker: WorkerSlot) -> Work {
        let ledger = self.lock();
        let account = ledger.accounts.get(&worker);
        account.map_or_else(Work::default, |account| account.booked)
    }

    /// What is booked on every worker that has something booked.
    pub fn all(&self) -> BTreeMap<WorkerSlot, Work> {
        let ledger = self.lock();
        let booked = ledger.accounts.iter();
        booked
            .filter(|(_, account)| !account.entries.is_empty())
            .map(|(worker, account)| (*worker, account.booked))
            .collect()
    }

    /// Gives the sums of each worker for which they changed since the last
    /// call. For the one place that keeps the views.
    pub fn take_changes(
        &self,
        mut each: impl FnMut(WorkerSlot, &Booked, &mut dyn Iterator<Item = Prompt>),
    ) {
        let mut ledger = self.lock();
        let Ledger {
            accounts, changed, ..
        } = &mut *ledger;
        for worker in std::mem::take(changed) {
            let Some(account) = accounts.get(&worker) else {
                each(worker, &Booked::default(), &mut std::iter::empty());
                continue;
            };
            let booked = Booked {
                unseen: account.booked,
                computed: account.shown_too_late(),
            };
            each(
                worker,
                &booked,
                &mut account.prompts.values().map(|listed| listed.prompt),
            );
            if account.entries.is_empty() && account.prompts.is_empty() && account.echoed.is_none()
            {
                accounts.remove(&worker);
            }
        }
    }

    fn change(&self, worker: WorkerSlot, change: impl FnOnce(&mut Account)) {
        let mut ledger = self.lock();
        ledger.changed.insert(worker);
        change(ledger.accounts.entry(worker).or_default());
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Work booked on a worker; released when dropped.
#[derive(Debug)]
pub struct Booking {
    ledger: Bookings,
    worker: WorkerSlot,
    key: u64,
}

impl Booking {
    /// It was sent as this command of the worker's session.
    pub fn sent(&self, command: u64) {
        let key = self.key;
        self.ledger.change(self.worker, |account| {
            let seen = account.echoed.is_some_and(|echoed| echoed >= command);
            if let Some(entry) = account.entries.get_mut(&key) {
                entry.command = Some(command);
            }
            if seen {
                account.forget(key);
            }
        });
    }

    /// Its first token came: its prompt no longer holds others up.
    pub fn started(&self) {
        let key = self.key;
        self.ledger.change(self.worker, |account| {
            account.prompts.remove(&key);
        });
    }

    /// As [`Booking::started`], where it is known in which step of this worker: until
    /// a report of that step or a later one comes ([`Bookings::reported`]), what
    /// reports say of the prompt is old. Whether there was one.
    pub fn started_in(&self, step: u64) -> bool {
        let key = self.key;
        let mut was = false;
        self.ledger.change(self.worker, |account| {
            let Some(listed) = account.prompts.remove(&key) else {
                return;
            };
            was = true;
            let command = match account.entries.get_mut(&key) {
                // No report has it: its prompt is in what is booked.
                Some(entry) => {
                    entry.work.take(&listed.booked);
                    account.booked.take(&listed.booked);
                    entry.command
                }
                None => Some(0),
            };
            if let Some(command) = command {
                let prompt = listed.booked;
                account.computed.push(Computed {
                    command,
                    step,
                    prompt,
                });
            }
        });
        was
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        let key = self.key;
        self.ledger.change(self.worker, |account| {
            account.forget(key);
            account.prompts.remove(&key);
        });
    }
}
