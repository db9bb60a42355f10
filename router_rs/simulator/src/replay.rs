//! From text to text: what the command line and the benchmarks ask for.

use crate::outcome::Run;
use crate::settings::Settings;
use crate::simulation::{SimulationError, simulate};
use crate::trace::{
    PrefixSettings, SyntheticSettings, Ticks, Trace, TraceError, give_prefixes, read_azure,
    read_mooncake, read_simple, synthetic,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Where the requests come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "format", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Source {
    /// Mooncake's JSON lines.
    Mooncake {
        /// Arrivals stay in their ticks.
        #[serde(default)]
        raw: bool,
        /// Seed of the places within a tick.
        #[serde(default)]
        seed: u64,
    },
    /// Azure's CSV.
    Azure {
        /// Tokens of a block.
        block_tokens: u32,
        /// Made-up prefixes; none: no prompt shares any.
        #[serde(default)]
        prefixes: Option<PrefixSettings>,
    },
    /// JSON lines of our own.
    Simple {
        /// Tokens of a block.
        block_tokens: u32,
    },
    /// Made up.
    Synthetic(SyntheticSettings),
}

/// A replay: a trace and a cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replay {
    /// Where the requests come from.
    pub source: Source,
    /// Share of the trace that is replayed, from its start.
    #[serde(default = "whole")]
    pub share: f64,
    /// The cluster.
    pub settings: Settings,
}

fn whole() -> f64 {
    1.0
}

/// Why there is no result.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ReplayError {
    /// The settings are no such object.
    #[error("settings: {0}")]
    Settings(String),
    /// The trace cannot be read.
    #[error("trace, {0}")]
    Trace(#[from] TraceError),
    /// The run cannot begin.
    #[error(transparent)]
    Simulation(#[from] SimulationError),
}

impl Source {
    /// Reads the trace from the text of its file; made-up ones need none.
    ///
    /// # Errors
    /// [`TraceError`].
    pub fn read(&self, text: &str) -> Result<Trace, TraceError> {
        match self {
            Self::Mooncake { raw: true, .. } => read_mooncake(text, Ticks::Raw),
            Self::Mooncake { seed, .. } => read_mooncake(text, Ticks::Spread { seed: *seed }),
            Self::Azure {
                block_tokens,
                prefixes,
            } => {
                let mut trace = read_azure(text, *block_tokens)?;
                if let Some(prefixes) = prefixes {
                    give_prefixes(&mut trace, prefixes);
                }
                Ok(trace)
            }
            Self::Simple { block_tokens } => read_simple(text, *block_tokens),
            Self::Synthetic(settings) => Ok(synthetic(settings)),
        }
    }
}

impl Replay {
    /// Replays the trace of this text.
    ///
    /// # Errors
    /// [`ReplayError`].
    pub fn run(&self, text: &str) -> Result<Run, ReplayError> {
        let mut trace = self.source.read(text)?;
        trace.truncate(self.share.clamp(0.0, 1.0));
        Ok(simulate(&self.settings, &trace)?)
    }
}

/// Replays: a [`Replay`] as JSON and the text of its trace give a [`Run`] as
/// JSON.
///
/// # Errors
/// [`ReplayError`].
pub fn replay_json(replay: &str, text: &str) -> Result<String, ReplayError> {
    let replay: Replay =
        serde_json::from_str(replay).map_err(|error| ReplayError::Settings(error.to_string()))?;
    let run = replay.run(text)?;
    serde_json::to_string(&run).map_err(|error| ReplayError::Settings(error.to_string()))
}
