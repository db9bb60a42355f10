//! Arrivals brought at their times, whatever becomes of those before: an open
//! loop. Requests are judged by their targets.

use std::{cell::RefCell, net::SocketAddr, rc::Rc, time::Duration};

use bytes::Bytes;
use kvmesh_wire::v1::{
    GenerateRequest, Hints, RequestClass, Stopping, TokenIds, generate_request::Input,
};
use serde::Serialize;
use tokio::{
    task::{JoinSet, LocalSet},
    time::{Instant, sleep_until, timeout_at},
};

use super::{
    Arrival, Histogram, LoadError, Summary, Targets, Witness, connect, exchange, framed,
    reply::Reply,
};
use crate::process::Usage;

/// From having made everything ready to the first arrival.
const LEAD: Duration = Duration::from_millis(200);

/// What load to bring.
#[derive(Clone, Debug)]
pub struct ReplayConfig {
    /// An endpoint that serves `kvmesh.v1.Inference`.
    pub target: SocketAddr,
    /// Model to ask for. Empty: the only one.
    pub model: String,
    /// What comes, in the order of its times.
    pub arrivals: Vec<Arrival>,
    /// Tokens of a block of theirs.
    pub block_tokens: u32,
    /// Of their tokens: a replay with another one shares none.
    pub seed: u64,
    /// Connections that requests take in turn.
    pub connections: usize,
    /// What arrives before counts nowhere.
    pub warm_up: Duration,
    /// How long answers may take after the last arrival; later ones count as
    /// failed.
    pub grace: Duration,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct ReplayFigures {
    /// Requests that count, by class; only classes that came.
    pub classes: Vec<ClassFigures>,
    /// From the first counted arrival to the last, s.
    pub seconds: f64,
    /// How late requests were sent, ms: what the client itself adds.
    pub late_ms: Summary,
    /// CPU time of this client while arrivals came, share of one core.
    pub own_cpu: f64,
    /// Text of the first error.
    pub first_error: String,
}

/// What came of a class.
#[derive(Clone, Debug, Serialize)]
pub struct ClassFigures {
    /// Its name.
    pub class: &'static str,
    /// Requests that came.
    pub requests: u64,
    /// Kept their targets.
    pub good: u64,
    /// Got their first token too late.
    pub late_first_token: u64,
    /// Got their tokens too slowly.
    pub slow_tokens: u64,
    /// Ended otherwise than by `finished`, or not in time.
    pub failed: u64,
    /// From arrival to first token, ms, of those that got one.
    pub first_token_ms: Summary,
    /// Time between tokens, mean of each that ended, ms.
    pub itl_ms: Summary,
}

/// Replays arrivals from the calling thread; needs a current-thread runtime.
///
/// # Errors
/// Where a connection cannot be made at the start.
pub async fn replay(config: ReplayConfig) -> Result<ReplayFigures, LoadError> {
    LocalSet::new().run_until(bring(config)).await
}

async fn bring(config: ReplayConfig) -> Result<ReplayFigures, LoadError> {
    let mut connections = Vec::new();
    for _ in 0..config.connections.max(1) {
        connections.push(connect(config.target).await?);
    }
    // All are made before the first is sent: the client is not to be late by it.
    let bodies: Vec<Bytes> = config
        .arrivals
        .iter()
        .enumerate()
        .map(|(number, arrival)| body(&config, number, arrival))
        .collect();
    let all = All::new(RefCell::new(vec![Seen::default(); bodies.len()]));
    let mut running = JoinSet::new();
    let own = std::process::id();
    let began = Instant::now() + LEAD;
    let before = Usage::of(own).ok();
    for (number, body) in bodies.into_iter().enumerate() {
        let due = began + since_start(&config.arrivals[number]);
        sleep_until(due).await;
        let sender = connections[number % connections.len()].0.clone();
        let target = config.target;
        let mut witness = Noted {
            all: Rc::clone(&all),
            number,
        };
        witness.note(|seen| seen.due = Some(due));
        running.spawn_local(async move {
            let ended = exchange(sender, target, body, &mut witness).await;
            witness.note(|seen| seen.error = ended.err());
        });
        // What has ended is taken as it goes, so that it does not pile up.
        while running.try_join_next().is_some() {}
    }
    let busy = Instant::now().saturating_duration_since(began);
    let after = Usage::of(own).ok();
    let until = Instant::now() + config.grace;
    while let Ok(Some(_)) = timeout_at(until, running.join_next()).await {}
    running.shutdown().await;
    for (_, connection) in connections {
        connection.abort();
    }
    let own_cpu = before.zip(after).map_or(0.0, |(before, after)| {
        let used = after.cpu.saturating_sub(before.cpu);
        used.as_secs_f64() / busy.as_secs_f64().max(1e-9)
    });
    Ok(figures(&config, &all.borrow(), own_cpu))
}

fn since_start(arrival: &Arrival) -> Duration {
    Duration::from_secs_f64(arrival.at_ms / 1e3)
}

fn body(config: &ReplayConfig, number: usize, arrival: &Arrival) -> Bytes {
    let own = |ms: f64| {
        if arrival.own_targets && ms.is_finite() {
            ms as u32
        } else {
            0
        }
    };
    framed(&GenerateRequest {
        model: config.model.clone(),
        input: Some(Input::TokenIds(TokenIds {
            ids: arrival.ids(number as u64, config.block_tokens, config.seed),
        })),
        stopping: Some(Stopping {
            max_tokens: arrival.output_tokens,
            ignore_end_of_text: true,
            ..Default::default()
        }),
        hints: Some(Hints {
            request_class: arrival.class.into(),
            ttft_target_ms: own(arrival.targets.ttft_ms),
            itl_target_ms: own(arrival.targets.itl_ms),
            ..Default::default()
        }),
        ..Default::default()
    })
}

/// What a request saw.
#[derive(Clone, Debug, Default)]
struct Seen {
    due: Option<Instant>,
    sent: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
    tokens: u64,
    finished: bool,
    error: Option<String>,
}

/// What all requests saw, by number: also what one saw that was given up.
type All = Rc<RefCell<Vec<Seen>>>;

/// Writes down what one request sees.
struct Noted {
    all: All,
    number: usize,
}

impl Noted {
    fn note(&self, what: impl FnOnce(&mut Seen)) {
        what(&mut self.all.borrow_mut()[self.number]);
    }
}

impl Witness for Noted {
    fn sent(&mut self, now: std::time::Instant) {
        self.note(|seen| seen.sent = Some(now.into()));
    }

    fn came(&mut self, reply: Reply, now: std::time::Instant) {
        self.note(|seen| match reply {
            Reply::Tokens(count) => {
                seen.first = seen.first.or(Some(now.into()));
                seen.last = Some(now.into());
                seen.tokens += count;
            }
            Reply::Finished => seen.finished = true,
            Reply::Other => {}
        });
    }
}

impl Seen {
    /// From its arrival to its first token.
    fn first_token(&self) -> Option<Duration> {
        Some(self.first?.saturating_duration_since(self.due?))
    }

    /// Mean time between its tokens; zero of one token.
    fn between(&self) -> Option<Duration> {
        let took = self.last?.saturating_duration_since(self.first?);
        let gaps = u32::try_from(self.tokens.saturating_sub(1)).unwrap_or(u32::MAX);
        Some(took / gaps.max(1))
    }

    fn outcome(&self, targets: Targets) -> Outcome {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        match (self.first_token(), self.between()) {
            (Some(first), Some(between)) if self.finished && self.error.is_none() => {
                if ms(first) > targets.ttft_ms {
                    Outcome::LateFirstToken
                } else if ms(between) > targets.itl_ms {
                    Outcome::SlowTokens
                } else {
                    Outcome::Good
                }
            }
            _ => Outcome::Failed,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Good,
    LateFirstToken,
    SlowTokens,
    Failed,
}

fn figures(config: &ReplayConfig, seen: &[Seen], own_cpu: f64) -> ReplayFigures {
    let warm_up = config.warm_up;
    let counted = || {
        let pairs = config.arrivals.iter().zip(seen);
        pairs.filter(move |(arrival, _)| since_start(arrival) >= warm_up)
    };
    let mut late = Histogram::default();
    for (_, seen) in counted() {
        if let (Some(due), Some(sent)) = (seen.due, seen.sent) {
            late.add(sent.saturating_duration_since(due));
        }
    }
    let at = |arrival: &Arrival| arrival.at_ms / 1e3;
    let first = counted().next().map_or(0.0, |(arrival, _)| at(arrival));
    let last = counted()
        .next_back()
        .map_or(0.0, |(arrival, _)| at(arrival));
    let classes = [
        (RequestClass::Interactive, "interactive"),
        (RequestClass::Standard, "standard"),
        (RequestClass::Batch, "batch"),
    ];
    let of_class = |(class, name): (RequestClass, &'static str)| {
        let of = counted().filter(move |(arrival, _)| arrival.class == class);
        class_figures(name, of)
    };
    ReplayFigures {
        classes: classes
            .into_iter()
            .map(of_class)
            .filter(|class| class.requests > 0)
            .collect(),
        seconds: last - first,
        late_ms: late.summary(),
        own_cpu,
        first_error: seen
            .iter()
            .find_map(|seen| seen.error.clone())
            .unwrap_or_default(),
    }
}

fn class_figures<'a>(
    class: &'static str,
    of: impl Iterator<Item = (&'a Arrival, &'a Seen)>,
) -> ClassFigures {
    let (mut first_token, mut between) = (Histogram::default(), Histogram::default());
    let mut counts = [0u64; 4];
    for (arrival, seen) in of {
        if let Some(time) = seen.first_token() {
            first_token.add(time);
        }
        if let (true, Some(time)) = (seen.finished && seen.tokens > 1, seen.between()) {
            between.add(time);
        }
        counts[seen.outcome(arrival.targets) as usize] += 1;
    }
    let [good, late_first_token, slow_tokens, failed] = counts;
    ClassFigures {
        class,
        requests: counts.iter().sum(),
        good,
        late_first_token,
        slow_tokens,
        failed,
        first_token_ms: first_token.summary(),
        itl_ms: between.summary(),
    }
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
