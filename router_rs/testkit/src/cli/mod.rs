//! Subcommands. Each prints JSON on standard output, one object a line.

mod bring_load;
mod fault_proxy;
mod input;
mod mock_worker;

use std::{error::Error, process::ExitCode};

use clap::{Parser, Subcommand};

/// Result of a subcommand.
type Outcome = Result<ExitCode, Box<dyn Error + Send + Sync>>;

#[derive(Debug, Parser)]
#[command(name = "kvmesh-testkit", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// Tools that tests and benchmarks of kvmesh stand on.
#[derive(Debug, Subcommand)]
enum Command {
    /// Runs a worker without an engine.
    MockWorker(mock_worker::Arguments),
    /// Passes TCP connections on and breaks them as it is told.
    FaultProxy(fault_proxy::Arguments),
    /// Brings load to an Inference endpoint and prints figures.
    Load(bring_load::LoadArguments),
    /// Brings arrivals of a file at their times and prints what became of them.
    ReplayLoad(bring_load::ReplayArguments),
    /// Brings load to a worker over Attach and prints figures.
    AttachLoad(bring_load::AttachArguments),
}

pub(crate) fn run() -> Outcome {
    let arguments = Arguments::parse();
    // One thread: these tools are pinned to a core in benchmarks.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match arguments.command {
        Command::MockWorker(arguments) => runtime.block_on(mock_worker::run(arguments)),
        Command::FaultProxy(arguments) => runtime.block_on(fault_proxy::run(arguments)),
        Command::Load(arguments) => runtime.block_on(bring_load::load(arguments)),
        Command::ReplayLoad(arguments) => runtime.block_on(bring_load::replay(arguments)),
        Command::AttachLoad(arguments) => runtime.block_on(bring_load::attach(arguments)),
    }
}
