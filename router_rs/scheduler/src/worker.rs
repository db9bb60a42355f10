//! A worker as the scheduler sees it.

use crate::booking::Work;
use crate::deadline::ClassTargets;
use crate::facts::Table;
use crate::request::{Class, PerClass};
use crate::step_model::StepModel;
use crate::survey::LocalPrefill;
use crate::transfer::TransferRates;
use crate::usual::UsualStreams;
use kvmesh_kv_index::WorkerSlot;
use std::collections::BTreeSet;
use std::sync::Arc;

/// What work a worker takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Computes prompts and hands the KV on.
    Prefill,
    /// Takes KV over and produces tokens.
    Decode,
    /// Does both.
    Both,
}

/// What a worker is doing with its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Loads its model: takes nothing.
    Loading,
    /// Times its first steps: placements wait there.
    WarmingUp,
    /// Works.
    Serving,
    /// Is about to exit: takes nothing.
    Stopping,
}

/// The KV pool by state, in blocks. The states are disjoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KvRoom {
    /// Never used or given up.
    pub free: u64,
    /// Cached prefixes that nobody uses.
    pub evictable: u64,
    /// Held by running requests.
    pub running: u64,
    /// Held by transfers alone.
    pub pinned: u64,
    /// Promised, not yet filled.
    pub reserved: u64,
}

/// Requests by class, as far as costs weigh them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ByClass {
    /// Requests whose prompt is not computed yet, queued or begun.
    pub waiting: PerClass<u32>,
    /// Prompt tokens that these still have to compute.
    pub waiting_tokens: PerClass<u64>,
    /// Requests that decode, or will once their KV is there.
    pub decoding: PerClass<u32>,
}

impl ByClass {
    pub(crate) fn add(&mut self, other: &Self) {
        for class in 0..Class::ALL.len() {
            self.waiting[class] += other.waiting[class];
            self.waiting_tokens[class] += other.waiting_tokens[class];
            self.decoding[class] += other.decoding[class];
        }
    }

    pub(crate) fn take(&mut self, other: &Self) {
        for class in 0..Class::ALL.len() {
            self.waiting[class] -= other.waiting[class];
            self.waiting_tokens[class] -= other.waiting_tokens[class];
            self.decoding[class] -= other.decoding[class];
        }
    }
}

/// A prompt of this router that its worker has not begun, or not finished: what
/// is known of it one by one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prompt {
    /// Its key, as [`RequestView::virtual_deadline_ms`](crate::RequestView).
    pub virtual_deadline_ms: f64,
    /// Urgency.
    pub class: Class,
    /// Tokens to compute there.
    pub tokens: u64,
    /// Sum of their context lengths, in tokens.
    pub context: u64,
}

/// A share of a worker's work, as its load report gives it. What `classes` does
/// not show of the sums counts as standard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Share {
    /// Requests in its queue.
    pub queued: u32,
    /// Prompt tokens that the queue still has to compute.
    pub queued_prefill_tokens: u64,
    /// Prompt tokens that started prefills still have to compute.
    pub running_prefill_tokens: u64,
    /// Requests that decode.
    pub decoding: u32,
    /// Sum of their context lengths in tokens.
    pub decode_context: u64,
    /// Requests that wait for KV from another worker.
    pub receiving: u32,
    /// The same by class.
    pub classes: ByClass,
}

/// A worker's last load report.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Load {
    /// Work of this router.
    pub own: Share,
    /// Work of all other routers.
    pub others: Share,
    /// Room in the pool.
    pub kv: KvRoom,
    /// When the running step should end, ms on the clock of
    /// [`Cluster::now_ms`]; in the past when none runs.
    pub step_ends_ms: f64,
}

/// How fast cached KV comes back to the device, bytes/ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reload {
    /// From the host's memory.
    pub host: u64,
    /// From disk.
    pub disk: u64,
}

impl Default for Reload {
    /// The prior: 20 GB/s, which PCIe 4.0 x16 brings of its 32, and 2 GB/s of
    /// a disk (NVMe, read in blocks).
    fn default() -> Self {
        Self {
            host: 20_000_000,
            disk: 2_000_000,
        }
    }
}

/// What a worker's engine can do, as far as placing goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abilities {
    /// Mesh hand-off: blocks flow while prefill computes.
    pub streamed_hand_off: bool,
    /// Its prefill emits the first token; else only decode does.
    pub prefill_emits_first_token: bool,
    /// A prefill can stop between layers; else only between chunks.
    pub layer_preemption: bool,
    /// Host that its KV lies on. Equal ones share memory. Empty: not known.
    pub host: Arc<str>,
    /// Engine hand-off by this connector. Empty: none.
    pub engine_connector: Arc<str>,
    /// What transfer partners must agree on, as one text (all fields of
    /// `KvCompatibility`); only equal ones pair.
    pub pairing: Arc<str>,
    /// A prefix can be pulled from and by it.
    pub prefix_pull: bool,
    /// How fast cached blocks come back from below the device.
    pub reload: Reload,
    /// Grammars can be followed.
    pub grammars: bool,
    /// Grammars can be taken up in the middle of an output.
    pub grammars_over_continuation: bool,
    /// Penalties are right over a continuation.
    pub penalties_over_continuation: bool,
    /// Most alternatives with log-probability. 0: none at all.
    pub max_logprobs: u32,
    /// Prompts with a cache salt are refused.
    pub no_cache_salt: bool,
    /// KV block size in tokens.
    pub block_tokens: u32,
    /// KV blocks in the pool.
    pub pool_blocks: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Most requests in a step.
    pub max_batch: u32,
    /// Longest prompt and output together, in tokens.
    pub context_length: u32,
}

/// A worker as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerView {
    /// Its number in the index, and the key of all that is kept by worker.
    pub slot: WorkerSlot,
    /// Role in force.
    pub role: Role,
    /// What it is doing with its life.
    pub phase: Phase,
    /// Takes no new work.
    pub draining: bool,
    /// Silent or stuck: gets no new work until it speaks.
    pub suspect: bool,
    /// Name of its model.
    pub model: Arc<str>,
    /// Digest of its model: a request keeps to one digest.
    pub digest: Arc<str>,
    /// Adapters that it has, by name.
    pub adapters: Arc<BTreeSet<String>>,
    /// What it can do.
    pub abilities: Arc<Abilities>,
    /// Its step times.
    pub step: StepModel,
    /// Its last load report.
    pub load: Load,
    /// Own work that the report does not show yet ([`crate::Bookings::booked`]).
    pub booked: Work,
    /// Own prompts that the report shows as waiting, and that are computed
    /// ([`crate::Bookings::reported`]).
    pub computed: Work,
    /// Own prompts there, or chosen to go there, that are not computed yet:
    /// known one by one, where the sums above count them too. May be empty.
    pub prompts: Vec<Prompt>,
    /// Output tokens that a stream there has left on average, by class
    /// ([`crate::OutputLengths::left_of_running`]).
    pub left: PerClass<f64>,
    /// Streams that it has on average.
    pub usual: UsualStreams,
    /// What lies between a placement there and the client's first token besides
    /// waiting, computing and moving KV, ms ([`crate::Relay`]).
    pub relay_ms: f64,
}

impl WorkerView {
    /// Its load report of now, on the clock of [`Cluster::now_ms`].
    pub fn report(&mut self, load: Load, now_ms: f64) {
        self.load = load;
        self.usual.observe(now_ms, self.by_class().decoding);
    }

    /// Prompt tokens waiting or being computed, by everyone.
    pub fn prefill_backlog_tokens(&self) -> u64 {
        self.reported_backlog_tokens() + self.booked.prefill_tokens
    }

    /// The same of what the report shows, without what is computed meanwhile.
    pub(crate) fn reported_backlog_tokens(&self) -> u64 {
        let of = |share: &Share| share.queued_prefill_tokens + share.running_prefill_tokens;
        let (own, computed) = (of(&self.load.own), &self.computed);
        let own = match computed.prefills {
            0 => own,
            _ => {
                let listed: u64 = self.prompts.iter().map(|prompt| prompt.tokens).sum();
                let waits = listed.saturating_sub(self.booked.prefill_tokens);
                less(own, computed.prefill_tokens, waits)
            }
        };
        own + of(&self.load.others)
    }

    /// How many prompts other routers have there, and how many tokens are left of them, by
    /// class; what no class shows counts as standard.
    pub(crate) fn others_by_class(&self) -> PerClass<(u32, u64)> {
        let others = &self.load.others;
        let of = &others.classes;
        let mut all: PerClass<(u32, u64)> =
            std::array::from_fn(|class| (of.waiting[class], of.waiting_tokens[class]));
        let shown: u64 = of.waiting_tokens.iter().sum();
        let tokens = others.queued_prefill_tokens + others.running_prefill_tokens;
        let standard = &mut all[Class::Standard.index()];
        standard.1 += tokens.saturating_sub(shown);
        all
    }

    /// Requests that decode there or will.
    pub fn decode_batch(&self) -> u32 {
        let of = |share: &Share| share.decoding + share.receiving;
        of(&self.load.own) + of(&self.load.others) + self.booked.decodes
    }

    /// Sum of their context lengths, in tokens.
    pub fn decode_context(&self) -> u64 {
        self.load.own.decode_context + self.load.others.decode_context + self.booked.decode_context
    }

    /// Requests of any kind that are there or on their way.
    pub fn requests(&self) -> u32 {
        let of = |share: &Share| share.queued + share.decoding + share.receiving;
        of(&self.load.own) + of(&self.load.others) + self.booked.prefills + self.booked.decodes
    }

    /// Whether its phase and its plans let it take new work.
    pub fn takes_work(&self) -> bool {
        matches!(self.phase, Phase::Serving | Phase::WarmingUp) && !self.draining
    }

    /// Everyone's prompts and streams by class.
    pub fn by_class(&self) -> ByClass {
        let (own, others, booked) = (&self.load.own, &self.load.others, &self.booked);
        let mut sum = self.own_classes();
        sum.add(&others.classes);
        sum.add(&booked.classes);
        let [first, standard, last] = &sum.waiting_tokens;
        let shown = first + standard + last;
        let standard = Class::Standard.index();
        let rest = self.prefill_backlog_tokens().saturating_sub(shown);
        if rest > 0 {
            sum.waiting_tokens[standard] += rest;
            let shown: u32 = sum.waiting.iter().sum();
            let own = own.queued.saturating_sub(self.computed.prefills);
            let queued = own + others.queued + booked.prefills;
            sum.waiting[standard] += queued.saturating_sub(shown).max(1);
        }
        let shown: u32 = sum.decoding.iter().sum();
        sum.decoding[standard] += self.decode_batch().saturating_sub(shown);
        sum
    }

    /// Own prompts and streams as the report shows them, without prompts that are
    /// computed meanwhile.
    fn own_classes(&self) -> ByClass {
        let mut own = self.load.own.classes;
        if self.computed.prefills == 0 {
            return own;
        }
        let (gone, unseen) = (&self.computed.classes, &self.booked.classes);
        for at in 0..3 {
            let of_class = self.prompts.iter().filter(|one| one.class.index() == at);
            let (mut count, mut tokens) = (0_u32, 0_u64);
            for prompt in of_class {
                (count, tokens) = (count + 1, tokens + prompt.tokens);
            }
            let waits = count.saturating_sub(unseen.waiting[at]);
            let left = own.waiting[at].saturating_sub(gone.waiting[at]);
            own.waiting[at] = left.max(waits.min(own.waiting[at]));
            let waits = tokens.saturating_sub(unseen.waiting_tokens[at]);
            own.waiting_tokens[at] = less(own.waiting_tokens[at], gone.waiting_tokens[at], waits);
        }
        own
    }

    /// Blocks that a new request could get.
    pub fn available_blocks(&self) -> u64 {
        (self.load.kv.free + self.load.kv.evictable).saturating_sub(self.booked.blocks)
    }

    /// Blocks of so many tokens.
    pub fn blocks(&self, tokens: u64) -> u64 {
        tokens.div_ceil(u64::from(self.abilities.block_tokens.max(1)))
    }
}

/// What a report shows without what is gone since. Of what is gone it may have shown
/// a part only; what is known to wait there stays.
fn less(shown: u64, gone: u64, waits: u64) -> u64 {
    shown.saturating_sub(gone).max(waits.min(shown))
}

/// All workers, and who asks.
#[derive(Debug, Clone, Copy)]
pub struct Cluster<'a> {
    /// Hash of this router's id: two routers break ties differently.
    pub router: u64,
    /// Now, on the clock of the virtual deadlines, ms.
    pub now_ms: f64,
    /// The workers, each slot once.
    pub workers: &'a [WorkerView],
    /// What moving KV takes.
    pub transfers: &'a TransferRates,
    /// When decode workers compute prompts, as far as admission goes: that of the
    /// policy in force.
    pub local_prefill: LocalPrefill,
    /// What a [`crate::Roster`] has counted of the workers.
    pub(crate) table: Option<&'a Table>,
}

impl<'a> Cluster<'a> {
    /// A cluster at time 0 of which no transfer is known.
    pub fn new(router: u64, workers: &'a [WorkerView]) -> Self {
        static UNKNOWN: TransferRates = TransferRates::new();
        Self {
            router,
            now_ms: 0.0,
            workers,
            transfers: &UNKNOWN,
            local_prefill: LocalPrefill::default(),
            table: None,
        }
    }

    /// Works with what is counted of the workers, or counts it now.
    pub(crate) fn with_table<T>(&self, work: impl FnOnce(&Table) -> T) -> T {
        if let Some(table) = self.table {
            return work(table);
        }
        let mut table = Table::new(&ClassTargets::default());
        table.count_all(self.workers);
        work(&table)
    }

    /// The same at another time.
    #[must_use]
    pub fn at(self, now_ms: f64) -> Self {
        Self { now_ms, ..self }
    }

    /// The same under a policy with this rule.
    #[must_use]
    pub fn with_local_prefill(self, local_prefill: LocalPrefill) -> Self {
        Self {
            local_prefill,
            ..self
        }
    }

    /// The same with what is learnt of transfers.
    #[must_use]
    pub fn with_transfers(self, transfers: &'a TransferRates) -> Self {
        Self { transfers, ..self }
    }
}
