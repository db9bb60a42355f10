//! Who may do what for a request: one pass over the workers.

use crate::cost::tie_break;
use crate::facts::Table;
use crate::fit::{Duty, Miss, able, fits_else, reason};
use crate::floor::LANES;
use crate::plan::NoPlan;
use crate::request::RequestView;
use crate::terms::Asked;
use crate::worker::{Cluster, Role};
use kvmesh_kv_index::WorkerSlot;

/// When a worker that decodes computes a prompt too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LocalPrefill {
    /// `both` workers always; decode workers where no prefill worker is
    /// there.
    WithoutPrefillWorkers,
    /// Wherever it costs least.
    #[default]
    ByCost,
}

/// Workers by what they may do for a request, each by its place in
/// [`Cluster::workers`]. Used again from choice to choice.
#[derive(Debug, Clone, Default)]
pub(crate) struct Survey {
    /// Compute the prompt for another.
    pub(crate) prefill: Vec<u32>,
    /// Take the KV over and produce the output.
    pub(crate) decode: Vec<u32>,
    /// Do all of it.
    pub(crate) whole: Vec<u32>,
    /// What lies between any of them and a client at least, ms: it tells no plan
    /// from another.
    pub(crate) relay_least_ms: f64,
    /// Hold most of the sequence and may give it: a few of each kind of KV.
    pub(crate) holders: Vec<Holder>,
    both: Vec<u32>,
}

/// Holders of each kind that are weighed against each other: the nearest one
/// need not be the one that holds most.
pub(crate) const HOLDERS: usize = 3;

/// A worker that a prefix may be pulled from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Holder {
    /// Its place in [`Cluster::workers`].
    pub(crate) at: u32,
    /// Number of its kind of KV ([`crate::facts::Facts::kind`]).
    pub(crate) kind: u32,
    /// Tokens of the sequence that it holds.
    pub(crate) tokens: u64,
}

impl Holder {
    /// More tokens go first; of equal ones, which goes first differs from request
    /// to request.
    fn rank(&self, mix: u64) -> (u64, u64) {
        (self.tokens, tie_break(mix, u128::from(self.at)))
    }
}

impl Survey {
    /// Takes a holder in, if it is among the best of its kind: best first.
    fn offer(&mut self, holder: Holder, mix: u64) {
        let of_kind = self.holders.iter().enumerate();
        let of_kind = of_kind.filter(|(_, other)| other.kind == holder.kind);
        let (mut count, mut last, mut before) = (0, None, None);
        for (at, other) in of_kind {
            count += 1;
            last = Some((at, *other));
            if before.is_none()
                && other.tokens <= holder.tokens
                && other.rank(mix) < holder.rank(mix)
            {
                before = Some(at);
            }
        }
        if count == HOLDERS {
            let Some((at, _)) = last.filter(|_| before.is_some()) else {
                return;
            };
            self.holders.remove(at);
        }
        let at = before.unwrap_or(self.holders.len());
        self.holders.insert(at, holder);
    }

    /// Looks at every worker.
    ///
    /// # Errors
    /// Why there is no plan: the nearest miss.
    pub(crate) fn look(
        &mut self,
        cluster: &Cluster<'_>,
        table: &Table,
        request: &RequestView<'_>,
        local: LocalPrefill,
    ) -> Result<(), NoPlan> {
        let lists = [
            &mut self.prefill,
            &mut self.decode,
            &mut self.whole,
            &mut self.both,
        ];
        lists.into_iter().for_each(Vec::clear);
        self.holders.clear();
        self.relay_least_ms = f64::INFINITY;
        let Some(model) = table.names.find_model(request.model) else {
            return Err(NoPlan::UnknownModel);
        };
        let (pure_prefill, pure_decode) = self.sort(cluster, table, request, model);
        // A `both` worker computes prompts for others only where others exist.
        if pure_decode {
            self.prefill.extend_from_slice(&self.both);
        }
        let decode_workers_compute = local == LocalPrefill::ByCost
            || self.prefill.is_empty() && !(pure_prefill && waits_for_prefill(cluster, request));
        if !decode_workers_compute {
            self.whole.clear();
        }
        self.whole.extend_from_slice(&self.both);
        if self.prefill.is_empty() || self.decode.is_empty() {
            self.prefill.clear();
            self.decode.clear();
        }
        if self.prefill.is_empty() && self.whole.is_empty() {
            return Err(why_none(cluster, request));
        }
        Ok(())
    }

    /// Which blocks of eight workers have one in a list.
    pub(crate) fn blocks(&self, workers: usize) -> Vec<bool> {
        let mut blocks = vec![false; workers.div_ceil(LANES)];
        for list in [&self.prefill, &self.decode, &self.whole] {
            for at in list {
                blocks[*at as usize / LANES] = true;
            }
        }
        blocks
    }

    /// Length of its longest list.
    pub(crate) fn longest(&self) -> usize {
        let lists = [&self.prefill, &self.decode, &self.whole];
        lists.into_iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Puts each worker into its lists; whether workers are there that only
    /// compute prompts, and whether some can take this one over that only
    /// decode.
    fn sort(
        &mut self,
        cluster: &Cluster<'_>,
        table: &Table,
        request: &RequestView<'_>,
        model: u32,
    ) -> (bool, bool) {
        let asked = Asked::of(request, cluster.now_ms);
        let found = request.cached.by_slot();
        let longest = request.sequence().saturating_sub(1);
        let (plain, salted) = (request.is_plain(), request.needs.cache_salt);
        let (mut pure_prefill, mut pure_decode) = (false, false);
        let mix = tie_break(cluster.router, request.id);
        for (at, row) in table.gates.iter().enumerate() {
            if row.model != model {
                continue;
            }
            pure_prefill |= row.role == Role::Prefill;
            let held = found.get(row.slot as usize).copied().unwrap_or(0);
            let at = at as u32;
            if held > 0 && row.gives {
                let tokens = u64::from(held).min(longest);
                let kind = row.kind;
                self.offer(Holder { at, kind, tokens }, mix);
            }
            if !row.ready || asked.held > row.limit || salted && !row.salted {
                continue;
            }
            if asked.held > row.room {
                // Its own prefix may be among the blocks in use.
                let view = &cluster.workers[at as usize];
                let cached = request.cached_on(WorkerSlot(row.slot));
                let shared = view.blocks(cached).min(view.load.kv.running) as f64 * row.block;
                if asked.held > row.room + shared {
                    continue;
                }
            }
            let mut decodes = true;
            if !plain {
                let view = &cluster.workers[at as usize];
                if !fits_else(view, request) {
                    continue;
                }
                decodes = !request.needs.penalties || view.abilities.penalties_over_continuation;
            }
            self.relay_least_ms = self.relay_least_ms.min(row.relay_ms);
            match row.role {
                Role::Prefill => self.prefill.push(at),
                Role::Decode => {
                    pure_decode |= decodes;
                    self.whole.push(at);
                }
                Role::Both => self.both.push(at),
            }
            if decodes && row.role != Role::Prefill {
                self.decode.push(at);
            }
        }
        (pure_prefill, pure_decode)
    }
}

/// A prefill worker that is only full will have room again: wait for it.
fn waits_for_prefill(cluster: &Cluster<'_>, request: &RequestView<'_>) -> bool {
    able(cluster, request, Duty::Prefill, &[Role::Prefill]) == Err(Miss::NoRoom)
}

/// The nearest miss of all workers: what the client is told.
fn why_none(cluster: &Cluster<'_>, request: &RequestView<'_>) -> NoPlan {
    let any = [Role::Decode, Role::Both];
    match able(cluster, request, Duty::Decode, &any) {
        Err(miss) => reason(miss, Duty::Decode, request),
        Ok(()) => match able(
            cluster,
            request,
            Duty::Prefill,
            &[Role::Prefill, Role::Both],
        ) {
            Err(miss) => reason(miss, Duty::Prefill, request),
            Ok(()) => NoPlan::NoPair,
        },
    }
}

/// Whether a request can be placed now by a policy of the cluster's
/// [`LocalPrefill`]: what admission asks.
///
/// # Errors
/// [`NoPlan`], as [`crate::Policy::choose`] would say.
pub fn placeable(cluster: &Cluster<'_>, request: &RequestView<'_>) -> Result<(), NoPlan> {
    cluster
        .with_table(|table| Survey::default().look(cluster, table, request, cluster.local_prefill))
}
