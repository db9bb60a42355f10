//! Who may do what for a request: one pass over the workers.

use crate::fit::{Duty, Miss, able, fits_now, reason, takes_over};
use crate::plan::NoPlan;
use crate::request::RequestView;
use crate::worker::{Cluster, Role};

/// When a worker that decodes computes a prompt too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LocalPrefill {
    /// `both` workers always; decode workers where no prefill worker is
    /// there.
    #[default]
    WithoutPrefillWorkers,
    /// Wherever it costs least.
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
    /// Holds most of the sequence and may give it: (place, tokens).
    pub(crate) holder: Option<(u32, u64)>,
    both: Vec<u32>,
}

impl Survey {
    /// Looks at every worker.
    ///
    /// # Errors
    /// Why there is no plan: the nearest miss.
    pub(crate) fn look(
        &mut self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
        local: LocalPrefill,
    ) -> Result<(), NoPlan> {
        for list in [
            &mut self.prefill,
            &mut self.decode,
            &mut self.whole,
            &mut self.both,
        ] {
            list.clear();
        }
        self.holder = None;
        let found = !request.cached.by_slot().is_empty();
        let (mut pure_prefill, mut pure_decode) = (false, false);
        for (at, worker) in cluster.workers.iter().enumerate() {
            let at = at as u32;
            if found && worker.abilities.prefix_pull && !worker.suspect {
                let held = request.cached_on(worker.slot);
                if held > self.holder.map_or(0, |(_, most)| most) && *worker.model == *request.model
                {
                    self.holder = Some((at, held));
                }
            }
            if !fits_now(worker, request) {
                continue;
            }
            let decodes = takes_over(worker, request);
            match worker.role {
                Role::Prefill => {
                    pure_prefill = true;
                    self.prefill.push(at);
                }
                Role::Decode => {
                    if decodes {
                        pure_decode = true;
                        self.decode.push(at);
                    }
                    self.whole.push(at);
                }
                Role::Both => {
                    if decodes {
                        self.decode.push(at);
                    }
                    self.both.push(at);
                }
            }
        }
        // A `both` worker computes prompts for others only where others exist.
        if pure_decode || local == LocalPrefill::ByCost {
            self.prefill.extend_from_slice(&self.both);
        }
        let decode_workers_compute = local == LocalPrefill::ByCost
            || self.prefill.is_empty() && !self.waits_for_prefill(cluster, request, pure_prefill);
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

    /// A prefill worker that is only full will have room again: wait for it.
    fn waits_for_prefill(
        &self,
        cluster: &Cluster<'_>,
        request: &RequestView<'_>,
        there: bool,
    ) -> bool {
        let roles = [Role::Prefill];
        !there
            && matches!(
                able(cluster, request, Duty::Prefill, &roles),
                Err(Miss::NoRoom)
            )
    }
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

/// Whether a request can be placed now, whatever the policy: what admission
/// asks.
///
/// # Errors
/// [`NoPlan`], as [`crate::Policy::choose`] would say.
pub fn placeable(cluster: &Cluster<'_>, request: &RequestView<'_>) -> Result<(), NoPlan> {
    Survey::default().look(cluster, request, LocalPrefill::default())
}
