//! `mock-worker`, with its controls on standard input.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Args, ValueEnum};
use kvmesh_testkit::{
    mock::{FaultPlan, MockConfig, MockWorker},
    vocabulary::Vocabulary,
};
use kvmesh_wire::v1::Role;
use serde_json::json;

use super::{Outcome, input};

/// Exit status of a worker that died by order, as after kill -9.
const DIED: u8 = 137;

/// Arguments of `mock-worker`.
///
/// Lines on standard input control it: `freeze`, `thaw`, `break` (ends the
/// sessions), `drain`, `undrain`, `role prefill|decode|both`, `counters`
/// (prints them), `refuse N`, `skip-openings N`, `delay-first-token MS`,
/// `die-after TOKENS`, `stale on|off`, `hole INDEX`, `fail INDEX N`,
/// `return INDEX N`, `stuck on|off`, `heal` (no faults), `say JSON` (each output is this
/// text; null: as before), `quit`.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Address to serve on. Port 0: a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Name of the worker.
    #[arg(long)]
    worker_id: Option<String>,
    /// Role at the start.
    #[arg(long, value_enum, default_value_t = RoleName::Both)]
    role: RoleName,
    /// Name of the model.
    #[arg(long, default_value = "mock")]
    model: String,
    /// Folder with a tokenizer.json. Default: a small one made in code.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Chat template of the tokeniser that is made in code.
    #[arg(long, conflicts_with = "tokenizer")]
    chat_template: Option<String>,
    /// More special tokens of it.
    #[arg(long, conflicts_with = "tokenizer")]
    mark: Vec<String>,
    /// What each output is; see the control `say`.
    #[arg(long, conflicts_with = "tokenizer")]
    say: Option<String>,
    /// Tell that grammars are followed.
    #[arg(long)]
    grammars: bool,
    /// Pause between steps, ms. 0: none.
    #[arg(long, default_value_t = 10.0)]
    step_ms: f64,
    /// From a placement to its first token, ms.
    #[arg(long, default_value_t = 0.0)]
    prefill_ms: f64,
    /// Blocks of 16 tokens in the pretended pool.
    #[arg(long, default_value_t = 1 << 20)]
    pool_blocks: u64,
    /// Most alternatives with log-probability. 0: none at all.
    #[arg(long, default_value_t = 0)]
    max_logprobs: u32,
    /// Answer completions over HTTP/1.1 as well, without a router.
    #[arg(long)]
    http: bool,
    /// Hand off by this engine connector instead of the mesh.
    #[arg(long, default_value = "")]
    engine_connector: String,
    /// The first token comes from decode, not from prefill.
    #[arg(long)]
    first_token_from_decode: bool,
    /// Refuse so many placements.
    #[arg(long, default_value_t = 0)]
    refuse: u32,
    /// Die after so many tokens, as by kill -9.
    #[arg(long)]
    die_after_tokens: Option<u64>,
    /// Delay each first token, ms.
    #[arg(long, default_value_t = 0.0)]
    delay_first_token_ms: f64,
    /// Leave so many placements unanswered.
    #[arg(long, default_value_t = 0)]
    skip_openings: u32,
    /// Send a stale row after each row.
    #[arg(long)]
    stale_rows: bool,
    /// Leave out this output index.
    #[arg(long)]
    hole_at: Option<u32>,
    /// End when standard input closes.
    #[arg(long)]
    until_stdin_closes: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoleName {
    Prefill,
    Decode,
    Both,
}

impl From<RoleName> for Role {
    fn from(name: RoleName) -> Self {
        match name {
            RoleName::Prefill => Self::Prefill,
            RoleName::Decode => Self::Decode,
            RoleName::Both => Self::Both,
        }
    }
}

pub(crate) async fn run(arguments: Arguments) -> Outcome {
    let ms = |ms: f64| Duration::try_from_secs_f64(ms / 1e3);
    let marks: Vec<&str> = arguments.mark.iter().map(String::as_str).collect();
    let vocabulary = match (&arguments.tokenizer, &arguments.chat_template) {
        (Some(folder), _) => Vocabulary::from_folder(folder)?,
        (None, Some(template)) => Vocabulary::built_in_for(template, &marks),
        (None, None) => Vocabulary::built_in(),
    };
    let worker = MockWorker::start(MockConfig {
        listen: arguments.listen,
        worker_id: arguments.worker_id,
        role: arguments.role.into(),
        model: arguments.model,
        vocabulary: Arc::new(vocabulary),
        step: ms(arguments.step_ms)?,
        prefill: ms(arguments.prefill_ms)?,
        pool_blocks: arguments.pool_blocks,
        max_logprobs: arguments.max_logprobs,
        grammars: arguments.grammars,
        http: arguments.http,
        prefill_emits_first_token: !arguments.first_token_from_decode,
        engine_connector: arguments.engine_connector,
        ..MockConfig::default()
    })?;
    worker.say(arguments.say.as_deref());
    let delay = ms(arguments.delay_first_token_ms)?;
    worker.faults().set(|plan| {
        plan.refuse_next = arguments.refuse;
        plan.die_after_tokens = arguments.die_after_tokens;
        plan.delay_first_token = delay;
        plan.skip_openings = arguments.skip_openings;
        plan.stale_rows = arguments.stale_rows;
        plan.hole_at = arguments.hole_at;
    });
    let ready = json!({"address": worker.addr().to_string(), "pid": std::process::id(),
        "http_address": worker.http_addr().map(|addr| addr.to_string()),
        "worker_id": worker.worker_id(), "transfer_address": worker.record().transfer_address});
    println!("{ready}");
    let mut lines = input::lines()?;
    let mut listens = true;
    loop {
        tokio::select! {
            () = worker.ended() => break,
            line = lines.recv(), if listens => match line {
                Some(line) if line.trim() == "quit" => return Ok(ExitCode::SUCCESS),
                Some(line) => match control(&worker, &line) {
                    Ok(Some(answer)) => println!("{answer}"),
                    Ok(None) => {}
                    Err(error) => eprintln!("kvmesh-testkit: {error}"),
                },
                None if arguments.until_stdin_closes => return Ok(ExitCode::SUCCESS),
                None => listens = false,
            },
        }
    }
    Ok(ExitCode::from(DIED))
}

/// Does what one line says; gives what is to be printed.
fn control(worker: &MockWorker, line: &str) -> Result<Option<String>, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let wrong = || format!("unknown control: {line}");
    let number = |at: usize| -> Result<u32, String> {
        let word = words.get(at).ok_or_else(wrong)?;
        word.parse().map_err(|_| format!("no number: {word}"))
    };
    let switch = || match words.get(1) {
        Some(&"on") => Ok(true),
        Some(&"off") => Ok(false),
        _ => Err(wrong()),
    };
    let faults = worker.faults();
    match *words.first().ok_or_else(wrong)? {
        "freeze" => worker.freeze(),
        "thaw" => worker.thaw(),
        "break" => worker.break_sessions(),
        "drain" => worker.set_draining(true),
        "undrain" => worker.set_draining(false),
        "role" => {
            let name =
                RoleName::from_str(words.get(1).unwrap_or(&""), true).map_err(|_| wrong())?;
            worker.set_role(name.into());
        }
        "counters" => {
            let text = serde_json::to_string(&worker.counters()).map_err(|e| e.to_string())?;
            return Ok(Some(text));
        }
        "refuse" => {
            let count = number(1)?;
            faults.set(|plan| plan.refuse_next = count);
        }
        "skip-openings" => {
            let count = number(1)?;
            faults.set(|plan| plan.skip_openings = count);
        }
        "delay-first-token" => {
            let delay = Duration::from_millis(number(1)?.into());
            faults.set(|plan| plan.delay_first_token = delay);
        }
        "die-after" => {
            let tokens = number(1)?;
            faults.set(|plan| plan.die_after_tokens = Some(tokens.into()));
        }
        "stale" => {
            let on = switch()?;
            faults.set(|plan| plan.stale_rows = on);
        }
        "stuck" => {
            let on = switch()?;
            faults.set(|plan| plan.stuck = on);
        }
        "hole" => {
            let index = number(1)?;
            faults.set(|plan| plan.hole_at = Some(index));
        }
        "fail" => {
            let (index, count) = (number(1)?, number(2)?);
            faults.set(|plan| (plan.fail_at, plan.fail_next) = (Some(index), count));
        }
        "return" => {
            let (index, count) = (number(1)?, number(2)?);
            faults.set(|plan| (plan.return_at, plan.return_next) = (Some(index), count));
        }
        "say" => {
            let text: Option<String> =
                serde_json::from_str(line.trim_start_matches("say")).map_err(|e| e.to_string())?;
            worker.say(text.as_deref());
        }
        "heal" => faults.set(|plan| *plan = FaultPlan::default()),
        _ => return Err(wrong()),
    }
    Ok(None)
}
