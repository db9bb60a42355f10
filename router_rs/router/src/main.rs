//! `kvmesh-router`: the router as one program, without Python.

use std::{process::ExitCode, time::Duration};

use clap::{Arg, ArgAction, ArgMatches, Command, parser::ValueSource};
use kvmesh_gateway::{
    CancellationToken, Router, Settings, init_logging,
    settings::{KEYS, Kind, Layers, SettingsError},
};

const ABOUT: &str = "The front of a kvmesh cluster: takes gRPC calls, chooses prefill and decode \
workers, streams tokens.";
const AFTER: &str = "\
Settings come from a file (--config, TOML with the same names and _ for -), from the variables
KVMESH_<NAME>, and from flags; later ones win.

Examples:
  kvmesh-router --etcd 127.0.0.1:2379               workers of cluster `default` in etcd
  kvmesh-router --workers 127.0.0.1:7001            one worker, no etcd
  kvmesh-router --listen 0.0.0.0:7440 --tls-cert chain.pem --tls-key key.pem
  grpcurl -plaintext -d '{\"prompt\":\"Hello\"}' 127.0.0.1:7440 kvmesh.v1.Inference/Generate
  curl 127.0.0.1:7440/metrics";

fn main() -> ExitCode {
    let settings = match settings(&command().get_matches()) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("kvmesh-router: {error}");
            return ExitCode::from(2);
        }
    };
    init_logging(&settings);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(settings.threads)
        .thread_name("kvmesh-router")
        .enable_all()
        .build();
    let served = match runtime {
        Err(error) => Err(error.to_string()),
        Ok(runtime) => {
            let served = runtime
                .block_on(serve(&settings))
                .map_err(|error| error.to_string());
            // What still runs on text threads has no client any more.
            runtime.shutdown_timeout(Duration::from_secs(1));
            served
        }
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvmesh-router: {error}");
            ExitCode::FAILURE
        }
    }
}

fn command() -> Command {
    let mut command = Command::new("kvmesh-router")
        .version(env!("CARGO_PKG_VERSION"))
        .about(ABOUT)
        .after_help(AFTER)
        .arg(
            Arg::new("config")
                .long("config")
                .env("KVMESH_CONFIG")
                .value_name("FILE")
                .help("TOML file with settings"),
        );
    for key in KEYS {
        let default = if key.default.is_empty() {
            ""
        } else {
            key.default
        };
        let help = format!(
            "{} [{}; {}; {}]",
            key.help,
            if default.is_empty() {
                "default: none".to_owned()
            } else {
                format!("default: {default}")
            },
            key.allowed(),
            key.variable(),
        );
        // clap wants names for good; there are few, made once a process.
        let flag: &'static str = Box::leak(key.flag().into_boxed_str());
        let arg = Arg::new(key.name).long(flag).help(help);
        command = command.arg(match key.kind {
            Kind::Flag => arg
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
                .value_name("BOOL"),
            Kind::List => arg.action(ArgAction::Append).value_name("LIST"),
            Kind::Number(..) | Kind::Real(..) => arg.value_name("N"),
            Kind::Bytes(..) => arg.value_name("BYTES"),
            Kind::Time(..) => arg.value_name("TIME"),
            Kind::Address | Kind::AddressOrNone => arg.value_name("IP:PORT"),
            Kind::Text | Kind::OneOf(_) => arg.value_name("TEXT"),
        });
    }
    command
}

fn settings(flags: &ArgMatches) -> Result<Settings, SettingsError> {
    let mut layers = Layers::default();
    if let Some(file) = flags.get_one::<String>("config") {
        let text = std::fs::read_to_string(file).map_err(|error| SettingsError::Unreadable {
            from: file.clone(),
            reason: error.to_string(),
        })?;
        layers.add_toml(file, &text)?;
    }
    layers.add_environment(std::env::vars())?;
    for key in KEYS {
        if flags.value_source(key.name) == Some(ValueSource::CommandLine)
            && let Some(values) = flags.get_many::<String>(key.name)
        {
            let text = values.cloned().collect::<Vec<_>>().join(",");
            let flag = format!("--{}", key.flag());
            layers.add(&flag, [(key.name.to_owned(), text.into())])?;
        }
    }
    Settings::resolve(&layers)
}

async fn serve(settings: &Settings) -> Result<(), Box<dyn std::error::Error>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let router = Router::start(settings)?;
    // Programs that start a router read this line to learn its port.
    println!("kvmesh-router: serving on {}", router.address());
    if let Some(address) = router.admin_address() {
        println!("kvmesh-router: operators are answered on {address}");
    }
    let stop: CancellationToken = router.stop_token();
    let ended = router.ended();
    tokio::pin!(ended);
    tokio::select! {
        () = &mut ended => return Ok(()),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    stop.cancel();
    tokio::select! {
        () = ended => Ok(()),
        _ = terminate.recv() => Err("stopped before running generations ended".into()),
        _ = interrupt.recv() => Err("stopped before running generations ended".into()),
    }
}
