//! Workers and traffic to replay.
#![allow(dead_code)]

use kvmesh_simulator::trace::{PrefixSettings, SyntheticSettings, Trace, synthetic};
use kvmesh_simulator::{
    Coefficients, Noise, PolicySettings, Profile, QueueSettings, Settings, Slo, Transfer,
};
use std::collections::BTreeMap;

pub(crate) fn profile() -> Profile {
    Profile {
        name: "test".to_owned(),
        hardware: "made up".to_owned(),
        model: "made up".to_owned(),
        gpus: 1,
        step: Coefficients {
            a_ms: 6.0,
            b_ms: 0.04,
            c_ms: 1e-6,
            d_ms: 0.02,
            e_ms: 5e-5,
        },
        saturating_chunk: 1024,
        layer_preemption: false,
        chunk_tokens: 0,
        kv_bytes_per_token: 131_072,
        pool_tokens: 100_000,
        max_batch: 64,
        context_length: 32_768,
        transfer: Transfer {
            bytes_per_ms: 1e7,
            fixed_ms: 2.0,
        },
        sources: BTreeMap::new(),
    }
}

pub(crate) fn settings(prefill: usize, decode: usize, both: usize) -> Settings {
    Settings {
        profile: profile(),
        prefill,
        decode,
        both,
        routers: 1,
        speed: 1.0,
        warm_up: 0.2,
        policy: cost(),
        queue: QueueSettings::default(),
        noise: Noise::default(),
        prefix_pull: false,
        local_prefill: None,
        prior: [1.0; 5],
        failures: Vec::new(),
        planner: None,
        slo: Slo::default(),
        max_tokens: 4096,
        rows: true,
        seed: 7,
    }
}

pub(crate) fn cost() -> PolicySettings {
    PolicySettings::Cost {
        stretch: None,
        beyond_target: None,
        tie_share: None,
    }
}

pub(crate) fn traffic(requests: usize, per_second: f64) -> Trace {
    synthetic(&SyntheticSettings {
        requests,
        per_second,
        prefixes: PrefixSettings::default(),
        ..SyntheticSettings::default()
    })
}
