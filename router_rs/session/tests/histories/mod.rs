//! Histories: what a worker saw, and what the reference worker made of it. Walks through a
//! model make them; the Python worker is held to them (`tests/worker/test_histories.py`).
//!
//! A history is of one worker. What it sees are commands of routers, their sessions that open
//! and break, and what its engine says: a model decides all of that. What it is held to is what
//! it says to each router and what it asks of its engine, step by step.
#![allow(dead_code, reason = "each of the models uses its part")]

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write as _,
    hash::Hash,
    path::PathBuf,
};

use kvmesh_session::{
    Fence, Stage,
    parse::{Answer, End, Found, Holds, Refusal},
};
use serde::Serialize;

/// Set to write the files anew.
const WRITE: &str = "TEST_WRITE_HISTORIES";
/// Walks that are tried. Of those only the ones are kept that show something new.
const WALKS: u64 = 1_000;
const LONGEST_WALK: usize = 160;

/// An attempt as "owner.attempt".
pub(crate) type Name = String;

/// What comes to a worker.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Seen {
    /// A router opens its session; with what it wants to go on with, and its next index.
    Attach {
        router: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        wants: Option<(Name, u32)>,
    },
    /// Its stream is gone.
    Leave {
        router: String,
    },
    Place {
        router: String,
        of: Name,
        stage: &'static str,
        output: Vec<u32>,
        /// The engine has room, if it is asked.
        room: bool,
    },
    Cancel {
        router: String,
        of: Name,
    },
    HandOver {
        router: String,
        of: Name,
        next_attempt: u32,
    },
    Find {
        router: String,
        had: u32,
    },
    Claim {
        router: String,
        owner: u32,
    },
    /// The engine says something of an attempt, by the name under which it was placed.
    Engine {
        of: Name,
        first: u32,
        ids: Vec<u32>,
        #[serde(skip_serializing_if = "Option::is_none")]
        end: Option<String>,
    },
    /// Nobody came for what its router left, for as long as that is kept.
    Expire {},
}

/// One thing that comes to a worker, and what comes of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Step {
    #[serde(flatten)]
    pub(crate) seen: Seen,
    /// What the engine is asked to do.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) asked: Vec<String>,
    /// What each router is told, in order.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) said: BTreeMap<String, Vec<String>>,
}

/// A model whose workers are watched.
pub(crate) trait Watched: Clone {
    type Move: Copy;

    /// What may happen, in two lists: what usually does, and what seldom does.
    fn usual_and_rare(&self) -> [Vec<Self::Move>; 2];
    fn makes(&mut self, made: Self::Move);
    /// What the workers see of a move that led to `after`.
    fn watched(&self, made: Self::Move, after: &Self) -> Vec<(usize, Step)>;
}

/// The same numbers for ever: those of libraries may change with their versions, and the
/// histories with them (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize % end
    }
}

/// What each of two workers sees where moves come one after the other.
fn follow<Sim: Watched>(
    mut sim: Sim,
    mut next: impl FnMut(&Sim) -> Option<Sim::Move>,
) -> [Vec<Step>; 2] {
    let mut histories = [Vec::new(), Vec::new()];
    while let Some(made) = next(&sim) {
        let before = sim.clone();
        sim.makes(made);
        for (worker, step) in before.watched(made, &sim) {
            histories[worker].push(step);
        }
    }
    histories
}

fn walk<Sim: Watched>(seed: u64, sim: Sim) -> [Vec<Step>; 2] {
    let (mut numbers, mut left) = (Numbers(seed), LONGEST_WALK);
    follow(sim, |sim| {
        left = left.checked_sub(1)?;
        let [usual, rare] = sim.usual_and_rare();
        let seldom = numbers.below(16) == 0 || usual.is_empty();
        let of = if seldom && !rare.is_empty() {
            rare
        } else {
            usual
        };
        (!of.is_empty()).then(|| of[numbers.below(of.len())])
    })
}

/// Histories that are kept.
pub(crate) struct Histories {
    /// Who is attached as each of them begins.
    routers: &'static [&'static str],
    kept: Vec<(String, Vec<Step>)>,
    /// Steps in a row that some history shows, but for numbers.
    shown: HashSet<String>,
}

impl Histories {
    pub(crate) fn of(routers: &'static [&'static str]) -> Self {
        Self {
            routers,
            kept: Vec::new(),
            shown: HashSet::new(),
        }
    }

    /// What chosen moves lead to, and what goes on from there without trouble.
    pub(crate) fn choose<Sim: Watched>(&mut self, name: &str, sim: Sim, moves: &[Sim::Move]) {
        let (mut moves, mut left) = (moves.iter().copied(), LONGEST_WALK);
        let next = |sim: &Sim| {
            left = left.checked_sub(1)?;
            let [usual, _] = sim.usual_and_rare();
            moves.next().or_else(|| usual.first().copied())
        };
        for (worker, steps) in (0..).zip(follow(sim, next)) {
            if !steps.is_empty() {
                self.shows_more(&steps);
                self.kept.push((format!("{name}, worker {worker}"), steps));
            }
        }
    }

    /// All that a worker can see first, up to so many steps.
    pub(crate) fn every<Sim: Watched + Hash + Eq>(&mut self, world: &str, sim: &Sim, most: usize) {
        let mut all = BTreeMap::new();
        for worker in 0..2 {
            let (mut known, mut open) = (HashSet::new(), vec![(sim.clone(), Vec::new())]);
            while let Some((before, steps)) = open.pop() {
                for made in before.usual_and_rare().concat() {
                    let (mut after, mut steps) = (before.clone(), steps.clone());
                    after.makes(made);
                    let seen = before.watched(made, &after).into_iter();
                    steps.extend(seen.filter(|(of, _)| *of == worker).map(|(_, step)| step));
                    let lines: Vec<String> = steps.iter().map(line).collect();
                    if steps.len() < most && known.insert((after.clone(), lines.clone())) {
                        open.push((after, steps.clone()));
                    }
                    all.insert(lines, steps);
                }
            }
        }
        // One that is the begin of the one after it shows nothing that this does not.
        let mut after: Vec<String> = Vec::new();
        for (n, (lines, steps)) in all.into_iter().rev().enumerate() {
            if !after.starts_with(&lines) {
                self.shows_more(&steps);
                self.kept.push((format!("{world}, begin {n}"), steps));
            }
            after = lines;
        }
    }

    /// Seeded walks, as many as show two steps in a row that none before did.
    pub(crate) fn walk<Sim: Watched>(&mut self, world: &str, start: impl Fn() -> Sim) {
        for seed in 0..WALKS {
            for (worker, steps) in (0..).zip(walk(seed, start())) {
                if self.shows_more(&steps) {
                    let name = format!("{world}, walk {seed}, worker {worker}");
                    self.kept.push((name, steps));
                }
            }
        }
    }

    fn shows_more(&mut self, steps: &[Step]) -> bool {
        let number = |c: char| c.is_ascii_digit() || matches!(c, ',' | '.' | ' ');
        let kind = |step: &Step| line(step).replace(number, "");
        let kinds: Vec<String> = steps.iter().map(kind).collect();
        let before = self.shown.len();
        self.shown
            .extend(kinds.windows(2).map(|pair| pair.concat()));
        self.shown.len() > before
    }

    /// The file holds these, or is written anew.
    pub(crate) fn are_those_of(&self, file: &str) {
        let text = self.text();
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/data")
            .join(file);
        if std::env::var_os(WRITE).is_some() {
            return std::fs::write(path, text).unwrap();
        }
        // Not assert_eq: that would print both.
        let same = std::fs::read_to_string(&path).unwrap() == text;
        let path = path.display();
        assert!(
            same,
            "{path} has other histories than the model: write it anew with {WRITE}=1"
        );
    }

    /// One step a line, so that a change of the model is read as a diff.
    fn text(&self) -> String {
        let mut text = format!("{{\"routers\": {:?}, \"histories\": [", self.routers);
        for (n, (name, steps)) in self.kept.iter().enumerate() {
            let steps: Vec<String> = steps.iter().map(line).collect();
            let comma = if n > 0 { "," } else { "" };
            write!(
                text,
                "{comma}\n{{\"name\": \"{name}\", \"steps\": [\n{}\n]}}",
                steps.join(",\n")
            )
            .unwrap();
        }
        text + "\n]}\n"
    }
}

fn line(step: &Step) -> String {
    serde_json::to_string(step).unwrap()
}

// -- frames in words, as `tests/worker/test_histories.py` has them -------------

pub(crate) fn name(fence: Fence) -> Name {
    format!("{}.{}", fence.owner, fence.attempt)
}

pub(crate) fn stage(stage: Stage) -> &'static str {
    match stage {
        Stage::Whole => "whole",
        Stage::Prefill => "prefill",
        Stage::Decode => "decode",
    }
}

fn refusal(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::NoRoom => "no_room",
        Refusal::TakenOver => "taken_over",
        other => panic!("no reference worker says {other:?}"),
    }
}

pub(crate) fn opening(fence: Fence, of: Stage, answer: &Answer) -> String {
    let (name, stage) = (name(fence), stage(of));
    match answer {
        Answer::Reserved { .. } => format!("{name} {stage} reserved"),
        Answer::Refused(why) => format!("{name} {stage} refused {}", refusal(*why)),
    }
}

pub(crate) fn tokens(fence: Fence, first: u32, ids: &[u32]) -> String {
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    format!("{} tokens from {first}: {}", name(fence), ids.join(" "))
}

pub(crate) fn end_alone(end: &End) -> String {
    match end {
        End::Finished { .. } => "finished".to_owned(),
        End::HandedOff { engine: None } => "handed_off".to_owned(),
        End::HandedOff { engine: Some(_) } => "handed_off engine".to_owned(),
        End::Returned(why) => format!("returned {}", refusal(*why)),
        End::TransferFailed => "transfer_failed".to_owned(),
        End::Cancelled => "cancelled".to_owned(),
        other => panic!("no reference worker says {other:?}"),
    }
}

pub(crate) fn end(fence: Fence, of: Stage, end: &End) -> String {
    format!("{} {} {}", name(fence), stage(of), end_alone(end))
}

pub(crate) fn found(found: &Found) -> String {
    match &found.what {
        Holds::Nothing => "found nothing".to_owned(),
        Holds::This(held, told) => format!(
            "found {} {} next {} digest {:016x}",
            name(held.fence),
            stage(held.stage),
            held.next_index,
            told.output_digest
        ),
        Holds::Claimed(held, left) => {
            let output = tokens(held.fence, 0, &left.output_ids);
            format!(
                "gives {} next {}, {output}",
                stage(held.stage),
                held.next_index
            )
        }
        Holds::Refused { owner } => format!("claim refused, owner {owner}"),
    }
}
