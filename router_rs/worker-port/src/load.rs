//! The engine's state, as load reports tell it.

use std::time::{Duration, Instant};

use kvmesh_wire::v1::{ClassShare, KvRoom, Load, LoadShare, Role, WorkerPhase};

use crate::report::EngineLoad;

/// A step that takes so much longer than predicted may never end.
const SILENT_FACTOR: f64 = 4.0;
/// The least age of a step that counts as silence, ms.
const SILENT_MS: f64 = 1_000.0;

/// What the engine said last of itself.
#[derive(Debug, Default)]
pub(crate) struct EngineState {
    kv: KvRoom,
    shares: Vec<(String, LoadShare)>,
    /// Number of the running step, or of the last one.
    step: u64,
    /// When the running step began, and its predicted length in ms.
    running: Option<(Instant, f64)>,
}

impl EngineState {
    pub(crate) fn update(&mut self, load: EngineLoad, now: Instant) {
        self.kv = load.kv;
        self.shares = load.shares;
        self.step = load.step;
        let age = Duration::try_from_secs_f64(load.step_age_ms / 1_000.0).unwrap_or_default();
        self.running = (load.step_predicted_ms > 0.0 || load.step_age_ms > 0.0)
            .then(|| (now.checked_sub(age).unwrap_or(now), load.step_predicted_ms));
    }

    /// A step begins.
    pub(crate) fn begin_step(&mut self, predicted_ms: f64, now: Instant) {
        self.step += 1;
        self.running = Some((now, predicted_ms));
    }

    /// When the running step is expected to end, if it is still to come.
    pub(crate) fn step_ends(&self, now: Instant) -> Option<Instant> {
        let (since, predicted_ms) = self.running?;
        let length = Duration::try_from_secs_f64(predicted_ms / 1_000.0).ok()?;
        Some(since + length).filter(|ends| *ends > now)
    }

    /// Load as one session sees it; for `None` all work is `own`.
    pub(crate) fn load(&self, session: Option<&str>, now: Instant) -> Load {
        let (mut own, mut others) = (LoadShare::default(), LoadShare::default());
        for (key, share) in &self.shares {
            let mine = session.is_none_or(|session| session == key);
            add(if mine { &mut own } else { &mut others }, share);
        }
        let (age, predicted) = self.running.map_or((0.0, 0.0), |(since, predicted)| {
            let age = now.saturating_duration_since(since).as_secs_f64() * 1_000.0;
            (age, predicted)
        });
        Load {
            last_command: 0,
            role: Role::Unspecified.into(),
            phase: WorkerPhase::Serving.into(),
            draining: false,
            kv: Some(self.kv),
            own: Some(own),
            others: Some(others),
            step: self.step,
            step_age_ms: age,
            step_predicted_ms: predicted,
            engine_silent: age > SILENT_MS.max(SILENT_FACTOR * predicted),
        }
    }
}

fn add(total: &mut LoadShare, share: &LoadShare) {
    total.queued += share.queued;
    total.queued_prefill_tokens += share.queued_prefill_tokens;
    total.running_prefill_tokens += share.running_prefill_tokens;
    total.decoding += share.decoding;
    total.decode_context += share.decode_context;
    total.receiving += share.receiving;
    add_class(&mut total.interactive, share.interactive);
    add_class(&mut total.standard, share.standard);
    add_class(&mut total.batch, share.batch);
}

fn add_class(total: &mut Option<ClassShare>, share: Option<ClassShare>) {
    let Some(share) = share else { return };
    let total = total.get_or_insert_default();
    total.waiting += share.waiting;
    total.waiting_tokens += share.waiting_tokens;
    total.decoding += share.decoding;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_does_not_end_is_told_as_silence() {
        let (now, mut state) = (Instant::now(), EngineState::default());
        state.begin_step(10.0, now);
        let soon = state.load(None, now + Duration::from_millis(900));
        assert!(!soon.engine_silent && soon.step == 1 && soon.step_age_ms > 800.0);
        assert!(
            state
                .load(None, now + Duration::from_millis(1_100))
                .engine_silent
        );
        state.update(EngineLoad::default(), now);
        assert_eq!(state.load(None, now).step_age_ms, 0.0);
    }

    #[test]
    fn own_work_and_that_of_others_are_told_apart() {
        let share = |decoding| LoadShare {
            decoding,
            ..Default::default()
        };
        let mut state = EngineState::default();
        let shares = vec![("a".to_owned(), share(3)), ("b".to_owned(), share(4))];
        state.update(
            EngineLoad {
                shares,
                ..Default::default()
            },
            Instant::now(),
        );
        let decoding = |load: Load| {
            (
                load.own.unwrap_or_default().decoding,
                load.others.unwrap_or_default().decoding,
            )
        };
        assert_eq!(decoding(state.load(Some("a"), Instant::now())), (3, 4));
        assert_eq!(decoding(state.load(None, Instant::now())), (7, 0));
    }
}
