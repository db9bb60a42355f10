//! `load`, `replay-load` and `attach-load`.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use clap::Args;
use kvmesh_testkit::load::{self, AttachConfig, LoadConfig, ReplayConfig};

use super::Outcome;

/// What both kinds of load take.
#[derive(Debug, Args)]
struct Shape {
    /// Address to bring load to.
    #[arg(long)]
    target: SocketAddr,
    /// Requests at the same time.
    #[arg(long, default_value_t = 64)]
    streams: usize,
    /// Prompt length, tokens.
    #[arg(long, default_value_t = 32)]
    prompt_tokens: u32,
    /// Output length, tokens.
    #[arg(long, default_value_t = 256)]
    max_tokens: u32,
    /// Seconds before anything counts.
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    /// Seconds that count.
    #[arg(long, default_value_t = 3.0)]
    window: f64,
    /// Process whose CPU time is reported.
    #[arg(long)]
    watch_pid: Option<u32>,
}

/// Arguments of `load`.
#[derive(Debug, Args)]
pub(crate) struct LoadArguments {
    #[command(flatten)]
    shape: Shape,
    /// One connection for each stream instead of one for all.
    #[arg(long)]
    connection_each: bool,
    /// Ask for completions of the mock worker over OpenAI's HTTP/1.1, with a
    /// connection for each stream.
    #[arg(long)]
    http: bool,
    /// Model to ask for. Empty: the only one.
    #[arg(long, default_value = "")]
    model: String,
}

/// Arguments of `attach-load`.
#[derive(Debug, Args)]
pub(crate) struct AttachArguments {
    #[command(flatten)]
    shape: Shape,
}

/// Arguments of `replay-load`.
#[derive(Debug, Args)]
pub(crate) struct ReplayArguments {
    /// Address to bring load to.
    #[arg(long)]
    target: SocketAddr,
    /// File of arrivals, a JSON object a line: arrival_ms, prompt_tokens,
    /// output_tokens; if wanted blocks, class, ttft_target_ms, itl_target_ms.
    #[arg(long)]
    arrivals: PathBuf,
    /// Tokens of a block.
    #[arg(long, default_value_t = 16)]
    block_tokens: u32,
    /// Seed of the prompts' tokens: a replay with another one shares none.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Model to ask for. Empty: the only one.
    #[arg(long, default_value = "")]
    model: String,
    /// Connections that requests take in turn.
    #[arg(long, default_value_t = 4)]
    connections: usize,
    /// Seconds from the start in which arrivals do not count.
    #[arg(long, default_value_t = 0.0)]
    warm_up: f64,
    /// Seconds for which answers are waited for after the last arrival.
    #[arg(long, default_value_t = 30.0)]
    grace: f64,
}

pub(crate) async fn load(arguments: LoadArguments) -> Outcome {
    let shape = arguments.shape;
    let figures = load::run(LoadConfig {
        target: shape.target,
        streams: shape.streams,
        connection_each: arguments.connection_each,
        http: arguments.http,
        model: arguments.model,
        prompt_tokens: shape.prompt_tokens,
        max_tokens: shape.max_tokens,
        warm_up: Duration::try_from_secs_f64(shape.warm_up)?,
        window: Duration::try_from_secs_f64(shape.window)?,
        watch_pid: shape.watch_pid,
    })
    .await?;
    println!("{}", serde_json::to_string(&figures)?);
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn replay(arguments: ReplayArguments) -> Outcome {
    let arrivals = load::read_arrivals(&std::fs::read_to_string(&arguments.arrivals)?)?;
    let figures = load::replay(ReplayConfig {
        target: arguments.target,
        model: arguments.model,
        arrivals,
        block_tokens: arguments.block_tokens,
        seed: arguments.seed,
        connections: arguments.connections,
        warm_up: Duration::try_from_secs_f64(arguments.warm_up)?,
        grace: Duration::try_from_secs_f64(arguments.grace)?,
    })
    .await?;
    println!("{}", serde_json::to_string(&figures)?);
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn attach(arguments: AttachArguments) -> Outcome {
    let shape = arguments.shape;
    let figures = load::attach(AttachConfig {
        target: shape.target,
        streams: shape.streams,
        prompt_tokens: shape.prompt_tokens,
        max_tokens: shape.max_tokens,
        warm_up: Duration::try_from_secs_f64(shape.warm_up)?,
        window: Duration::try_from_secs_f64(shape.window)?,
        watch_pid: shape.watch_pid,
    })
    .await?;
    println!("{}", serde_json::to_string(&figures)?);
    Ok(ExitCode::SUCCESS)
}
