//! Traces as they are read.
#![allow(clippy::unwrap_used)]

use kvmesh_simulator::trace::{
    PrefixSettings, SyntheticSettings, Ticks, give_prefixes, read_azure, read_mooncake,
    read_simple, synthetic,
};

const MOONCAKE: &str = r#"
{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 0, "input_length": 512, "output_length": 7, "hash_ids": [0]}
{"timestamp": 3000, "input_length": 600, "output_length": 1, "hash_ids": [0, 9]}
{"timestamp": 6000, "input_length": 100, "output_length": 2, "hash_ids": [3]}
"#;

#[test]
fn mooncake_blocks_that_a_prompt_does_not_fill_cannot_be_shared() {
    let trace = read_mooncake(MOONCAKE, Ticks::Raw).unwrap();
    let blocks: Vec<&[u64]> = (0..4).map(|at| trace.blocks(at)).collect();
    assert_eq!(blocks, [&[0, 1][..], &[0], &[0], &[]]);
    assert_eq!(trace.block_tokens, 512);
    assert_eq!(trace.requests[0].arrival_ms, trace.requests[1].arrival_ms);
}

#[test]
fn mooncake_arrivals_are_spread_within_their_tick_by_a_seed() {
    let spread = |seed| read_mooncake(MOONCAKE, Ticks::Spread { seed }).unwrap();
    assert_eq!(spread(1), spread(1));
    assert_ne!(spread(1), spread(2));
    for seed in 0..50 {
        let trace = spread(seed);
        let at: Vec<f64> = trace.requests.iter().map(|r| r.arrival_ms).collect();
        assert!(at.is_sorted());
        assert!(at[1] < 3_000.0 && at[0] != at[1]);
        assert!((3_000.0..6_000.0).contains(&at[2]));
        assert!((6_000.0..9_000.0).contains(&at[3]));
    }
}

const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
    2023-11-16 23:59:59.5000000,4808,10\n\
    2023-11-17 00:00:01.2500000,3180,8\n";

#[test]
fn azure_times_go_on_over_midnight() {
    let trace = read_azure(AZURE, 64).unwrap();
    let times: Vec<f64> = trace.requests.iter().map(|r| r.arrival_ms).collect();
    assert_eq!(times[0], 0.0);
    assert!((times[1] - 1_750.0).abs() < 1e-3, "{times:?}");
    assert_eq!(
        (trace.requests[1].prompt, trace.requests[1].output),
        (3180, 8)
    );
}

#[test]
fn a_line_that_is_none_is_named() {
    let azure = read_azure("head\n2023-11-16 18:00:00.0,1\n", 64).unwrap_err();
    assert_eq!(azure.line, 2);
    assert_eq!(read_mooncake("{}", Ticks::Raw).unwrap_err().line, 1);
    assert_eq!(read_simple("\n\n{\"x\": 1}", 64).unwrap_err().line, 3);
}

#[test]
fn made_up_prefixes_follow_from_their_seed_and_keep_lengths() {
    let plain = synthetic(&SyntheticSettings::default());
    let with = |seed| {
        let mut trace = plain.clone();
        give_prefixes(
            &mut trace,
            &PrefixSettings {
                seed,
                ..PrefixSettings::default()
            },
        );
        trace
    };
    assert_eq!(with(3), with(3));
    assert_ne!(with(3), with(4));
    let (a, b) = (with(3), with(4));
    for at in 0..plain.requests.len() {
        assert_eq!(a.requests[at].prompt, b.requests[at].prompt);
        let full = (a.requests[at].prompt / a.block_tokens) as usize;
        assert_eq!(a.blocks(at).len(), full);
    }
    let shared = a.ideal_hit_share();
    assert!((0.2..0.8).contains(&shared), "{shared}");
}

#[test]
fn equal_ids_mean_equal_prefixes() {
    let trace = synthetic(&SyntheticSettings {
        requests: 2_000,
        ..SyntheticSettings::default()
    });
    let mut before = std::collections::HashMap::new();
    for at in 0..trace.requests.len() {
        let mut last = 0;
        for id in trace.blocks(at) {
            assert_eq!(
                *before.entry(*id).or_insert(last),
                last,
                "one block, two prefixes"
            );
            last = *id;
        }
    }
}
