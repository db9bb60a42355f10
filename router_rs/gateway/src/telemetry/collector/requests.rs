//! Series of requests: what is open now, what was counted, how long it took.

use std::{fmt, sync::atomic::Ordering};

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter},
};

use super::{
    super::encode::{Labels, by_state, counter, gauge, gauges, histogram, ratios, seconds},
    Figures,
};

impl Figures {
    pub(super) fn requests(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counts = self.mesh.counters();
        let figures = &self.telemetry;
        let connections = figures.connections.load(Ordering::Relaxed).unsigned_abs();
        gauge(
            encoder,
            "connections",
            "Open client connections",
            connections,
        )?;
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let tasks = runtime.metrics().num_alive_tasks() as u64;
            gauge(encoder, "tasks", "Tasks that have not ended", tasks)?;
        }
        gauge(
            encoder,
            "open_streams",
            "Generations that have not ended",
            counts.open_streams.get(),
        )?;
        gauge(
            encoder,
            "queued_requests",
            "Requests that wait for room",
            self.mesh.queued() as u64,
        )?;
        gauge(
            encoder,
            "bookings",
            "Bookings of work on workers",
            self.mesh.booked() as u64,
        )?;
        gauge(
            encoder,
            "request_bytes_held",
            "Bytes of requests between length prefix and admission",
            figures.held_bytes(),
        )?;
        gauge(
            encoder,
            "undelivered_ids",
            "Token ids kept for clients that have not taken them",
            counts.undelivered_ids.get(),
        )?;
        let mut migrations = encoder.encode_descriptor(
            "migrations",
            "New attempts of streams by cause",
            None,
            MetricType::Counter,
        )?;
        for (cause, value) in counts.migrations.by_cause() {
            let labels = [("cause", cause)];
            ConstCounter::new(value).encode(migrations.encode_family(&Labels(&labels))?)?;
        }
        let mut hand_overs = encoder.encode_descriptor(
            "hand_overs",
            "Running streams handed over with their KV by workers that are left: begun, done, \
             and failed, where the stream went on at its worker",
            None,
            MetricType::Counter,
        )?;
        let of = &counts.hand_overs;
        for (outcome, count) in [
            ("begun", &of.begun),
            ("done", &of.done),
            ("failed", &of.failed),
        ] {
            let labels = [("outcome", outcome)];
            ConstCounter::new(count.get()).encode(hand_overs.encode_family(&Labels(&labels))?)?;
        }
        let mut resumed = encoder.encode_descriptor(
            "resumed",
            "Calls of Resume: answered here, from another router with or without the attempt \
             that runs, unknown",
            None,
            MetricType::Counter,
        )?;
        for (outcome, value) in counts.resumed.by_outcome() {
            let labels = [("outcome", outcome)];
            ConstCounter::new(value).encode(resumed.encode_family(&Labels(&labels))?)?;
        }
        seconds(encoder, counts)?;
        let attempts = self.mesh.attempts();
        gauge(encoder, "open_attempts", "Attempts that run", attempts.open)?;
        let transfers = [
            ("placed", attempts.placed),
            ("reserved", attempts.reserved),
            ("flowing", attempts.flowing),
            ("committed", attempts.committed),
        ];
        gauges(
            encoder,
            "transfers",
            "Mesh hand-offs under way by state",
            &by_state(&transfers),
        )?;
        self.counts(encoder)?;
        self.times(encoder)
    }

    fn counts(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counts = self.mesh.counters();
        for (name, help, from) in [
            ("attempts", "Attempts made", &counts.attempts),
            (
                "plans_whole",
                "Plans with prompt and output on one worker",
                &counts.plans_whole,
            ),
            (
                "plans_split",
                "Plans with prompt and output on two workers",
                &counts.plans_split,
            ),
            (
                "placements",
                "Placements sent to workers",
                &counts.placements,
            ),
            (
                "refusals",
                "Placements refused by workers",
                &counts.refusals,
            ),
            (
                "stale_frames",
                "Rows of attempts that were over",
                &counts.stale_frames,
            ),
            (
                "transfers_started",
                "Mesh hand-offs begun",
                &counts.transfers_started,
            ),
            (
                "transfers_failed",
                "Hand-offs that failed",
                &counts.transfers_failed,
            ),
            (
                "hand_offs_dropped",
                "Engines' hand-offs that crossed a cancel and were dropped by decode",
                &counts.hand_offs_dropped,
            ),
            (
                "transferred_bytes",
                "Bytes of KV that workers received",
                &counts.transferred_bytes,
            ),
            ("tokens", "Tokens taken from workers", &counts.tokens),
            (
                "token_messages",
                "Messages with tokens to clients",
                &counts.token_messages,
            ),
            ("finished", "Generations that ended well", &counts.finished),
            (
                "cancelled",
                "Generations that their client left",
                &counts.cancelled,
            ),
            (
                "failed",
                "Generations that ended with an error",
                &counts.failed,
            ),
            (
                "recomputed_tokens",
                "Tokens that later attempts computed",
                &counts.recomputed_tokens,
            ),
            (
                "reattached",
                "Attempts that went on after a broken session",
                &counts.reattached,
            ),
            (
                "moved_gaps",
                "Streams that went on after a failure",
                &counts.moved_gaps,
            ),
            (
                "ejections",
                "Workers left out for a while since their answers failed",
                &counts.ejections,
            ),
            (
                "quarantined",
                "Requests of which workers died",
                &counts.quarantined,
            ),
            (
                "slow_clients",
                "Streams ended since their client read nothing",
                &counts.slow_clients,
            ),
            (
                "violations",
                "Sessions closed for a broken protocol",
                &counts.violations,
            ),
            (
                "session_panics",
                "Sessions that ended in a panic of this router",
                &counts.session_panics,
            ),
            (
                "task_panics",
                "Panics of this router's other tasks, which were started again",
                &counts.task_panics,
            ),
            (
                "cache_events_dropped",
                "Cache events of a kind that this version does not know",
                &counts.cache_events_dropped,
            ),
            (
                "tokenizer_fetches",
                "Tokeniser downloads begun",
                &counts.tokenizer_fetches,
            ),
            (
                "tokenizer_failures",
                "Tokeniser downloads that failed",
                &counts.tokenizer_failures,
            ),
        ] {
            counter(encoder, name, help, from)?;
        }
        Ok(())
    }

    fn times(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counts = self.mesh.counters();
        let figures = &self.telemetry;
        for (name, help, from) in [
            (
                "first_token_seconds",
                "Arrival to first token (TTFT)",
                &figures.first_token,
            ),
            (
                "between_tokens_seconds",
                "Between two messages with tokens (ITL)",
                &figures.between_tokens,
            ),
            (
                "tokenize_seconds",
                "Template and tokeniser",
                &figures.tokenize,
            ),
            ("prefill_seconds", "Computing the prompt", &figures.prefill),
            ("queue_seconds", "Arrival to dispatch", &figures.queue),
            (
                "urgent_start_seconds",
                "From a prompt that is more urgent than all others of a worker to its first layer",
                self.mesh.urgent_start(),
            ),
        ] {
            histogram(encoder, name, help, from)?;
        }
        for (name, help, from) in [
            (
                "ttft_prediction_error_ratio",
                "First token as predicted at placement: |predicted / measured - 1|",
                &counts.ttft_errors,
            ),
            (
                "prefill_prediction_error_ratio",
                "Computing of the prompt: |predicted / measured - 1|",
                &counts.prefill_errors,
            ),
        ] {
            ratios(encoder, name, help, from)?;
        }
        Ok(())
    }
}
