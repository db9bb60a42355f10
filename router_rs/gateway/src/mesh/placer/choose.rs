//! The choice among workers, in terms of the mesh: who runs a request, what is
//! booked, and why nobody is there.

use kvmesh_kv_index::{Matches, WorkerSlot};
use kvmesh_scheduler::{
    Admitted, Booking, Class, Cluster, Considered, Decision, DispatchSettings, Feature, Hold,
    Needs, NoPlan, Plan, Rejected, RequestView, Turn, Verdict, may_run, placeable,
};
use kvmesh_session::WorkerIndex;

use super::Placer;

/// A plan with its bookings.
pub(in crate::mesh) struct Placed {
    pub(in crate::mesh) plan: Plan,
    pub(in crate::mesh) prefill: WorkerIndex,
    pub(in crate::mesh) decode: WorkerIndex,
    pub(in crate::mesh) source: Option<WorkerIndex>,
    /// For two workers: the connector's hand-off, and whether prefill's tokens
    /// count; else a mesh transfer.
    pub(in crate::mesh) engine: Option<bool>,
    /// What is booked. Empty where it waits.
    pub(in crate::mesh) bookings: Vec<(WorkerIndex, Booking)>,
    /// It waits, listed where it would go.
    pub(in crate::mesh) hold: Option<Hold>,
    /// Its virtual deadline, as which it goes.
    pub(in crate::mesh) key_ms: f64,
    pub(in crate::mesh) chosen: Considered,
    /// The best plans, each with its workers: prefill, decode, prefix.
    pub(in crate::mesh) considered: Vec<(Considered, [Option<WorkerIndex>; 3])>,
    pub(in crate::mesh) weighed: u32,
    pub(in crate::mesh) tied: u32,
    /// What a streamed hand-off leaves to move when prefill ends.
    pub(in crate::mesh) tail: Option<Tail>,
    pub(in crate::mesh) start_ms: f64,
}

/// Why a request has no plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::mesh) enum Lacks {
    /// It waits for room.
    Room,
    /// It waits for somebody to be ready.
    Ready,
    /// Nobody will ever run it.
    Worker(NoPlan),
    /// The same, since no engine can: neither one that is here, nor one of a worker that
    /// was lost and may come back.
    Engine(Feature),
}

/// The end of a streamed hand-off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::mesh) struct Tail {
    /// Bytes of KV.
    pub(in crate::mesh) bytes: u64,
    /// The decode step that comes before its tokens are seen, ms.
    pub(in crate::mesh) step_ms: f64,
}

/// Why a request is turned away.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::mesh) enum Turned {
    /// Nobody will ever run it.
    Never(NoPlan),
    /// It would wait for too long.
    Waits(Rejected),
}

impl Placer {
    /// Whether somebody may run a request, once there is room: anybody but the
    /// workers in `lasting`.
    pub(in crate::mesh) fn may_run(
        &mut self,
        request: &RequestView<'_>,
        lasting: &[WorkerSlot],
        now_ms: f64,
    ) -> bool {
        self.roster.refresh(&self.bookings);
        may_run(&self.cluster(now_ms), request, lasting).is_ok()
    }

    /// Whether a request may wait to be placed, as `decide` says of the
    /// cluster.
    ///
    /// # Errors
    /// Why it may not.
    pub(in crate::mesh) fn admit(
        &mut self,
        request: &RequestView<'_>,
        now_ms: f64,
        decide: impl FnOnce(&Cluster<'_>) -> Result<Admitted, Rejected>,
    ) -> Result<Admitted, Turned> {
        self.roster.refresh(&self.bookings);
        let cluster = self.cluster(now_ms);
        may_run(&cluster, request, &[]).map_err(Turned::Never)?;
        decide(&cluster).map_err(Turned::Waits)
    }

    /// Chooses and books by the rules of dispatch, as one whose turn it is. `lasting` are those of the
    /// excluded workers that will never run it.
    ///
    /// # Errors
    /// Why there is no plan now.
    pub(in crate::mesh) fn choose(
        &mut self,
        request: &RequestView<'_>,
        turn: Turn,
        lasting: &[WorkerSlot],
        (now_ms, rules): (f64, &DispatchSettings),
    ) -> Result<Placed, Lacks> {
        self.roster.refresh(&self.bookings);
        let cluster = self
            .roster
            .cluster(self.router)
            .at(now_ms)
            .with_transfers(&self.transfers);
        let decision = match self.policy.choose(&cluster, request) {
            Ok(decision) => decision,
            Err(NoPlan::Unsupported(feature)) if !self.may_come_back(request) => {
                return Err(Lacks::Engine(feature));
            }
            Err(why) if !why.waits(&cluster, request, lasting) => return Err(Lacks::Worker(why)),
            Err(NoPlan::NoRoom { .. }) => return Err(Lacks::Room),
            Err(_) => return Err(Lacks::Ready),
        };
        let tail = self.tail(&decision.plan(), request);
        let placed = self.place(decision, turn, rules);
        let placed = placed.map_err(Lacks::Worker)?;
        if placed.hold.is_none() {
            for worker in [placed.prefill, placed.decode] {
                self.probes(worker);
            }
        }
        Ok(Placed { tail, ..placed })
    }

    /// Whether a worker that is not there now could run a request.
    fn may_come_back(&self, request: &RequestView<'_>) -> bool {
        let mut known = self.workers.values().filter(|known| known.fits);
        known.any(|known| known.aside.as_ref().is_some_and(|view| view.suits(request)))
    }

    fn tail(&self, plan: &Plan, request: &RequestView<'_>) -> Option<Tail> {
        let Plan::Split {
            prefill, decode, ..
        } = plan
        else {
            return None;
        };
        let (p, d) = (self.roster.get(*prefill)?, self.roster.get(*decode)?);
        let streamed = p.abilities.streamed_hand_off && d.abilities.streamed_hand_off;
        let missing = request.sequence() - request.cached_on(*decode);
        let late = missing.min(u64::from(p.step.saturating_chunk));
        streamed.then(|| Tail {
            bytes: d.blocks(late) * d.abilities.block_bytes,
            step_ms: d.step.decode_ms(d.decode_batch() + 1, d.decode_context()),
        })
    }

    fn place(
        &self,
        decision: Decision,
        turn: Turn,
        rules: &DispatchSettings,
    ) -> Result<Placed, NoPlan> {
        let plan = decision.plan();
        let at = |slot| self.worker_at(slot).ok_or(NoPlan::NoPair);
        let (prefill, decode) = (at(plan.prefill())?, at(plan.decode())?);
        let known = self.workers.get(&prefill);
        let step_ms = known.map_or(0.0, |known| known.step_ms);
        let (booked, hold) = match rules.judge(&decision, turn, step_ms, &self.bookings) {
            Verdict::Goes(booked) => (booked, None),
            Verdict::Waits(hold) => (Vec::new(), Some(hold)),
        };
        let on = |(slot, booking)| Ok((at(slot)?, booking));
        let bookings = booked.into_iter().map(on).collect::<Result<_, NoPlan>>()?;
        let workers = |plan: &Plan| {
            let prefill = match plan {
                Plan::Whole { .. } => None,
                Plan::Split { prefill, .. } => self.worker_at(*prefill),
            };
            let source = plan.source().and_then(|slot| self.worker_at(slot));
            [prefill, self.worker_at(plan.decode()), source]
        };
        let considered = decision.considered.into_iter();
        Ok(Placed {
            plan,
            prefill,
            decode,
            source: plan.source().and_then(|slot| self.worker_at(slot)),
            engine: self.engine(prefill, decode),
            bookings,
            hold,
            key_ms: turn.key_ms,
            chosen: decision.chosen,
            considered: considered.map(|one| (one, workers(&one.plan))).collect(),
            tail: None,
            weighed: decision.weighed,
            tied: decision.tied,
            start_ms: decision.start_ms,
        })
    }

    /// Whether two workers hand over by their engine's connector, and then
    /// whether prefill's tokens count. Mesh goes first where both have it.
    fn engine(&self, prefill: WorkerIndex, decode: WorkerIndex) -> Option<bool> {
        let sender = &self.workers.get(&prefill)?.capabilities;
        let receiver = &self.workers.get(&decode)?.capabilities;
        let mesh = sender.streamed_hand_off && receiver.streamed_hand_off;
        (!mesh).then_some(sender.prefill_emits_first_token)
    }

    /// Whether a model's roles are all served now.
    pub(in crate::mesh) fn ready(&mut self, model: &str) -> bool {
        let found = Matches::default();
        let request = RequestView {
            id: 0,
            model,
            digest: "",
            adapter: "",
            prompt_tokens: 1,
            output_tokens: 0,
            max_tokens: 2,
            expected_output: 2,
            class: Class::Standard,
            itl_target_ms: None,
            virtual_deadline_ms: f64::INFINITY,
            affinity: 0,
            needs: Needs::default(),
            cached: &found,
            excluded: &[],
        };
        self.roster.refresh(&self.bookings);
        let answer = placeable(&self.cluster(0.0), &request);
        matches!(answer, Ok(()) | Err(NoPlan::NoRoom { .. }))
    }
}
