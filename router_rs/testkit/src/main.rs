//! Command line of the testkit.
#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kvmesh-testkit: {error}");
            ExitCode::FAILURE
        }
    }
}
