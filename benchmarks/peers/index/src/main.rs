//! `peer-index EVENTS QUERIES WORKERS ROUNDS`: both indexes on one workload, in
//! turn; a line of JSON a block. `benchmarks/kv_index.py` runs it.

mod sides;
mod workload;

use serde_json::json;
use sides::{Dynamo, Ours, Side};
use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;
use workload::{Event, Query};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, events, queries, workers, rounds] = arguments.as_slice() else {
        return Err("usage: peer-index EVENTS QUERIES WORKERS ROUNDS".into());
    };
    let events = workload::events(Path::new(events))?;
    let queries = workload::queries(Path::new(queries))?;
    let workers = workers.parse()?;
    for round in 0..rounds.parse::<usize>()? {
        if round % 2 == 0 {
            block::<Ours>("ours", round, workers, &events, &queries);
            block::<Dynamo>("dynamo", round, workers, &events, &queries);
        } else {
            block::<Dynamo>("dynamo", round, workers, &events, &queries);
            block::<Ours>("ours", round, workers, &events, &queries);
        }
    }
    Ok(())
}

fn block<S: Side>(name: &str, round: usize, workers: u64, events: &[Event], queries: &[Query]) {
    let blocks: usize = events.iter().map(|event| event.chain.len()).sum();
    let before = resident_bytes();
    let ready: Vec<S::Event> = (0..).zip(events).map(|(id, event)| S::event(event, id)).collect();
    let index = S::new(workers);
    let begin = Instant::now();
    for event in ready {
        index.apply(event);
    }
    index.settle();
    let apply = blocks as f64 / begin.elapsed().as_secs_f64();
    let mut row = json!({
        "side": name, "round": round, "apply_blocks_per_s": apply,
        "resident_bytes": resident_bytes().saturating_sub(before),
    });
    let mut depths: Vec<usize> = queries.iter().map(|query| query.hit).collect();
    depths.sort_unstable();
    depths.dedup();
    for depth in depths {
        let some: Vec<&Query> = queries.iter().filter(|query| query.hit == depth).collect();
        let (p50, p99) = lookups(&index, &some);
        row[format!("lookup_{depth}_p50_us")] = json!(p50);
        row[format!("lookup_{depth}_p99_us")] = json!(p99);
    }
    drop(index);
    // One that grows: half of the events are there, the others come meanwhile.
    let (index, half) = (S::new(workers), events.len() / 2);
    let ready = |from: usize, to: usize| -> Vec<S::Event> {
        (from as u64..).zip(&events[from..to]).map(|(id, event)| S::event(event, id)).collect()
    };
    for event in ready(0, half) {
        index.apply(event);
    }
    index.settle();
    for threads in [1, 2] {
        let from = half + (threads - 1) * (half / 2);
        let to = from + half / 2;
        let blocks = events[from..to].iter().map(|event| event.chain.len()).sum();
        let (lookups, applied) =
            beside_writes(&index, threads, ready(from, to), blocks, queries);
        row[format!("lookups_per_s_{threads}_beside_events")] = json!(lookups);
        row[format!("blocks_per_s_beside_{threads}_readers")] = json!(applied);
    }
    println!("{row}");
}

/// Microseconds a look-up, p50 and p99; each query once to check its answer,
/// then all of them three times.
fn lookups<S: Side>(index: &S, queries: &[&Query]) -> (f64, f64) {
    let ready: Vec<S::Query> =
        queries.iter().map(|query| S::query(&query.chain, &query.local)).collect();
    let mut found = S::Found::default();
    for (query, ready) in queries.iter().zip(&ready) {
        index.lookup(ready, &mut found);
        let (holders, longest) = S::summary(&found);
        assert_eq!(longest as usize, query.hit);
        assert_eq!(holders > 0, query.hit > 0);
    }
    let mut times = Vec::new();
    for _ in 0..3 {
        for query in &ready {
            let begin = Instant::now();
            index.lookup(black_box(query), &mut found);
            times.push(begin.elapsed().as_nanos());
        }
    }
    times.sort_unstable();
    let at = |share: f64| times[(times.len() as f64 * share) as usize] as f64 / 1e3;
    (at(0.5), at(0.99))
}

/// Look-ups a second by so many threads while this one applies events, and the
/// blocks a second that it applies meanwhile.
fn beside_writes<S: Side>(
    index: &S,
    threads: usize,
    events: Vec<S::Event>,
    blocks: usize,
    queries: &[Query],
) -> (f64, f64) {
    let prompts: Vec<S::Query> =
        queries.iter().map(|query| S::query(&query.chain, &query.local)).collect();
    let (stop, total) = (AtomicBool::new(false), AtomicU64::new(0));
    let seconds = std::thread::scope(|scope| {
        for thread in 0..threads {
            let (prompts, stop, total) = (&prompts, &stop, &total);
            scope.spawn(move || {
                let (mut found, mut count) = (S::Found::default(), 0u64);
                for at in (thread * 17..).map(|at| at % prompts.len()) {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    index.lookup(&prompts[at], &mut found);
                    count += 1;
                }
                total.fetch_add(count, Ordering::Relaxed);
            });
        }
        let begin = Instant::now();
        for event in events {
            index.apply(event);
        }
        index.settle();
        stop.store(true, Ordering::Relaxed);
        begin.elapsed().as_secs_f64()
    });
    (total.load(Ordering::Relaxed) as f64 / seconds, blocks as f64 / seconds)
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}
