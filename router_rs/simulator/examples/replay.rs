//! `replay SETTINGS.json [TRACE]`: one replay, its result as JSON.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let read = |path: Option<String>| path.map_or(Ok(String::new()), std::fs::read_to_string);
    let result = read(arguments.next())
        .and_then(|settings| Ok((settings, read(arguments.next())?)))
        .map_err(|error| error.to_string())
        .and_then(|(settings, trace)| {
            kvmesh_simulator::replay_json(&settings, &trace).map_err(|error| error.to_string())
        });
    match result {
        Ok(run) => {
            println!("{run}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("replay: {error}");
            ExitCode::FAILURE
        }
    }
}
